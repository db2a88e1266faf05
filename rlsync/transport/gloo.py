"""Messages between actor ranks and the workers that share no memory with them: a gloo group, and the boxes at its two ends.

Owns the group, its store and the memory of messages. Knows parcels; knows no sync and starts no thread: what waits here is
called in a thread of the caller's own, with a limit, and another one may call ``abandon``.

The group is made of torch's ProcessGroupGloo directly, because the default group belongs to the trainer here and to vLLM there.
gloo can take back no send and no receive. A group in which one is left over is therefore given up as a whole, all its
connections closed, and the next one has a number of its own. Data travels only when both ends have asked for it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work

from rlsync.control.shares import GroupInfo, WorkerPart
from rlsync.copy.cpu import CopyProgram
from rlsync.errors import RlsyncError
from rlsync.transport.parcels import Parcel, bind_unpack, parcels_of

_POLL_S = 0.01
# A wait here ends before the deadline of the phase it is in, so that the error says whom it was for.
_PATIENCE = 0.75
# No message has this tag: buckets are counted from 0.
_NO_BUCKET = 2**31 - 1


class GroupError(RlsyncError, ConnectionError):
    """The group could not be made, or a member of it is gone or silent."""


class Rendezvous:
    """The store through which members find each other, on ``bind_host`` and no other address. Lives until it is dropped.

    Attributes:
        port: chosen by the system.
    """

    def __init__(self, bind_host: str, timeout_s: float) -> None:
        family = socket.getaddrinfo(bind_host, None)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((bind_host, 0))
        listener.listen(128)
        self.port: int = listener.getsockname()[1]
        # torch's own listener would be bound to every address.
        self._store = TCPStore(
            bind_host, self.port, None, True, _seconds(timeout_s), wait_for_workers=False, master_listen_fd=listener.detach()
        )


@dataclass(frozen=True, slots=True)
class Transfer:
    """A send or a receive that has begun, with member ``rank``."""

    work: Work
    rank: int
    bucket: int


class Group:
    """One group of all actor ranks and all workers that are not served through shared memory.

    Args:
        number: groups of one connection are counted; all members have to name the same.
        timeout_s: deadline of the phases; every wait here is shorter.
    """

    def __init__(self, info: GroupInfo, number: int, timeout_s: float) -> None:
        self.info, self.number = info, number
        self._limit_s = _PATIENCE * timeout_s
        self._abandoned = threading.Event()
        self._backend: ProcessGroupGloo | None = None

    def open(self) -> None:
        """Find all members and connect to each; returns when everybody is there. Collective over the members.

        Raises GroupError naming who is missing.
        """
        info = self.info
        with self._told("while the group was made"):
            store = TCPStore(info.host, info.port, None, False, _seconds(self._limit_s), wait_for_workers=False)
            room = PrefixStore(f"group-{self.number}", store)
            self._call_the_roll(room)
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname=address_towards(info.host, info.port), lazy_init=False)]
            options._timeout = _seconds(self._limit_s)
            # These threads run collectives, of which there are none.
            options._threads = 1
            self._backend = ProcessGroupGloo(PrefixStore("mesh", room), info.rank, len(info.members), options)
        if self._abandoned.is_set():
            self.abandon()
            raise GroupError("the gloo group was given up while it was made")

    def _call_the_roll(self, room: Store) -> None:
        """Connecting cannot be interrupted, so it begins when everybody is there."""
        deadline_s = time.monotonic() + self._limit_s
        keys = [str(rank) for rank in range(len(self.info.members))]
        room.set(keys[self.info.rank], torch.__version__)
        while not room.check(keys):
            if self._abandoned.wait(_POLL_S):
                raise GroupError("the gloo group was given up while it was made")
            if time.monotonic() > deadline_s:
                absent = [member for key, member in zip(keys, self.info.members, strict=True) if not room.check([key])]
                raise GroupError(f"{', '.join(absent)} did not come to the gloo group within {self._limit_s:g} s")
        versions = [room.get(key).decode().partition("+")[0] for key in keys]
        for member, version in zip(self.info.members, versions, strict=True):
            if version != versions[0]:
                raise GroupError(
                    f"{member} runs torch {version}, {self.info.members[0]} runs torch {versions[0]}; the messages of gloo are "
                    "those of one version: install the same torch on both"
                )

    def send(self, message: torch.Tensor, rank: int, bucket: int) -> Transfer:
        """Begin to send to member ``rank`` (contiguous CPU tensor, left as it is until the transfer has ended)."""
        return self._begin("send", message, rank, bucket)

    def receive(self, message: torch.Tensor, rank: int, bucket: int) -> Transfer:
        """Begin to receive from member ``rank``."""
        return self._begin("recv", message, rank, bucket)

    def _begin(self, method: str, message: torch.Tensor, rank: int, bucket: int) -> Transfer:
        assert self._backend is not None, "open() comes first"
        with self._told(f"with {self.info.members[rank]}, bucket {bucket}"):
            return Transfer(_start(self._backend, method, message, rank, bucket), rank, bucket)

    def wait(self, transfer: Transfer) -> None:
        """Until a transfer has ended. Raises GroupError; the group is closed then."""
        with self._told(f"with {self.info.members[transfer.rank]}, bucket {transfer.bucket}"):
            transfer.work.wait(_seconds(self._limit_s))

    def abandon(self) -> None:
        """Close all connections: no memory is written to any more, and who waits to receive, in any thread, is let go at once.

        Who waits for a send in full flow may wait until its time is over. Idempotent, does not block.
        """
        self._abandoned.set()
        backend = self._backend
        if backend is None:
            return
        # ProcessGroupGloo.abort() leaves a wait for one message alone, while a wait that times out closes every connection.
        nothing = _memory(1)
        for rank in range(len(self.info.members)):
            if rank != self.info.rank:
                with contextlib.suppress(RuntimeError):
                    _start(backend, "recv", nothing, rank, _NO_BUCKET).wait(timedelta(milliseconds=1))

    @contextlib.contextmanager
    def _told(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = "it was given up" if self._abandoned.is_set() else _sentence(str(error))
            raise GroupError(f"the gloo group broke {where}: {why}") from error


class Outbox:
    """An actor rank's end: memory for the messages of ``num_slots`` buckets, and the sends that have not ended.

    Args:
        parcels: by bucket; ``peer`` is the member that takes it.

    Attributes:
        number: of the group that it is in, or None.
    """

    def __init__(self, info: GroupInfo, parcels: Sequence[Sequence[Parcel]], num_slots: int, timeout_s: float) -> None:
        self._info, self._parcels, self._num_slots, self._timeout_s = info, parcels, num_slots, timeout_s
        slot_bytes = max(sum(p.nbytes for p in row) for row in parcels)
        self._slots = [_memory(slot_bytes) for _ in range(min(num_slots, len(parcels)))]
        self._sends: dict[int, list[Transfer]] = {}
        self._group: Group | None = None
        self.number: int | None = None

    def join(self, number: int) -> None:
        """Be in the group of this number; a former one is given up. Collective over the members."""
        self.abandon()
        group = self._group = Group(self._info, number, self._timeout_s)
        group.open()
        self.number = number

    def messages(self, bucket: int) -> list[tuple[Parcel, torch.Tensor]]:
        """The bucket's parcels and their memory, 1-D uint8; the same at every call."""
        parcels = self._parcels[bucket]
        return list(zip(parcels, _split(self._slots[bucket % self._num_slots], parcels), strict=True))

    def reclaim(self, bucket: int) -> None:
        """Until the bucket's slot may be written: the sends of what was in it have ended."""
        assert self._group is not None
        for transfer in self._sends.pop(bucket % self._num_slots, ()):
            self._group.wait(transfer)

    def post(self, bucket: int) -> None:
        """Begin to send the bucket's messages."""
        group = self._group
        assert group is not None
        self._sends[bucket % self._num_slots] = [group.send(message, p.peer, bucket) for p, message in self.messages(bucket)]

    def abandon(self) -> None:
        """Give the group up; nothing reads the messages any more. From any thread, idempotent, does not block."""
        if self._group is not None:
            self._group.abandon()
        self._group, self.number, self._sends = None, None, {}


