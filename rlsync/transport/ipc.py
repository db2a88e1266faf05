"""The transport ``ipc``: device memory of actor ranks that workers of their host map and read.

A sender exports its parameters where they lie, and a staging ring for what cannot or should not be read there; a receiver maps both and
copies from where it lies to where it belongs by one kernel launch a bucket. A worker reads parameters between ``Ready`` and ``Done``, and
nothing else keeps an optimizer from writing them meanwhile than that ``sync`` does not return before.

Owns what both ends say and do; ``cuda_memory`` exports and maps.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from rlsync.coordinator.messages import ActorHello, RankExport, Reports, WorkerAssignment, WorkerHello
from rlsync.copy.addresses import BufferAddresses
from rlsync.copy.cuda import CudaCopyProgram
from rlsync.copy.tables import Strided, moves_of
from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.plan.packing import PackedPart, Region, pack_message
from rlsync.plan.transports import Memory
from rlsync.transport.cuda_memory import Allocation, ExportableMemory, Mappings, Size, allocation_number, allocation_of, can_be_exported
from rlsync.transport.ends import (
    Buffers,
    EndArguments,
    GivenPart,
    Hosted,
    HostSettings,
    Routes,
    SenderContext,
    given_by,
    name_of,
    names_of,
    placed,
)


class ExportedBuffer(msgspec.Struct, frozen=True, array_like=True):
    """One buffer: its address in the owner's process, its bytes, and its dtype by torch's name without the prefix."""

    address: Size
    nbytes: Size
    dtype: str


class IpcExport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The export of an actor rank.

    Attributes:
        allocations: that contain the buffers and the staging ring.
        buffers: of its placement, those that may be read in place.
        stage: address of slot 0 of its staging ring, or 0 where it has none; slots follow each other every ``stage_bytes``.
        stable_memory: whether the buffers stay allocated between syncs. If not, readers unmap them before they say that they have loaded.
    """

    allocations: tuple[Allocation, ...] = ()
    buffers: dict[str, ExportedBuffer] = {}
    stage: Size = 0
    stage_bytes: Size = 0
    stable_memory: bool = True


class SenderEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of an actor rank's end, by bucket: regions that are read in place, and regions that it stages in a ring of slots of
    ``stage_bytes``, each part packed as a message."""

    num_slots: int
    in_place: tuple[tuple[GivenPart, ...], ...]
    staged: tuple[tuple[GivenPart, ...], ...]
    stage_bytes: int = 0


class ReceiverEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of a worker's end. ``staged``: by bucket, actor rank -> byte of a slot of its staging ring at which this worker's message
    begins."""

    staged: tuple[dict[int, int], ...]


def finding(reports: Reports, worker: WorkerHello) -> str | None:
    """Why a worker cannot read the actor's device memory, or None."""
    if worker.gpu_uuid is None:
        return f"{name_of(worker)} has no GPU"
    in_host = [actor for actor in reports.actors if actor.memory == "host"]
    if in_host:
        return f"the parameters of {names_of(in_host)} are in host memory"
    away = [actor for actor in reports.actors if _boot_id(actor) != _boot_id(worker)]
    if away:
        return f"{name_of(worker)} is not on the host of {names_of(away)}"
    same = [actor for actor in reports.actors if (actor.pid_domain, actor.pid) == (worker.pid_domain, worker.pid)]
    return f"{name_of(worker)} and {name_of(same[0])} are one process, which cannot map its own memory" if same else None


def _boot_id(hello: ActorHello | WorkerHello) -> str:
    """Id of the booted kernel, the first part of both domains."""
    return hello.pid_domain.partition(":")[0]


def host(routes: Routes, settings: HostSettings) -> None:
    """Nothing: every actor rank exports its own memory."""


