"""What a transport is: a sender on each actor rank, a receiver in each worker that it serves, and what rank 0 does for both.

Owns these protocols and the way to a transport's module; knows no transport. A new one is a module with the functions of ``Transport`` and
a row of ``rlsync.plan.transports``.

In a sync rank 0 calls nothing here. Each actor rank calls ``Sender.join``, and then for each bucket and each of its steps writes the
``views`` inside ``sending``. Each worker calls ``Receiver.join``, and inside ``receiving`` for each bucket ``fetch`` and ``Arrival.land``.
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

# Tensors of a worker by buffer name: contiguous, and in checkpoint layout.
Buffers = Mapping[str, torch.Tensor]


class Sender(Protocol):
    """An actor rank's end: memory into which regions are packed, and how readers get it. All calls come from one thread."""

    def join(self, group: int) -> bytes | None:
        """Prepare for the next sync.

        Args:
            group: number of the group of processes whose messages belong to it. Of a transport with groups the call is collective over the
                members; others ignore it.

        Returns this rank's encoded export (memory that readers map) where it has changed since the last call, else None.
        """
        ...

    def gives(self, bucket: int) -> Iterable[tuple[int, Region]]:
        """What this rank gives of a bucket: (destination, region) pairs, including regions that are read in place."""
        ...

    def steps(self, bucket: int) -> range:
        """Numbers of the steps in which a bucket is sent. A step is packed and sent before the next one is packed."""
        ...

    def views(self, step: int) -> Iterable[tuple[Region, torch.Tensor]]:
        """Regions that this rank packs in a step, each with the view of this end's memory that takes it: the same memory at every call."""
        ...

    def sending(self, step: int) -> contextlib.AbstractContextManager[object]:
        """Around the writes to the views of a step. On exit they are readable, or on their way."""
        ...

    def close(self) -> None:
        """Leave for good. Idempotent."""
        ...


class Arrival(Protocol):
    """A worker's part of a bucket; readable until the next bucket is fetched."""

    def land(self, buffers: Buffers) -> None:
        """Copy every element to where it belongs. On CUDA the copies are enqueued on the current stream."""
        ...


class Receiver(Protocol):
    """A worker's end. No call blocks: None is for what is not there yet. Errors of the connection are ConnectionErrors."""

    @property
    def fd(self) -> int | None:
        """A descriptor that becomes readable when a call that gave None should be repeated; None where no call gives None."""
        ...

    @property
    def lands_ahead(self) -> bool:
        """Whether buckets arrive in the standing buffers by themselves, maybe before the coordinator says that they are ready."""
        ...

    @property
    def extra_bytes(self) -> int:
        """Bytes of memory that this end takes in the worker."""
        ...

    def join(self, group: int) -> bool | None:
        """Prepare for the next sync, as ``Sender.join``. True when this worker is in the group; None while it waits for other members."""
        ...

    def prepare(self, standing: Mapping[int, Buffers], exports: Sequence[RankExport]) -> None:
        """Bind copies before the first sync.

        Args:
            standing: bucket -> buffers that it lands in, for buckets whose buffers are the same in every sync.
            exports: of the actor ranks that this worker reads.
        """
        ...

    def receiving(self, standing: Mapping[int, Buffers], first: int = 0) -> contextlib.AbstractContextManager[object]:
        """Around the ``fetch`` calls of a sync; on exit nothing is in flight.

        Args:
            standing: as of ``prepare``. Where this end ``lands_ahead``, they may be written from now on, after what this thread has
                enqueued on the current stream.
            first: buckets before this one are not sent in this sync.
        """
        ...

    def fetch(self, bucket: int, buckets_ready: int, exports: Sequence[RankExport]) -> Arrival | None:
        """This worker's part of a bucket, or None while it is not there. Buckets are asked for in order, without those of which this worker
        takes nothing.

        Args:
            buckets_ready: buckets ``[0, buckets_ready)`` are readable; where this end ``lands_ahead``, any may be asked for.
            exports: of actor ranks, renewed since the last call.
        """
        ...

    def abandon(self) -> None:
        """After an error: from the return on, nothing writes to the worker's memory any more."""
        ...

    def close(self) -> None:
        """Leave for good. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Routes:
    """What one transport of a connection has to carry.

    Attributes:
        parts: what destinations take, by bucket and then by destination of the plan; those of other transports included.
        destinations: numbers of the destinations that this transport serves.
        actors: names of the actor ranks, by rank.
        workers: for each of ``destinations`` the name of its worker, or of the first where several share it.
        engines: for each of ``destinations`` the id of that worker's engine.
        num_slots: buckets or messages that may be under way at a time.
        num_steps: into how many steps the messages of a bucket are cut.
        staged: (destination, actor rank) pairs whose regions go through a staging ring in GPU memory of that rank.
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
class EndArguments:
    """What ``make_sender`` and ``make_receiver`` get of ``Transport.assign``, encoded as the transport likes.

    Attributes:
        actors: for each actor rank; empty for a rank that needs no sender.
        workers: by destination.
        imports: by destination the actor ranks whose exports its receiver reads.
    """

    actors: tuple[bytes, ...]
    workers: Mapping[int, bytes]
    imports: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What of ``SyncConfig`` a transport's ``host`` needs; fields are those of ``SyncConfig``."""

    bind_host: str
    num_slots: int
    timeout_s: float


