"""Messages between actor ranks and workers on GPUs of their own: an NCCL communicator as a wire of boxes.

Owns the communicator, beside vLLM's and the trainer's, and its streams. Knows no parcel and no sync. Everything is enqueued: a
message waits on the device for its other end, behind what it was told to wait for, and an event stands for it. The host only asks
how things stand, so every wait ends at its limit, or when another thread gives the group up: NCCL then ends its kernels, here and
without the other members.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from rlsync.coordinator.assignments import GroupInfo
from rlsync.transport.meeting import PATIENCE, GroupError, call_the_roll, compare, enter
from rlsync.transport.nccl_library import Communicator, NcclError, nccl_version, unique_id

_log = logging.getLogger(__name__)

_Message = tuple[torch.Tensor, int]
# How NCCL shares memory between processes.
_CUMEM = "NCCL_CUMEM_ENABLE"

# How long the host sleeps before it asks again; the first is what a step may lose, the other what a long wait costs a core.
_SHORT_POLL_S, _LONG_POLL_S = 20e-6, 1e-3
# The shortest sleep takes 0.1 ms, as long as NCCL takes to enqueue a message of which there are thousands a second.
_SPIN_S = 0.5e-3
_PATIENT_AFTER_S = 0.1


class NcclWire:
    """One member of a group of actor ranks and workers, each on a GPU of its own.

    Args:
        number: groups of one connection are counted; all members have to name the same.
        timeout_s: deadline of the phases.
        device: of this member.
    """

    def __init__(self, info: GroupInfo, number: int, timeout_s: float, device: torch.device) -> None:
        self.info, self.number, self._device = info, number, device
        # To be made within a phase; then what is asked for in one may come at the end of the next, because an engine takes its time to
        # pause. Whoever keeps the phases gives the group up before.
        self._open_limit_s, self._limit_s = PATIENCE * timeout_s, 2 * timeout_s
        self._abandoned, self._gone = threading.Event(), threading.Event()
        # One thread calls NCCL at a time; no call of it waits.
        self._lock = threading.Lock()
        self._communicator: Communicator | None = None
        self._hello: torch.Tensor | None = None
        # Messages that have not arrived, and what to say of them.
        self._under_way: deque[tuple[torch.cuda.Event, str]] = deque()
        # Ahead of copies, which would otherwise fill the GPU first and leave the link idle.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._apart = torch.cuda.Stream(device)

    def open(self, givers: Sequence[int], takers: Sequence[int]) -> None:
        """Find all members, and connect to those of whom this one receives and to whom it sends. Collective over the members.

        Raises GroupError naming who is missing, ConfigError where there is no NCCL.
        """
        info = self.info
        with torch.cuda.device(self._device):
            limit_s, abandoned = self._open_limit_s, self._abandoned
            room = enter(info, self.number, limit_s)
            self._compare(call_the_roll(room, info, f"{nccl_version()} {_cumem()}", limit_s, abandoned))
            # Rank 0 names the communicator.
            name = unique_id().hex() if info.rank == 0 else ""
            name = call_the_roll(room, info, name, limit_s, abandoned, topic="name")[0]
            with self._told("while the group was made"), self._lock:
                self._give_up_if_abandoned()
                self._communicator = Communicator(bytes.fromhex(name), info.rank, len(info.members))
            self._poll("while the group was made", lambda: True, limit_s)
            # Two members connect when there is a first message between them.
            self._hello = torch.zeros(len(info.members), dtype=torch.uint8, device=self._device)
            sends, receives = ([(self._hello[rank : rank + 1], rank) for rank in ranks] for ranks in (takers, givers))
            event = self._enqueue("while the group was made", sends, receives, [self.mark()], limit_s)
            self._poll("while the group was made", event.query, limit_s)

    def _compare(self, said: Sequence[str]) -> None:
        versions, settings = zip(*(each.split() for each in said), strict=True)
        compare(self.info, versions, "NCCL")
        for member, setting in zip(self.info.members, settings, strict=True):
            if setting != settings[0]:
                raise GroupError(
                    f"{member} runs with {_CUMEM}={setting}, {self.info.members[0]} with {_CUMEM}={settings[0]}; NCCL connects no "
                    "processes that differ in it: set the same for actor and engines"
                )

    def carry(
        self,
        step: int,
        sends: Sequence[_Message],
        receives: Sequence[_Message],
        after: Sequence[torch.cuda.Event],
    ) -> torch.cuda.Event:
        """Enqueue messages (1-D uint8 on the device) behind ``after``; they are enqueued when it returns. Raises GroupError."""
        others = sorted({self.info.members[rank] for _, rank in (*sends, *receives)})
        return self._enqueue(f"in step {step} with {', '.join(others)}", sends, receives, after, self._limit_s)

    def _enqueue(
        self, where: str, sends: Sequence[_Message], receives: Sequence[_Message], after: Sequence[torch.cuda.Event], limit_s: float
    ) -> torch.cuda.Event:
        for event in after:
            self._stream.wait_event(event)
        if not sends and not receives:
            return self._stream.record_event()
        with self._told(where), self._lock:
            self._give_up_if_abandoned()
            assert self._communicator is not None, "open() comes first"
            self._communicator.begin(_addressed(sends), _addressed(receives), self._stream.cuda_stream)
        self._poll(where, lambda: True, limit_s)
        event = self._stream.record_event()
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        self._under_way.append((event, where))
        return event

    def mark(self) -> torch.cuda.Event:
        """An event behind what this thread has enqueued on its current stream."""
        return torch.cuda.current_stream(self._device).record_event()

    def hold(self, ticket: torch.cuda.Event) -> None:
        """This thread's current stream goes on after the event."""
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def wait(self, ticket: torch.cuda.Event) -> None:
        """Until the event has happened. Raises GroupError."""
        late = next((where for event, where in self._under_way if not event.query()), "after its last step")
        self._poll(late, ticket.query, self._limit_s)

    def apart(self) -> contextlib.AbstractContextManager[object]:
        """A stream of its own is this thread's current one inside."""
        return torch.cuda.stream(self._apart)

    def _poll(self, where: str, has_ended: Callable[[], bool], limit_s: float) -> None:
        """Until NCCL has enqueued what was begun last, and ``has_ended``. Raises GroupError; any other call may end it."""
        begin_s = time.monotonic()
        while True:
            with self._told(where), self._lock:
                self._give_up_if_abandoned()
                assert self._communicator is not None
                in_progress = self._communicator.in_progress()
            if not in_progress and has_ended():
                return
            waited_s = time.monotonic() - begin_s
            if waited_s > limit_s:
                raise GroupError(f"the nccl group broke {where}: it did not end within {limit_s:g} s")
            time.sleep(0 if waited_s < _SPIN_S else _SHORT_POLL_S if waited_s < _PATIENT_AFTER_S else _LONG_POLL_S)

    def _give_up_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise NcclError("it was given up")

    @contextlib.contextmanager
    def _told(self, where: str) -> Iterator[None]:
        try:
            yield
        except NcclError as error:
            raise GroupError(f"the nccl group broke {where}: {error}") from error

    def abandon(self, kept: Sequence[object] = ()) -> None:
        """End what is under way on the device, in a thread of its own; ``kept`` lives until then. Idempotent, does not block."""
        if self._abandoned.is_set():
            return
        self._abandoned.set()
        threading.Thread(target=self._abort, args=(kept,), name="rlsync-nccl-abort", daemon=True).start()

    def _abort(self, kept: Sequence[object]) -> None:
        """``kept`` lives as long as this call."""
        with torch.cuda.device(self._device), self._lock:
            communicator, self._communicator = self._communicator, None
            if communicator is not None:
                try:
                    communicator.abort()
                except NcclError as error:
                    _log.warning("NCCL could not give up a group: %s", error)
            self._stream.synchronize()
            self._apart.synchronize()
        del kept
        self._gone.set()

    def rest(self, limit_s: float) -> bool:
        """After ``abandon``: whether nothing of it runs on the device any more, within so long."""
        return self._gone.wait(limit_s)


def _addressed(messages: Sequence[_Message]) -> list[tuple[int, int, int]]:
    return [(memory.data_ptr(), memory.numel(), rank) for memory, rank in messages]


def _cumem() -> str:
    return os.environ.get(_CUMEM, "unset")