def assign(routes: Routes, hosted: Hosted | None) -> EndArguments:
    """Arguments of the ends: for each actor rank the regions that it exports and stages; for each reader where its messages lie in the
    staging rings."""
    ranks, encode = range(len(routes.actors)), msgspec.msgpack.encode
    stages = [_stage(routes, row) for row in routes.parts]
    senders = []
    for rank in ranks:
        in_place = tuple(tuple(GivenPart(d, 0, mine) for d, mine in _read(routes, row, rank, staged=False)) for row in routes.parts)
        staged = tuple(
            tuple(GivenPart(d, offsets[d, rank], mine) for d, mine in _read(routes, row, rank, staged=True))
            for row, (offsets, _) in zip(routes.parts, stages, strict=True)
        )
        end = SenderEnd(routes.num_slots, in_place, staged, max(sizes[rank] for _, sizes in stages))
        senders.append(encode(end) if any(in_place) or any(staged) else b"")
    receivers = {
        d: encode(ReceiverEnd(tuple({rank: at for (reader, rank), at in offsets.items() if reader == d} for offsets, _ in stages)))
        for d in routes.destinations
    }
    imports = {d: tuple(sorted({r.source for row in routes.parts for r in row[d].regions})) for d in routes.destinations}
    return EndArguments(tuple(senders), receivers, imports)


def _read(routes: Routes, row: Sequence[PackedPart], rank: int, *, staged: bool) -> Iterator[tuple[int, tuple[Region, ...]]]:
    """Destinations and the regions that they read of an actor rank: in place, or from its staging ring."""
    for destination in routes.destinations:
        if ((destination, rank) in routes.staged) == staged and (mine := given_by(row[destination], rank)):
            yield destination, mine


def _stage(routes: Routes, row: Sequence[PackedPart]) -> tuple[dict[tuple[int, int], int], list[int]]:
    """How a bucket lies in the slots of staging rings: byte by destination and actor rank, and bytes by actor rank."""
    offsets, sizes = {}, [0] * len(routes.actors)
    for rank in range(len(routes.actors)):
        for destination, mine in _read(routes, row, rank, staged=True):
            offsets[destination, rank] = sizes[rank]
            sizes[rank] += pack_message(destination, mine).nbytes
    return offsets, sizes


def make_sender(end: bytes, context: SenderContext) -> IpcSender:
    assert context.device is not None, "a rank without a device exports nothing"
    decoded = msgspec.msgpack.decode(end, type=SenderEnd)
    return IpcSender(decoded, context.addresses, stable_memory=context.stable_memory, device=context.device, on_next=context.on_next)


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> IpcReceiver:
    return IpcReceiver(assignment, msgspec.msgpack.decode(assignment.end, type=ReceiverEnd), device)


def memory_of(buffers: Buffers, *, stable_memory: bool) -> Memory:
    """Where the buffers of an actor rank lie, and whether others can map it. A rank without any counts as stable.

    ``stable_memory`` is as for an IpcExporter.
    """
    kinds = {tensor.is_cuda for tensor in buffers.values()}
    if False in kinds:
        return "host"
    if not all(can_be_exported(t.data_ptr()) for t in buffers.values() if t.numel()):
        return "device"
    return "stable" if stable_memory or not buffers else "unstable"


class IpcSender:
    """An actor rank's end: exports its parameters, and stages in a ring the regions that are not read in place."""

    def __init__(
        self, end: SenderEnd, addresses: BufferAddresses, *, stable_memory: bool, device: torch.device, on_next: list[Callable[[], None]]
    ) -> None:
        self._end, self._device, self._on_next = end, device, on_next
        self._exporter = IpcExporter(end, addresses, stable_memory=stable_memory, device=device)
        self._has_joined = False

    def join(self, group: int) -> bytes | None:
        """Device memory knows no groups. Raises PlacementError for parameters in memory that cannot be exported."""
        export = self._exporter.renewed() if self._has_joined else self._exporter.export()
        self._has_joined = True
        return None if export is None else msgspec.msgpack.encode(export)

    def gives(self, bucket: int) -> Iterator[tuple[int, Region]]:
        return ((part.destination, r) for table in (self._end.in_place, self._end.staged) for part in table[bucket] for r in part.regions)

    def steps(self, bucket: int) -> range:
        return range(bucket, bucket + 1)

    def views(self, step: int) -> Iterator[tuple[Region, torch.Tensor]]:
        for part in self._end.staged[step]:
            message, slot = pack_message(part.destination, part.regions), self._exporter.slots[step % self._end.num_slots]
            for r, (at, strides) in zip(message.regions, message.places, strict=True):
                yield r, placed(slot, part.offset + at, r, strides)

    @contextlib.contextmanager
    def sending(self, step: int) -> Iterator[None]:
        """Readers of the ring are other processes, which know nothing of this one's streams."""
        yield
        if self._end.stage_bytes:
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """Let go of the parameters, and have the staging ring given back later: what CUDA does is undefined where memory is freed while
        others map it. They hold it as long as that, so that it costs nothing to keep it here."""
        ring = self._exporter.close()
        if ring is not None:
            self._on_next.append(ring.free)