class Hosted(Protocol):
    """A resource that rank 0 keeps open while a connection lasts."""

    def seal(self) -> None:
        """All peers are attached: nobody else may attach."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SenderContext:
    """What a sender gets of the actor rank that it runs in.

    Attributes:
        addresses: of the buffers of this rank's placement; refreshed before each call of ``join`` but the first.
        stable_memory: whether these buffers stay allocated between syncs.
        timeout_s: deadline of each phase.
        device: the GPU of this process, or None where it has touched none.
        hosted: on rank 0, what ``Transport.host`` returned.
        on_abandon: a sender whose calls may block appends a function that releases them. It is called after a failed sync, from any thread,
            maybe more than once, and must not block.
        on_next: a sender that is closed appends a function that frees memory which workers may still map. It is called when all workers
            have dialled in for the next connection: they have unmapped the former one's memory by then.
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
        """Why this transport cannot serve a worker, as a sentence for an error; None where it can."""
        ...

    def host(self, routes: Routes, settings: HostSettings) -> Hosted | None:
        """Rank 0: open what both ends attach to (a ring, a store); None where there is no such thing."""
        ...

    def assign(self, routes: Routes, hosted: Hosted | None) -> EndArguments:
        """Rank 0: the arguments of each end. Opens nothing."""
        ...

    def make_sender(self, end: bytes, context: SenderContext) -> Sender:
        """The end of this actor rank. ``end``: its arguments, of ``assign``."""
        ...

    def make_receiver(self, assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> Receiver:
        """The end of this worker, whose arguments, of ``assign``, are ``assignment.end``."""
        ...


def transport(name: str) -> Transport:
    """The transport of this name."""
    return cast(Transport, import_module(TRANSPORTS[name].module))


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> Receiver:
    """The receiver of the transport that an assignment names. ``timeout_s``: deadline of each phase. ``device``: of the worker."""
    return transport(assignment.transport).make_receiver(assignment, timeout_s, device)


@dataclass(frozen=True, slots=True)
class PackedArrival:
    """An ``Arrival`` in a slot: ``memory`` is 1-D uint8 on the CPU or the model's device, and ``segments`` say what is where in it."""

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
    """The regions of a part that one actor rank gives."""
    return tuple(r for r in part.regions if r.source == rank)


def name_of(hello: ActorHello | WorkerHello) -> str:
    """A peer, in words."""
    return str(Member(b"", hello))


def names_of(hellos: Sequence[ActorHello | WorkerHello]) -> str:
    """The first few of several peers, in words."""
    return first_few([name_of(hello) for hello in hellos])
