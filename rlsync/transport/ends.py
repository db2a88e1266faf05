"""What a transport is: a sender on each actor rank, a receiver in each worker that it serves, and what rank 0 does for both.

Owns the seam and the way to a transport's module; knows no transport. A new one is a module with the functions of ``Transport`` and
a row of ``rlsync.plan.transports``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import msgspec
import torch

from rlsync.coordinator.messages import ActorHello, RankExport, Reports, WorkerAssignment, WorkerHello
from rlsync.coordinator.roster import Member
from rlsync.copy.addresses import BufferAddresses
from rlsync.copy.cpu import CopyProgram, region
from rlsync.errors import first_few
from rlsync.plan.packing import PackedPart, Region, Segment
from rlsync.plan.transports import TRANSPORTS

# By name, contiguous and in checkpoint layout.
Buffers = Mapping[str, torch.Tensor]


class Sender(Protocol):
    """An actor rank's end: memory that takes regions, and what becomes of it. Called by one thread."""

    def join(self, group: int) -> bytes | None:
        """Take part in the next sync, whose messages travel in the group of this number; collective over its members.

        Returns this rank's export where it has changed since the last call.
        """
        ...

    def gives(self, bucket: int) -> Iterable[tuple[int, Region]]:
        """Destinations and regions that it gives of a bucket, those that are read in place included."""
        ...

    def steps(self, bucket: int) -> range:
        """The steps in which a bucket is sent; each is written inside ``sending`` before the next one."""
        ...

    def views(self, step: int) -> Iterable[tuple[Region, torch.Tensor]]:
        """Regions that this rank packs in a step, each with the view of this end's memory that takes it: the same memory at every call."""
        ...

    def sending(self, step: int) -> contextlib.AbstractContextManager[object]:
        """Inside, this thread may write the step's views; afterwards they are readable or in flight."""
        ...

    def close(self) -> None:
        """Leave for good. Idempotent."""
        ...


class Arrival(Protocol):
    """A worker's part of a bucket, readable until the next bucket is fetched."""

    def land(self, buffers: Buffers) -> None:
        """Copy every element to where it belongs. On CUDA the copies are enqueued on the current stream."""
        ...


class Receiver(Protocol):
    """A worker's end. No call blocks. Errors of the connection are ConnectionErrors."""

    @property
    def fd(self) -> int | None:
        """Readable when a call that gave None is worth repeating; None where no call does."""
        ...

    @property
    def lands_ahead(self) -> bool:
        """Whether buckets are put into standing buffers as they come, before ``Ready`` is heard of them."""
        ...

    @property
    def extra_bytes(self) -> int:
        """Bytes of memory that it takes in this process."""
        ...

    def join(self, group: int) -> bool | None:
        """Begin a sync whose messages travel in the group of this number. True when this worker is in it."""
        ...

    def prepare(self, standing: Mapping[int, Buffers], exports: Sequence[RankExport]) -> None:
        """Bind copies before the first sync. ``standing``: by bucket, the buffers that are the same in all syncs."""
        ...

    def receiving(self, standing: Mapping[int, Buffers], first: int = 0) -> contextlib.AbstractContextManager[object]:
        """Around the ``fetch`` calls of a sync, until nothing is in flight. Buckets before ``first`` are not sent in it.

        Where it ``lands_ahead``, the standing buffers may be written from now on, behind what this thread has enqueued so far.
        """
        ...

    def fetch(self, bucket: int, buckets_ready: int, exports: Sequence[RankExport]) -> Arrival | None:
        """This worker's part of a bucket when it is here; it stays until a later bucket is asked for.

        Buckets ``[0, buckets_ready)`` can be had, and any where it ``lands_ahead``; they are asked for in order, and not those of
        which this worker takes nothing. ``exports``: new exports of actor ranks.
        """
        ...

    def abandon(self) -> None:
        """After an error: nothing is written any more to what ``fetch`` gave."""
        ...

    def close(self) -> None:
        """Leave for good. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Routes:
    """The work of one transport of a connection.

    Attributes:
        parts: of all destinations, by bucket and destination.
        destinations: those that it serves.
        actors, workers: names of the actor ranks, and of the one worker of each destination (the first, where several share one).
        engines: of these workers.
        staged: (destination, actor rank) pairs that go through a staging ring of the rank.
    """

    parts: tuple[tuple[PackedPart, ...], ...]
    destinations: tuple[int, ...]
    actors: tuple[str, ...]
    workers: tuple[str, ...]
    engines: tuple[str, ...]
    num_slots: int
    num_steps: int = 1
    staged: frozenset[tuple[int, int]] = frozenset()


class GivenPart(msgspec.Struct, frozen=True, array_like=True):
    """The regions that an actor rank gives to a destination's part of one bucket, from byte ``offset`` of a slot on; 0 without slots."""

    destination: int
    offset: int
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Ends:
    """Arguments of senders by actor rank, and of receivers by destination, encoded. ``imports``: actor ranks that a destination reads.

    An actor rank that needs no sender has empty arguments.
    """

    actors: tuple[bytes, ...]
    workers: Mapping[int, bytes]
    imports: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Hosting:
    """Settings of a connection that rank 0 needs to open what peers attach to. ``timeout_s``: of the phases."""

    bind_host: str
    num_slots: int
    timeout_s: float


