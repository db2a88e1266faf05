"""The transport ``shm``: a ring of slots in host shared memory, which senders fill and receivers read. Owns the file under /dev/shm.

The creator unlinks the file as soon as every peer has attached: the memory then lives exactly as long as a process maps
it, so that no crash, not even kill -9, leaves a segment behind. ``multiprocessing.shared_memory`` is not used because
its resource tracker unlinks segments of other processes at exit (python/cpython#82300).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec
import torch

from rlsync.coordinator.messages import ActorHello, RankExport, Reports, WorkerAssignment, WorkerHello
from rlsync.errors import ConfigError
from rlsync.plan.packing import PackedPart, Region, side_by_side
from rlsync.transport.ends import (
    Buffers,
    EndArguments,
    GivenPart,
    Hosted,
    HostSettings,
    PackedArrival,
    Routes,
    SenderContext,
    given_by,
    names_of,
    placed,
)

SHM_DIR = Path("/dev/shm")
HEADER_BYTES = mmap.PAGESIZE
_PREFIX = "rlsync-ring-"
_MAGIC = b"rlsync-ring-1\n"


class Ring:
    """``num_slots`` slots of ``slot_bytes`` bytes, mapped into this process as 1-D uint8 CPU tensors.

    Attributes:
        path: file under /dev/shm; gone after ``seal``, while the mapping stays.
        token: secret written to the header; ``attach`` compares it, so that a stale file of that name is not taken.
    """

    def __init__(self, path: Path, token: str, num_slots: int, slot_bytes: int, memory: mmap.mmap) -> None:
        self.path, self.token, self.num_slots, self.slot_bytes = path, token, num_slots, slot_bytes
        self._memory: mmap.mmap | None = memory
        self._lock_fd: int | None = None

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int, *, directory: Path = SHM_DIR) -> Ring:
        """Allocate the memory of a new ring at once. ``slot_bytes`` is rounded up to whole pages.

        Raises ConfigError, naming the free and the needed bytes, where the file system has no room.
        """
        _sweep(directory)
        slot_bytes = -(-max(slot_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        size, token = HEADER_BYTES + num_slots * slot_bytes, secrets.token_hex(16)
        path, fd = _create_locked(directory)
        try:
            # Without this, a full /dev/shm shows as SIGBUS at the first write to a page.
            os.posix_fallocate(fd, 0, size)
            memory = mmap.mmap(fd, size)
        except OSError as error:
            os.unlink(path)
            os.close(fd)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
            raise ConfigError(
                f"shared memory: {directory} has {free} bytes free, the ring needs {size} ({num_slots} slots of {slot_bytes}); "
                "give it more room (docker: --shm-size), or lower weight_sync.bucket_bytes or weight_sync.num_slots"
            ) from error
        memory[: len(_MAGIC) + len(token)] = _MAGIC + token.encode()
        ring = cls(path, token, num_slots, slot_bytes, memory)
        ring._lock_fd = fd
        return ring

    @classmethod
    def attach(cls, path: str | Path, token: str, num_slots: int, slot_bytes: int) -> Ring:
        """Map a ring that another process of this host created. Raises ConfigError where it is not that ring."""
        size = HEADER_BYTES + num_slots * slot_bytes
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise ConfigError(
                f"shared memory: cannot open the ring {path} on {socket.gethostname()} ({error.strerror}); the shm transport needs "
                "actor and engine on one host, with one /dev/shm between their containers and one user"
            ) from error
        try:
            found = os.fstat(fd).st_size
            if found != size:
                raise ConfigError(f"shared memory: {path} has {found} bytes, the ring was announced with {size}")
            memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        expected = _MAGIC + token.encode()
        if memory[: len(expected)] != expected:
            raise ConfigError(f"shared memory: {path} is not the ring of this run")
        return cls(Path(path), token, num_slots, slot_bytes, memory)

    def slot(self, index: int) -> torch.Tensor:
        """Slot ``index`` as a writable uint8 tensor of ``slot_bytes``; its address is the same at every call."""
        return self.tensor(index, 0, (self.slot_bytes,), torch.uint8)

    def tensor(self, index: int, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A typed view of a part of slot ``index``. Every call makes a storage object of its own over the same memory."""
        assert 0 <= index < self.num_slots, f"slot {index} of {self.num_slots}"
        assert self._memory is not None, "the ring is closed"
        count = 1
        for size in shape:
            count *= size
        assert offset_bytes + count * dtype.itemsize <= self.slot_bytes, "outside the slot"
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        start = HEADER_BYTES + index * self.slot_bytes + offset_bytes
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)

    def seal(self) -> None:
        """Remove the name; the memory is freed when the last process unmaps it. Only the creator's call does anything."""
        if self._lock_fd is not None:
            os.unlink(self.path)
            os.close(self._lock_fd)
            self._lock_fd = None

    def close(self) -> None:
        """Give up this process's mapping, at once or with the last tensor that looks into it."""
        self.seal()
        # Not memory.close(): tensors refer to the mapping without locking it, and would be left pointing nowhere.
        self._memory = None


