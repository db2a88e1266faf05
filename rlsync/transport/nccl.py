"""The transport ``nccl``: messages between actor ranks and workers on GPUs of their own, from memory to memory.

Owns the calls of NCCL, a communicator beside vLLM's and the trainer's, and its streams; both ends are those of ``rlsync.transport.p2p``.
Everything is enqueued: a message waits on the device for its other end, behind what it was told to wait for, and an event stands for
it. The host only asks how things stand, so every wait ends at its limit, or when another thread gives the group up: NCCL then ends its
kernels, here and without the other members.

The library is used directly. torch's ProcessGroupNCCL waits inside NCCL for members that never come, ends the whole process from
a watchdog thread when a message is late, and reads what it does then from the environment of the process, which is vLLM's here and
the trainer's there. A communicator that does not block returns at once, says how it stands when asked, and can always be given up.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import torch

from rlsync.coordinator.messages import ActorHello, Reports, WorkerAssignment, WorkerHello
from rlsync.errors import ConfigError, RlsyncError
from rlsync.transport import p2p
from rlsync.transport.ends import EndArguments, Hosted, Routes, SenderContext, name_of, names_of
from rlsync.transport.p2p import GroupReceiver, GroupSender, SenderEnd, group_of
from rlsync.transport.p2p import host as host
from rlsync.transport.rendezvous import PATIENCE, GroupError, GroupInfo, barrier, compare, enter

_log = logging.getLogger(__name__)

_Message = tuple[torch.Tensor, int]
# How NCCL shares memory between processes.
_CUMEM = "NCCL_CUMEM_ENABLE"

# How long the host sleeps before it asks again; the first is what a step may lose, the other what a long wait costs a core.
_SHORT_POLL_S, _LONG_POLL_S = 20e-6, 1e-3
# The shortest sleep takes 0.1 ms, as long as NCCL takes to enqueue a message of which there are thousands a second.
_SPIN_S = 0.5e-3
_PATIENT_AFTER_S = 0.1


def finding(reports: Reports, worker: WorkerHello) -> str | None:
    """Why NCCL cannot connect a worker and the actor ranks, or None."""
    if worker.gpu_uuid is None:
        return f"{name_of(worker)} has no GPU"
    in_host = [actor for actor in reports.actors if actor.memory == "host" or actor.gpu_uuid is None]
    if in_host:
        return f"the parameters of {names_of(in_host)} are in host memory"
    others: tuple[ActorHello | WorkerHello, ...] = (*reports.actors, *(w for w in reports.workers if w is not worker))
    places: dict[str | None, ActorHello | WorkerHello] = {worker.gpu_uuid: worker}
    for other in others:
        twin = places.setdefault(other.gpu_uuid, other)
        if twin is not other and other.gpu_uuid is not None:
            return (
                f"{name_of(twin)} and {name_of(other)} share the GPU {other.gpu_uuid}, and NCCL takes one member on each; "
                "weight_sync.transport: auto serves such workers otherwise"
            )
    return None


def assign(routes: Routes, hosted: Hosted | None) -> EndArguments:
    return p2p.assign(routes, hosted, "nccl")


def make_sender(end: bytes, context: SenderContext) -> GroupSender:
    decoded, device = msgspec.msgpack.decode(end, type=SenderEnd), context.device
    assert device is not None, "nccl was planned for a process without a GPU"
    sender = GroupSender(decoded, lambda number: NcclCommunicator(decoded.group, number, context.timeout_s, device), device)
    context.on_abandon.append(sender.abandon)
    return sender


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> GroupReceiver:
    info = group_of(assignment)
    return GroupReceiver(
        assignment, lambda number: NcclCommunicator(info, number, timeout_s, device), device, device, timeout_s, lands_ahead=True
    )


class NcclCommunicator:
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
        self._communicator: NcclHandle | None = None
        self._hello: torch.Tensor | None = None
        # Messages that have not arrived, and what to say of them.
        self._under_way: deque[tuple[torch.cuda.Event, str]] = deque()
        # Ahead of copies, which would otherwise fill the GPU first and leave the link idle.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._apart = torch.cuda.Stream(device)

    def open(self, senders: Sequence[int], receivers: Sequence[int]) -> None:
        """Find all members, and connect to those of whom this one receives and to whom it sends. Collective over the members.

        Raises GroupError naming who is missing, ConfigError where there is no NCCL.
        """
        info = self.info
        with torch.cuda.device(self._device):
            limit_s, abandoned = self._open_limit_s, self._abandoned
            room = enter(info, self.number, limit_s)
            self._compare(barrier(room, info, f"{nccl_version()} {_cumem()}", limit_s, abandoned))
            # Rank 0 names the communicator.
            name = unique_id().hex() if info.rank == 0 else ""
            name = barrier(room, info, name, limit_s, abandoned, topic="name")[0]
            with self._told("while the group was made"), self._lock:
                self._give_up_if_abandoned()
                self._communicator = NcclHandle(bytes.fromhex(name), info.rank, len(info.members))
            self._poll("while the group was made", lambda: True, limit_s)
            # Two members connect when there is a first message between them.
            self._hello = torch.zeros(len(info.members), dtype=torch.uint8, device=self._device)
            sends, receives = ([(self._hello[rank : rank + 1], rank) for rank in ranks] for ranks in (receivers, senders))
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

    def hold(self, work: torch.cuda.Event) -> None:
        """This thread's current stream goes on after the event."""
        torch.cuda.current_stream(self._device).wait_event(work)

    def wait(self, work: torch.cuda.Event) -> None:
        """Until the event has happened. Raises GroupError."""
        late = next((where for event, where in self._under_way if not event.query()), "after its last step")
        self._poll(late, work.query, self._limit_s)

    def apart(self) -> contextlib.AbstractContextManager[object]:
        """A stream of its own is this thread's current one inside."""
        return torch.cuda.stream(self._apart)

    def _poll(self, where: str, has_ended: Callable[[], bool], limit_s: float) -> None:
        """Until NCCL has enqueued the last call, and ``has_ended``. Raises GroupError; any other call may end it."""
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
        """End all work on the device, in a thread of its own; ``kept`` lives until then. Idempotent, does not block."""
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
        """After ``abandon``: whether its work on the device has ended, within this time."""
        return self._gone.wait(limit_s)