class Hosted(Protocol):
    """A resource that rank 0 keeps open while a connection lasts."""

    def seal(self) -> None:
        """Everybody is attached: nobody else may be."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Local:
    """What a sender needs of its process.

    Attributes:
        addresses: of the buffers of this rank's placement; refreshed before each call of ``join`` but the first.
        stable_memory: whether it stays allocated between syncs.
        device: the GPU of this process, or None where it has touched none.
        hosted: the resource that this process has opened for the transport, on rank 0.
        on_abandon: a sender whose calls may wait adds what releases them. It is called after a failed sync, from any thread, and must be
            idempotent and not block.
        on_next: a sender that is closed adds what gives back memory which workers may still map. It is called when all workers of the next
            connection are there, which have unmapped what they had by then.
    """

    addresses: BufferAddresses
    stable_memory: bool
    timeout_s: float
    device: torch.device | None
    hosted: Hosted | None
    on_abandon: list[Callable[[], None]]
    on_next: list[Callable[[], None]]


class Transport(Protocol):
    """The functions of a transport's module."""

    def finding(self, reports: Reports, worker: WorkerHello) -> str | None:
        """Why a worker cannot be served so, or None."""
        ...

    def host(self, routes: Routes, hosting: Hosting) -> Hosted | None:
        """Rank 0: open what both ends attach to, if anything."""
        ...

    def assign(self, routes: Routes, hosted: Hosted | None) -> Ends:
        """Rank 0: what each end has to do. Opens nothing."""
        ...

    def make_sender(self, end: bytes, local: Local) -> Sender: ...

    def make_receiver(self, assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> Receiver: ...


def transport(name: str) -> Transport:
    """The transport of this name."""
    return cast(Transport, import_module(TRANSPORTS[name].module))


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> Receiver:
    """The receiver that an assignment names. ``timeout_s``: of the phases. ``device``: of the worker."""
    return transport(assignment.transport).make_receiver(assignment, timeout_s, device)


@dataclass(frozen=True, slots=True)
class PackedArrival:
    """A part that lies in a slot (1-D uint8, CPU or the model's device) as its segments say."""

    memory: torch.Tensor
    segments: Sequence[Segment]

    def land(self, buffers: Buffers) -> None:
        """Copy every segment to where it belongs."""
        CopyProgram(
            (region(buffers[s.buffer], s.buffer_offset, s.shape, s.strides), segment_in(self.memory, s)) for s in self.segments
        ).run()


def segment_in(slot: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The view of a slot (1-D uint8) that holds a segment, in its shape and dtype."""
    dtype = getattr(torch, segment.dtype)
    return slot[segment.slot_offset : segment.slot_offset + segment.size * dtype.itemsize].view(dtype).view(segment.shape)


def placed(memory: torch.Tensor, offset: int, r: Region, strides: tuple[int, ...]) -> torch.Tensor:
    """The view of ``memory`` (1-D uint8) that holds a region from byte ``offset`` on."""
    dtype = getattr(torch, r.dtype)
    extent = (1 + sum((n - 1) * s for n, s in zip(r.shape, strides, strict=True))) * dtype.itemsize
    return memory[offset : offset + extent].view(dtype).as_strided(r.shape, strides)


def given_by(part: PackedPart, rank: int) -> tuple[Region, ...]:
    """Regions of a part that an actor rank gives."""
    return tuple(r for r in part.regions if r.source == rank)


def name_of(hello: ActorHello | WorkerHello) -> str:
    """A peer, in words."""
    return str(Member(b"", hello))


def names_of(hellos: Sequence[ActorHello | WorkerHello]) -> str:
    """The first few of several peers, in words."""
    return first_few([name_of(hello) for hello in hellos])