def _create_locked(directory: Path) -> tuple[Path, int]:
    """A new empty file, locked until ``seal`` or the end of this process; who can lock such a file knows it is an orphan.

    It gets the name that is swept only when it is locked.
    """
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
    hidden, path = directory / f".{name}", directory / name
    fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.rename(hidden, path)
    return path, fd


def _sweep(directory: Path) -> None:
    """Remove rings of this user whose creator was killed between ``create`` and ``seal``."""
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def shm_domain(directory: Path = SHM_DIR) -> str:
    """Equal in two processes exactly when they see the same /dev/shm: the booted kernel and its device number there."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat(directory).st_dev}"


class RingInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ring of slots to map: ``num_slots`` times ``slot_bytes`` behind the file ``path``, which carries ``token``."""

    path: str
    token: str
    num_slots: int
    slot_bytes: int


class SenderEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of an actor rank's end. ``parts``: by bucket what it packs, each part from a byte of the slot on."""

    ring: RingInfo
    parts: tuple[tuple[GivenPart, ...], ...]


class ReceiverEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of a worker's end. ``offsets``: by bucket, the byte of the slot at which its part begins."""

    ring: RingInfo
    offsets: tuple[int, ...]


def finding(reports: Reports, worker: WorkerHello) -> str | None:
    """Why a worker does not see the ring, or None."""
    home = reports.actors[0]
    peers: tuple[ActorHello | WorkerHello, ...] = (*reports.actors, worker)
    strangers = [peer for peer in peers if peer.shm_domain != home.shm_domain]
    if not strangers:
        return None
    return (
        f"{names_of(strangers)} does not share /dev/shm with actor rank 0 on {home.host}; the shm "
        "transport needs actor and engine on one host (and one /dev/shm where they run in containers); "
        "weight_sync.transport: auto serves such workers by gloo"
    )


def slot_bytes(routes: Routes) -> int:
    """Bytes of the largest bucket with all its parts in the ring."""
    return max(_offsets(routes, row)[-1] for row in routes.parts)


def _offsets(routes: Routes, row: Sequence[PackedPart]) -> tuple[int, ...]:
    """Byte at which each destination's part begins in the slot, and the end; parts that do not go there take no room."""
    return side_by_side(part.nbytes if destination in routes.destinations else 0 for destination, part in enumerate(row))


def host(routes: Routes, settings: HostSettings) -> Ring:
    """Rank 0: the ring."""
    return Ring.create(settings.num_slots, slot_bytes(routes))