def _addressed(messages: Sequence[_Message]) -> list[tuple[int, int, int]]:
    return [(memory.data_ptr(), memory.numel(), rank) for memory, rank in messages]


def _cumem() -> str:
    return os.environ.get(_CUMEM, "unset")


# NCCL's own functions: communicators that block nobody, messages on a stream, abort.

UNIQUE_ID_BYTES = 128
# Values of nccl.h; they are part of its binary interface.
_SUCCESS, _IN_PROGRESS, _UINT8 = 0, 7, 1
_CONFIG_MAGIC = 0xCAFEBEEF
_UNDEFINED = -(2**31)
# The first version whose communicators need not block. Its config is understood by every later one, which goes by its size.
_CONFIG_VERSION = 2 * 10000 + 17 * 100


class NcclError(RlsyncError):
    """NCCL refused a call, or says that a communicator is broken."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    """``ncclConfig_t`` as of version 2.17."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
    "ncclCommInitRankConfig": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int, ctypes.POINTER(_Config)),
    "ncclCommGetAsyncError": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)),
    "ncclCommAbort": (ctypes.c_void_p,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    "ncclRecv": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The one that torch has loaded, found by its name."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise ConfigError(f"the nccl transport needs NCCL, which comes with a CUDA build of torch: {error}") from error
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    for name in ("ncclGetErrorString", "ncclGetLastError"):
        getattr(library, name).argtypes = (ctypes.c_int if name == "ncclGetErrorString" else ctypes.c_void_p,)
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: object) -> None:
    code = getattr(_library(), name)(*arguments)
    if code not in (_SUCCESS, _IN_PROGRESS):
        raise NcclError(f"{name}: {_reason(code, None)}")


def _reason(code: int, communicator: ctypes.c_void_p | None) -> str:
    library = _library()
    words, last = library.ncclGetErrorString(code), library.ncclGetLastError(communicator)
    return ": ".join(text.decode(errors="replace").strip() for text in (words, last) if text)


def nccl_version() -> str:
    """Version of the NCCL library, as ``2.28.9``. Raises ConfigError where there is none."""
    number = ctypes.c_int(0)
    _call("ncclGetVersion", ctypes.byref(number))
    major, rest = divmod(number.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


def unique_id() -> bytes:
    """Names a communicator that is to be made; one member asks for it, all others are told."""
    made = _UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(made))
    return bytes(made)


class NcclHandle:
    """One member of an NCCL communicator on the calling thread's current device. Nothing here waits but ``abort``.

    Not thread-safe. Between calls that begin something ``in_progress`` must have become false.
    """

    def __init__(self, name: bytes, rank: int, world_size: int) -> None:
        """Begin to connect with the other members. Collective over them, though it returns at once. Raises NcclError."""
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0, _UNDEFINED, _UNDEFINED, _UNDEFINED, None)
        self._handle = ctypes.c_void_p()
        _call(
            "ncclCommInitRankConfig", ctypes.byref(self._handle), world_size, _UniqueId.from_buffer_copy(name), rank, ctypes.byref(config)
        )

    def in_progress(self) -> bool:
        """Whether the last call is not enqueued yet. Raises NcclError where the communicator is broken."""
        state = ctypes.c_int(_SUCCESS)
        _call("ncclCommGetAsyncError", self._handle, ctypes.byref(state))
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            raise NcclError(_reason(state.value, self._handle))
        return state.value == _IN_PROGRESS

    def begin(self, sends: list[tuple[int, int, int]], receives: list[tuple[int, int, int]], stream: int) -> None:
        """Begin to enqueue messages on ``stream`` (a handle) that travel together; each is (address, bytes, rank of the other end).

        Messages between two members match in the order in which they were begun. Raises NcclError.
        """
        _call("ncclGroupStart")
        try:
            for name, messages in (("ncclSend", sends), ("ncclRecv", receives)):
                for address, nbytes, rank in messages:
                    _call(name, address, nbytes, _UINT8, rank, self._handle, stream)
        finally:
            _call("ncclGroupEnd")

    def abort(self) -> None:
        """End whatever is under way, on the device too, and free the communicator. Waits for its kernels. Idempotent."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            _call("ncclCommAbort", handle)