class IpcExporter:
    """The exported memory of one actor rank: its parameters, and a staging ring that it owns.

    Args:
        end: names the buffers that are read in place, and the size of staging slots.
        addresses: of the buffers of this rank's placement.
        stable_memory: whether the buffers stay allocated between syncs.
        device: on which the buffers are, and the staging ring, where there is one.
    """

    def __init__(self, end: SenderEnd, addresses: BufferAddresses, *, stable_memory: bool, device: torch.device) -> None:
        names = dict.fromkeys(r.source_buffer for row in end.in_place for part in row for r in part.regions)
        self._buffer_addresses, self._buffers = addresses, {name: addresses.buffers[name] for name in names}
        self._stable_memory, self._device = stable_memory, device
        self._stage: ExportableMemory | None = None
        if end.stage_bytes:
            self._stage = ExportableMemory(end.num_slots * end.stage_bytes, device)
        self._stage_bytes = end.stage_bytes
        # What the last export says: of which generation of the buffers' addresses, and the addresses.
        self._generation = 0
        self._addresses: list[int] = []
        # By number of an allocation, an address in it.
        self._firsts: dict[int, int] = {}

    @property
    def slots(self) -> list[torch.Tensor]:
        """Slots of the staging ring, 1-D uint8 CUDA tensors; empty where there is no ring."""
        return [] if self._stage is None else list(self._stage.tensor.split(self._stage_bytes))

    def export(self) -> IpcExport:
        """The current export. Raises PlacementError for parameters in memory that cannot be exported."""
        gone = [name for name, t in self._buffers.items() if not t.is_cuda or t.untyped_storage().nbytes() == 0]
        if gone:
            raise PlacementError(
                f"{len(gone)} of {len(self._buffers)} parameters are not in device memory, among them {gone[0]}: onload them before sync()"
            )
        self._buffer_addresses.refresh()
        addresses = self._find()
        firsts = {allocation_number(address): address for address in addresses}
        unmappable = [address for address in firsts.values() if not can_be_exported(address)]
        if unmappable:
            # Staging is decided at connect, for all ranks: a parameter that was to be read in place cannot be staged later.
            name = next(name for name, address in zip(self._buffers, addresses, strict=True) if address == unmappable[0])
            raise PlacementError(
                f"parameter {name} has moved into memory that other processes cannot map (expandable segments, a memory saver); "
                "close() and connect() anew to read it through a staging ring, or set weight_sync.staging=always"
            )
        exported = [*firsts.values(), *([] if self._stage is None else [self._stage.address])]
        export = IpcExport(
            tuple(allocation_of(address, self._device) for address in exported),
            {
                name: ExportedBuffer(address, t.nbytes, str(t.dtype).removeprefix("torch."))
                for (name, t), address in zip(self._buffers.items(), addresses, strict=True)
            },
            0 if self._stage is None else self._stage.address,
            self._stage_bytes,
            self._stable_memory,
        )
        # Not before: what has raised is done again in the next sync.
        self._generation, self._addresses, self._firsts = self._buffer_addresses.generation, addresses, firsts
        return export

    def renewed(self) -> IpcExport | None:
        """The current export, or None where no memory has moved since the last one. Goes by the last refresh of the addresses.

        The generation of the memory is the addresses of the buffers, and the driver's numbers of the allocations that they are in:
        one that was freed and taken again at the same address has another number.
        """
        if self._buffer_addresses.generation != self._generation:
            if self._find() != self._addresses:
                return self.export()
            self._generation = self._buffer_addresses.generation
        same = all(allocation_number(address) == number for number, address in self._firsts.items())
        return None if same else self.export()

    def _find(self) -> list[int]:
        found = self._buffer_addresses.by_name()
        return [found[name][0] for name in self._buffers]

    def close(self) -> ExportableMemory | None:
        """Let go of everything. Returns the staging ring, which is the caller's to free when every reader has unmapped it. Idempotent."""
        ring, self._stage, self._buffers = self._stage, None, {}
        return ring