class Inbox:
    """A worker's end: memory for its part of ``num_slots`` buckets. One group long: what comes after it has memory of its own.

    Attributes:
        nbytes: of that memory.
    """

    def __init__(self, group: Group, parts: Sequence[WorkerPart], num_slots: int) -> None:
        self.group = group
        self._parts, self._num_slots = parts, num_slots
        self._parcels = [parcels_of(part) for part in parts]
        packed_bytes = max(sum(p.nbytes for p in row) if len(row) > 1 else 0 for row in self._parcels)
        self._packed = _memory(packed_bytes)
        slot_bytes = max(part.nbytes for part in parts)
        self._slots = [_memory(slot_bytes) for _ in range(min(num_slots, len(parts)))]
        self._programs: dict[int, CopyProgram] = {}
        self.nbytes = packed_bytes + slot_bytes * len(self._slots)

    def receive(self, bucket: int) -> torch.Tensor:
        """This worker's part of a bucket (1-D uint8), when it is here; stays until the bucket ``num_slots`` later. Raises GroupError."""
        slot = self._slots[bucket % self._num_slots][: self._parts[bucket].nbytes]
        parcels = self._parcels[bucket]
        messages = [slot] if len(parcels) == 1 else _split(self._packed, parcels)
        transfers = [self.group.receive(m, p.peer, bucket) for p, m in zip(parcels, messages, strict=True)]
        for transfer in transfers:
            self.group.wait(transfer)
        if len(parcels) > 1:
            if bucket not in self._programs:
                self._programs[bucket] = bind_unpack(zip(parcels, messages, strict=True), slot)
            self._programs[bucket].run()
        return slot


def _memory(nbytes: int) -> torch.Tensor:
    """Of the host, whatever the process's default device. Zeros, because what lies between regions travels too."""
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


def _split(memory: torch.Tensor, parcels: Sequence[Parcel]) -> list[torch.Tensor]:
    """Memory of each parcel, one after another."""
    sizes = [p.nbytes for p in parcels]
    return list(memory[: sum(sizes)].split(sizes))


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which packets leave for ``host``; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _start(backend: ProcessGroupGloo, method: str, message: torch.Tensor, rank: int, tag: int) -> Work:
    """torch's stubs lack the methods of single messages."""
    return getattr(backend, method)([message], rank, tag)


def _sentence(text: str) -> str:
    """What gloo says, without the line of its source before it and the advice behind it."""
    return re.sub(r"^\[[^\]]*\] ", "", text.partition("\n")[0]).partition(". This is")[0]


def _seconds(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s)
