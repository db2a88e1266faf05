"""How an engine worker reads device memory that actor ranks of its host lend. Owns the mappings, and the copies that read them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rlsync.coordinator.assignments import Allocation, Loan, WorkerShare
from rlsync.coordinator.messages import Lender
from rlsync.copy.cuda import CudaCopyProgram
from rlsync.copy.tables import Strided, moves_of
from rlsync.errors import ConfigError
from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.plan.packing import Region
from rlsync.transport.cuda_ipc import Mappings
from rlsync.transport.parcels import make_parcel


@dataclass(slots=True)
class _Bound:
    """Copies of one bucket and the addresses of the buffers that they write; and those buffers, where they are to be known again."""

    places: list[int]
    program: CudaCopyProgram
    buffers: Mapping[str, torch.Tensor] | None = None


class LoanInlet:
    """A bucket that is ready is copied from where it lies to where it belongs, by one launch on the worker's device.

    Copies are bound for the addresses of both sides, and bound anew where one has moved.
    """

    fd = None
    lands_ahead = False

    def __init__(self, share: WorkerShare, device: torch.device) -> None:
        self._share, self._device = share, device
        self._loans: dict[int, Loan] = {}
        # Of each actor rank, the buffers that are read where they lie; and whose rings are read.
        self._names: dict[int, set[str]] = {rank: set() for rank in share.lenders}
        self._rings = {rank for row in share.staged for rank in row}
        for part, staged in zip(share.parts, share.staged, strict=True):
            for r in part.regions:
                if r.source not in staged:
                    self._names[r.source].add(r.source_buffer)
        self._mappings = {rank: Mappings(device, f"actor rank {rank}") for rank in share.lenders}
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

    def borrow(self, loans: Sequence[Lender]) -> None:
        changed = {loan.actor_rank: loan.loan for loan in loans if self._loans.get(loan.actor_rank) != loan.loan}
        if changed:
            self._loans.update(changed)
            self._is_open = False

    def prepare(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        self._open()
        self._bind(bucket, buffers).buffers = buffers

    def expect(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        pass

    def fetch(self, bucket: int, buckets_ready: int) -> LoanArrival:
        self._open()
        return LoanArrival(self, bucket)

    def land(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Enqueue the copies of a bucket on the current stream."""
        self._bind(bucket, buffers).program.run()

    def rest(self) -> None:
        for rank, loan in self._loans.items():
            if not loan.stays and self._names[rank]:
                self._mappings[rank].open(self._needed(rank, loan, rings_only=True))
                self._is_open = False

    def abandon(self) -> None:
        # What is in flight reads what would be unmapped.
        torch.cuda.current_stream(self._device).synchronize()
        self.rest()

    def close(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        for mappings in self._mappings.values():
            mappings.close()
        self._is_open = False

    def _open(self) -> None:
        """Map what is lent, and have the copies that are bound read it where it lies now."""
        if self._is_open:
            return
        where: dict[tuple[int, str], tuple[int, int]] = {}
        for rank, mappings in self._mappings.items():
            if rank not in self._loans:
                raise ConfigError(f"actor rank {rank} has not said what it lends")
            loan = self._loans[rank]
            mappings.open(self._needed(rank, loan))
            lent = {name: loan.buffers[name] for name in self._names[rank] if name in loan.buffers}
            where.update(((rank, name), (mappings.here(x.address, x.nbytes), x.nbytes)) for name, x in lent.items())
            if rank in self._rings:
                nbytes = loan.stage_bytes * self._share.num_slots
                where[rank, ""] = mappings.here(loan.stage, nbytes), nbytes
        before, self._where, self._is_open = self._where, where, True
        moves = moves_of((*before[key], where[key][0]) for key in before.keys() & where.keys())
        if moves is None:
            self._bound.clear()
        elif moves:
            for bound in self._bound.values():
                bound.program.move_sources(moves)

    def _needed(self, rank: int, loan: Loan, *, rings_only: bool = False) -> list[Allocation]:
        """Of what is lent, the allocations that this worker reads."""
        addresses = [loan.stage] if rank in self._rings else []
        if not rings_only:
            addresses += [loan.buffers[name].address for name in self._names[rank] if name in loan.buffers]
        addresses.sort()
        first = [bisect_left(addresses, a.address) for a in loan.allocations]
        return [a for a, i in zip(loan.allocations, first, strict=True) if i < len(addresses) and addresses[i] < a.address + a.nbytes]

    def _bind(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> _Bound:
        known = self._bound.get(bucket)
        if known is not None and known.buffers is buffers:
            return known
        places = [tensor.data_ptr() for tensor in buffers.values()]
        if known is not None and known.places == places:
            return known
        wholes = {name: _whole(tensor) for name, tensor in buffers.items()}
        pairs = [(wholes[r.buffer].region(r.buffer_offset, r.shape, r.buffer_strides), source) for r, source in self._sources(bucket)]
        bound = self._bound[bucket] = _Bound(places, CudaCopyProgram(pairs, device=self._device))
        return bound

    def _sources(self, bucket: int) -> list[tuple[Region, Strided]]:
        """The bucket's regions, and where this process can read them."""
        staged = self._share.staged[bucket]
        by_source: dict[int, list[Region]] = {}
        for r in self._share.parts[bucket].regions:
            by_source.setdefault(r.source, []).append(r)
        found: list[tuple[Region, Strided]] = []
        for rank, regions in by_source.items():
            found += self._in_stage(bucket, rank, regions, staged[rank]) if rank in staged else self._in_place(rank, regions)
        return found

    def _in_place(self, rank: int, regions: Sequence[Region]) -> list[tuple[Region, Strided]]:
        loan = self._loans[rank]
        names = dict.fromkeys(r.source_buffer for r in regions)
        missing = [name for name in names if name not in loan.buffers]
        if missing:
            raise ConfigError(f"actor rank {rank} does not lend {missing[0]} ({len(missing)} of {len(names)} buffers are missing)")
        ends = dict.fromkeys(names, 0)
        for r in regions:
            last = r.source_offset + sum((n - 1) * s for n, s in zip(r.shape, r.source_strides, strict=True))
            ends[r.source_buffer] = max(ends[r.source_buffer], (last + 1) * DTYPE_BYTES[loan.buffers[r.source_buffer].dtype])
        for name, end in ends.items():
            if end > loan.buffers[name].nbytes:
                raise ConfigError(f"actor rank {rank} lends {loan.buffers[name].nbytes} bytes of {name}, and the plan reads {end} of them")
        wholes = {name: Strided(self._where[rank, name][0], loan.buffers[name].dtype, (), ()) for name in names}
        return [(r, wholes[r.source_buffer].region(r.source_offset, r.shape, r.source_strides)) for r in regions]

    def _in_stage(self, bucket: int, rank: int, regions: Sequence[Region], offset: int) -> list[tuple[Region, Strided]]:
        parcel = make_parcel(rank, regions, 0)
        begin = self._where[rank, ""][0] + (bucket % self._share.num_slots) * self._loans[rank].stage_bytes + offset
        return [(r, Strided(begin + at, r.dtype, r.shape, strides)) for r, (at, strides) in zip(regions, parcel.places, strict=True)]


@dataclass(frozen=True, slots=True)
class LoanArrival:
    """A bucket that lies in lent memory."""

    inlet: LoanInlet
    bucket: int

    def land(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self.inlet.land(self.bucket, buffers)


def _whole(tensor: torch.Tensor) -> Strided:
    """A contiguous buffer, to take regions of."""
    assert tensor.is_contiguous(), "plans address contiguous buffers"
    return Strided(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), (), ())