@dataclass(slots=True)
class _Bound:
    """Copies of one bucket and the addresses of the buffers that they write; and those buffers, where they are to be known again."""

    addresses: list[int]
    program: CudaCopyProgram
    buffers: Buffers | None = None


class IpcReceiver:
    """A bucket that is ready is copied from where it lies to where it belongs, by one launch on the worker's device.

    Copies are bound for the addresses of both sides, and bound anew where one has moved.
    """

    fd = None
    lands_ahead = False

    def __init__(self, assignment: WorkerAssignment, end: ReceiverEnd, device: torch.device) -> None:
        self._parts, self._num_slots, self._staged, self._device = assignment.parts, assignment.num_slots, end.staged, device
        self._exports: dict[int, IpcExport] = {}
        # By actor rank, the buffers that are read in place; and the ranks whose staging rings are read.
        self._names: dict[int, set[str]] = {rank: set() for rank in assignment.imports}
        self._rings = {rank for row in end.staged for rank in row}
        for part, staged in zip(assignment.parts, end.staged, strict=True):
            for r in part.regions:
                if r.source not in staged:
                    self._names[r.source].add(r.source_buffer)
        self._mappings = {rank: Mappings(device, f"actor rank {rank}") for rank in assignment.imports}
        self._is_open = False
        # By actor rank and buffer ("" is the staging ring), address here and bytes.
        self._where: dict[tuple[int, str], tuple[int, int]] = {}
        self._bound: dict[int, _Bound] = {}

    @property
    def extra_bytes(self) -> int:
        """Tables of the copies."""
        return sum(bound.program.table_bytes for bound in self._bound.values())

    def join(self, group: int) -> bool:
        return True

    def prepare(self, standing: Mapping[int, Buffers], exports: Sequence[RankExport]) -> None:
        self._hear(exports)
        for bucket, buffers in standing.items():
            self._open()
            self._bind(bucket, buffers).buffers = buffers
        self._let_go()

    @contextlib.contextmanager
    def receiving(self, standing: Mapping[int, Buffers], first: int = 0) -> Iterator[None]:
        yield
        self._let_go()

    def fetch(self, bucket: int, buckets_ready: int, exports: Sequence[RankExport]) -> IpcArrival:
        self._hear(exports)
        self._open()
        return IpcArrival(self, bucket)

    def _hear(self, exports: Sequence[RankExport]) -> None:
        """Store new exports of actor ranks."""
        heard = {told.actor_rank: msgspec.msgpack.decode(told.export, type=IpcExport) for told in exports}
        changed = {rank: export for rank, export in heard.items() if self._exports.get(rank) != export}
        if changed:
            self._exports.update(changed)
            self._is_open = False

    def land(self, bucket: int, buffers: Buffers) -> None:
        """Enqueue the copies of a bucket on the current stream."""
        self._bind(bucket, buffers).program.run()

    def _let_go(self) -> None:
        """Unmap memory that does not stay allocated; no copy is in flight."""
        for rank, export in self._exports.items():
            if not export.stable_memory and self._names[rank]:
                self._mappings[rank].open(self._needed(rank, export, rings_only=True))
                self._is_open = False

    def abandon(self) -> None:
        # Copies in flight read memory that would be unmapped.
        torch.cuda.current_stream(self._device).synchronize()
        self._let_go()

    def close(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        for mappings in self._mappings.values():
            mappings.close()
        self._is_open = False

    def _open(self) -> None:
        """Map exported memory, and let bound copies read it at its current addresses."""
        if self._is_open:
            return
        where: dict[tuple[int, str], tuple[int, int]] = {}
        for rank, mappings in self._mappings.items():
            if rank not in self._exports:
                raise ConfigError(f"actor rank {rank} has not said what it exports")
            export = self._exports[rank]
            mappings.open(self._needed(rank, export))
            exported = {name: export.buffers[name] for name in self._names[rank] if name in export.buffers}
            where.update(((rank, name), (mappings.here(x.address, x.nbytes), x.nbytes)) for name, x in exported.items())
            if rank in self._rings:
                nbytes = export.stage_bytes * self._num_slots
                where[rank, ""] = mappings.here(export.stage, nbytes), nbytes
        before, self._where, self._is_open = self._where, where, True
        moves = moves_of((*before[key], where[key][0]) for key in before.keys() & where.keys())
        if moves is None:
            self._bound.clear()
        elif moves:
            for bound in self._bound.values():
                bound.program.move_sources(moves)

    def _needed(self, rank: int, export: IpcExport, *, rings_only: bool = False) -> list[Allocation]:
        """The allocations of an export that this worker reads."""
        addresses = [export.stage] if rank in self._rings else []
        if not rings_only:
            addresses += [export.buffers[name].address for name in self._names[rank] if name in export.buffers]
        addresses.sort()
        first = [bisect_left(addresses, a.address) for a in export.allocations]
        return [a for a, i in zip(export.allocations, first, strict=True) if i < len(addresses) and addresses[i] < a.address + a.nbytes]

    def _bind(self, bucket: int, buffers: Buffers) -> _Bound:
        known = self._bound.get(bucket)
        if known is not None and known.buffers is buffers:
            return known
        addresses = [tensor.data_ptr() for tensor in buffers.values()]
        if known is not None and known.addresses == addresses:
            return known
        wholes = {name: _whole(tensor) for name, tensor in buffers.items()}
        pairs = [(wholes[r.buffer].region(r.buffer_offset, r.shape, r.buffer_strides), source) for r, source in self._sources(bucket)]
        bound = self._bound[bucket] = _Bound(addresses, CudaCopyProgram(pairs, device=self._device))
        return bound

    def _sources(self, bucket: int) -> list[tuple[Region, Strided]]:
        """The bucket's regions, and where this process can read them."""
        staged = self._staged[bucket]
        by_source: dict[int, list[Region]] = {}
        for r in self._parts[bucket].regions:
            by_source.setdefault(r.source, []).append(r)
        found: list[tuple[Region, Strided]] = []
        for rank, regions in by_source.items():
            found += self._in_stage(bucket, rank, regions, staged[rank]) if rank in staged else self._in_place(rank, regions)
        return found

    def _in_place(self, rank: int, regions: Sequence[Region]) -> list[tuple[Region, Strided]]:
        export = self._exports[rank]
        names = dict.fromkeys(r.source_buffer for r in regions)
        missing = [name for name in names if name not in export.buffers]
        if missing:
            raise ConfigError(f"actor rank {rank} does not export {missing[0]} ({len(missing)} of {len(names)} buffers are missing)")
        ends = dict.fromkeys(names, 0)
        for r in regions:
            last = r.source_offset + sum((n - 1) * s for n, s in zip(r.shape, r.source_strides, strict=True))
            ends[r.source_buffer] = max(ends[r.source_buffer], (last + 1) * DTYPE_BYTES[export.buffers[r.source_buffer].dtype])
        for name, end in ends.items():
            if end > export.buffers[name].nbytes:
                raise ConfigError(
                    f"actor rank {rank} exports {export.buffers[name].nbytes} bytes of {name}, and the plan reads {end} of them"
                )
        wholes = {name: Strided(self._where[rank, name][0], export.buffers[name].dtype, (), ()) for name in names}
        return [(r, wholes[r.source_buffer].region(r.source_offset, r.shape, r.source_strides)) for r in regions]

    def _in_stage(self, bucket: int, rank: int, regions: Sequence[Region], offset: int) -> list[tuple[Region, Strided]]:
        message = pack_message(rank, regions)
        begin = self._where[rank, ""][0] + (bucket % self._num_slots) * self._exports[rank].stage_bytes + offset
        return [(r, Strided(begin + at, r.dtype, r.shape, strides)) for r, (at, strides) in zip(regions, message.places, strict=True)]


@dataclass(frozen=True, slots=True)
class IpcArrival:
    """A bucket that lies in imported memory."""

    receiver: IpcReceiver
    bucket: int

    def land(self, buffers: Buffers) -> None:
        self.receiver.land(self.bucket, buffers)


def _whole(tensor: torch.Tensor) -> Strided:
    """A contiguous buffer, to take regions of."""
    assert tensor.is_contiguous(), "plans address contiguous buffers"
    return Strided(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), (), ())