def assign(routes: Routes, hosted: Hosted | None) -> EndArguments:
    """Who puts what into the ring, and who takes what out of it."""
    ring = cast(Ring, hosted)
    info = RingInfo(str(ring.path), ring.token, ring.num_slots, ring.slot_bytes)
    offsets = [_offsets(routes, row) for row in routes.parts]
    rows = list(zip(routes.parts, offsets, strict=True))

    def given(row: Sequence[PackedPart], at: Sequence[int], rank: int) -> tuple[GivenPart, ...]:
        mine = ((destination, given_by(row[destination], rank)) for destination in routes.destinations)
        return tuple(GivenPart(destination, at[destination], regions) for destination, regions in mine if regions)

    encode = msgspec.msgpack.encode
    senders = tuple(encode(SenderEnd(info, tuple(given(row, at, rank) for row, at in rows))) for rank in range(len(routes.actors)))
    receivers = {d: encode(ReceiverEnd(info, tuple(at[d] for at in offsets))) for d in routes.destinations}
    return EndArguments(senders, receivers, {})


def make_sender(end: bytes, context: SenderContext) -> RingSender:
    """``context.hosted`` is the ring, in the process that has made it."""
    return RingSender(msgspec.msgpack.decode(end, type=SenderEnd), cast("Ring | None", context.hosted))


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> RingReceiver:
    return RingReceiver(assignment, msgspec.msgpack.decode(assignment.end, type=ReceiverEnd))


class RingSender:
    """Puts regions into the ring, where they are readable when the coordinator says so."""

    def __init__(self, end: SenderEnd, ring: Ring | None = None) -> None:
        self._parts = end.parts
        self._ring = Ring.attach(end.ring.path, end.ring.token, end.ring.num_slots, end.ring.slot_bytes) if ring is None else ring

    def slots(self) -> list[torch.Tensor]:
        """All slots of the ring, 1-D uint8 on the CPU."""
        return [self._ring.slot(i) for i in range(self._ring.num_slots)]

    def join(self, group: int) -> None:
        """Shared memory knows no groups."""

    def gives(self, bucket: int) -> Iterator[tuple[int, Region]]:
        return ((part.destination, r) for part in self._parts[bucket] for r in part.regions)

    def steps(self, bucket: int) -> range:
        return range(bucket, bucket + 1)

    def views(self, step: int) -> Iterator[tuple[Region, torch.Tensor]]:
        slot = self._ring.slot(step % self._ring.num_slots)
        return ((r, placed(slot, part.offset + r.slot_offset, r, r.slot_strides)) for part in self._parts[step] for r in part.regions)

    def sending(self, step: int) -> contextlib.AbstractContextManager[object]:
        """What a processor has written can be read at once."""
        return contextlib.nullcontext()

    def close(self) -> None:
        self._ring.close()


class RingReceiver:
    """Reads a bucket where it lies in the ring, as soon as it is ready."""

    fd = None
    lands_ahead = False
    extra_bytes = 0

    def __init__(self, assignment: WorkerAssignment, end: ReceiverEnd) -> None:
        self._parts, self._end = assignment.parts, end
        self._ring: Ring | None = None

    def join(self, group: int) -> bool:
        """Map the ring, the first time. Shared memory knows no groups."""
        if self._ring is None:
            ring = self._end.ring
            self._ring = Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)
        return True

    def prepare(self, standing: Mapping[int, Buffers], exports: Sequence[RankExport]) -> None:
        """Nothing is bound: views cost little."""

    def receiving(self, standing: Mapping[int, Buffers], first: int = 0) -> contextlib.AbstractContextManager[object]:
        """The ring stays mapped."""
        return contextlib.nullcontext()

    def fetch(self, bucket: int, buckets_ready: int, exports: Sequence[RankExport]) -> PackedArrival:
        assert self._ring is not None, "join() comes first"
        part, offset = self._parts[bucket], self._end.offsets[bucket]
        return PackedArrival(self._ring.slot(bucket % self._ring.num_slots)[offset : offset + part.nbytes], part.segments)

    def abandon(self) -> None:
        """Nothing is written by this end but what a sink has asked for."""

    def close(self) -> None:
        if self._ring is not None:
            self._ring.close()
