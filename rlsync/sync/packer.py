"""Packs an actor rank's regions into the memory of its senders, and computes the checksums of those that are verified."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rlsync.coordinator.messages import ActorAssignment, Sum
from rlsync.copy.addresses import BufferAddresses, memory_ranges
from rlsync.copy.checksum_programs import BoundProgram, ChecksumPrograms, Views
from rlsync.copy.cpu import CopyProgram, region
from rlsync.copy.cuda import CudaCopyProgram, strided
from rlsync.copy.tables import Move, moves_of
from rlsync.copy.transforms import transformed
from rlsync.errors import PlacementError
from rlsync.plan.packing import Region
from rlsync.plan.transforms import TRANSFORMS
from rlsync.plan.verification import num_rounds, round_of, rounds_in
from rlsync.sync.source import Declared
from rlsync.transport.ends import Sender


@dataclass(frozen=True, slots=True)
class Packed:
    """Result of packing one bucket: bytes copied, and checksums of the regions copied or exported; None where ``Packer.sum_up`` is to give
    them, because nothing was copied and readers may begin before."""

    nbytes: int
    sums: tuple[Sum, ...] | None


@dataclass(frozen=True, slots=True)
class _Round:
    """Regions that are verified together, with their destinations: those that arrive as they are, and those that are transformed."""

    same: list[tuple[int, Region]]
    transformed: list[tuple[int, Region]]


class _Program(Protocol):
    def run(self) -> int: ...


# The key of what is frozen among checksum programs, beside numbers of buckets.
_FROZEN = "frozen"

# Destination and source.
_Pair = tuple[torch.Tensor, torch.Tensor]


class _Transforming:
    """Regions of a transform that is a function of one region and is not fused into a copy: computed in each sync, and copied."""

    def __init__(self, regions: Sequence[tuple[torch.Tensor, Region]], compute: Callable[[Region], torch.Tensor]) -> None:
        self._destinations, self._regions = [view for view, _ in regions], [r for _, r in regions]
        self._nbytes, self._compute = sum(view.nbytes for view in self._destinations), compute

    def run(self) -> int:
        torch._foreach_copy_(self._destinations, [self._compute(r) for r in self._regions])
        return self._nbytes


class _Declared:
    """Regions of buffers that the source computes in each sync, copied to their destinations, and cast where dtypes differ. On CUDA by a
    program: an allocator gives a sync the memory that it gave the one before, more often than not."""

    def __init__(
        self, regions: Sequence[tuple[torch.Tensor, Region]], compute: Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
    ) -> None:
        self._destinations, self._regions, self._compute = [view for view, _ in regions], [r for _, r in regions], compute
        self._names = tuple(dict.fromkeys(r.source_buffer for r in self._regions))
        self._nbytes = sum(view.nbytes for view in self._destinations)
        self._bound: BoundProgram | None = None

    def run(self) -> int:
        computed = self._compute(self._names)
        if not self._destinations[0].is_cuda:
            torch._foreach_copy_(self._destinations, self._views(computed))
            return self._nbytes
        where = memory_ranges(computed[name] for name in self._names)
        if self._bound is None or not self._bound.follows(where):
            pairs = zip(self._destinations, map(strided, self._views(computed)), strict=True)
            self._bound = BoundProgram(where, CudaCopyProgram(pairs, device=self._destinations[0].device))
        return self._bound.program.run()

    def _views(self, computed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [_region_of(computed[r.source_buffer], r) for r in self._regions]


def _region_of(buffer: torch.Tensor, r: Region) -> torch.Tensor:
    return region(buffer, r.source_offset, r.shape, r.source_strides)


class Packer:
    """Packs buckets for all senders of this rank. Of regions that are read in place it only computes checksums.

    Copy programs are made once for each step of a sender, and follow parameters that move; memory of senders does not move.

    Args:
        addresses: of the buffers of this rank's placement.
        declared: transforms of its source.
    """

    def __init__(
        self,
        assignment: ActorAssignment,
        addresses: BufferAddresses,
        senders: Sequence[Sender],
        declared: Declared = Declared(),  # noqa: B008 (frozen, and empty)
    ) -> None:
        self._verify, self._addresses, self._buffers, self._senders = assignment.verify, addresses, addresses.buffers, senders
        self._declared = declared
        # What the source computed for the bucket that is packed, by buffer: its tensors go to several places, and are summed up.
        self._computed: dict[str, torch.Tensor] = {}
        self._num_frozen = assignment.num_frozen
        # By sender and step.
        self._programs: dict[tuple[int, int], tuple[_Program, ...]] = {}
        # Of regions that arrive as they are, and of those that are computed for each sync.
        self._sums, self._sums_of_made = ChecksumPrograms(), ChecksumPrograms()
        self._rounds = [self._by_round(bucket) for bucket in range(assignment.num_buckets)]
        # Of all frozen buckets, what arrives as it is.
        self._frozen = [given for rounds in self._rounds[: self._num_frozen] for given in (rounds[0].same if rounds else ())]
        self._shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in self._buffers.items()}
        addresses.refresh()
        # What programs read.
        self._ranges, self._generation = addresses.ranges, addresses.generation

    @property
    def num_frozen(self) -> int:
        """Buckets, the first ones, that hold what no actor rank trains."""
        return self._num_frozen

    def check(self) -> None:
        """Find the parameters' current addresses. Raises PlacementError where shapes, dtypes or memory have changed since connect."""
        if any(tensor.is_cuda for tensor in self._buffers.values()):
            # They may have been written on any stream of this process, and others read them.
            torch.cuda.synchronize()
        self._addresses.refresh()
        if self._addresses.generation == self._generation:
            return
        changed = [
            f"{name} is {tuple(t.shape)} {t.dtype}, was {tuple(self._shapes[name][0])} {self._shapes[name][1]}"
            for name, t in self._buffers.items()
            if (t.shape, t.dtype) != self._shapes[name] or t.untyped_storage().nbytes() == 0 < t.numel()
        ]
        if changed:
            raise PlacementError(
                f"{len(changed)} parameters have changed since connect(), or have no memory: {changed[0]}; onload them first"
            )
        ranges = self._addresses.ranges
        moves = moves_of((old, nbytes, new) for (old, nbytes), (new, _) in zip(self._ranges, ranges, strict=True))
        self._ranges, self._generation = ranges, self._addresses.generation
        self._follow(moves)

    def pack(self, bucket: int, turn: int) -> Packed:
        """Copy this rank's regions of a bucket to where senders want them; messages are on their way when it returns.

        Regions that are exported or were copied on a device are complete then, for other processes too.
        """
        nbytes = 0
        for index, sender in enumerate(self._senders):
            for step in sender.steps(bucket):
                programs = self._bound(index, step)
                with sender.sending(step):
                    nbytes += sum(program.run() for program in programs)
        return Packed(nbytes, self.sum_up(bucket, turn) if nbytes or not self._rounds[bucket] else None)

    def _bound(self, index: int, step: int) -> tuple[_Program, ...]:
        """The programs that write a step of a sender."""
        if (index, step) not in self._programs:
            fused: list[_Pair] = []
            declared: list[tuple[torch.Tensor, Region]] = []
            others: list[tuple[torch.Tensor, Region]] = []
            for r, destination in self._senders[index].views(step):
                if _is_declared(r):
                    declared.append((destination, r))
                elif r.transform and not TRANSFORMS[r.transform].is_fused:
                    others.append((destination, r))
                else:
                    fused.append((destination, self._view(r)))
            programs = list(_bind(fused))
            programs += [_Declared(declared, self._compute)] if declared else []
            programs += [_Transforming(others, self._transformed)] if others else []
            self._programs[index, step] = tuple(programs)
        return self._programs[index, step]

    def prepare(self) -> None:
        """Bind all programs, which the first syncs would otherwise do; not those of parameters that are offloaded now."""
        has_memory = all(t.untyped_storage().nbytes() > 0 or not t.numel() for t in self._buffers.values())
        for bucket, rounds in enumerate(self._rounds):
            self._sums.prepare(bucket, list(rounds), self._ranges, self._views(bucket))
        if self._frozen:
            self._sums.prepare(_FROZEN, [0], self._ranges, self._frozen_views)
        for bucket in range(len(self._rounds)):
            for index, sender in enumerate(self._senders if has_memory else ()):
                for step in sender.steps(bucket):
                    self._bound(index, step)

    def _follow(self, moves: Sequence[Move] | None) -> None:
        """Let programs read the parameters' current addresses. Programs that cannot follow are made anew at their next use."""
        for key, programs in list(self._programs.items()):
            # What is computed lies elsewhere.
            reading = [program for program in programs if not isinstance(program, _Declared)]
            if reading and (moves is None or not all(isinstance(program, CudaCopyProgram) for program in reading)):
                del self._programs[key]
                continue
            for program in reading:
                assert isinstance(program, CudaCopyProgram) and moves is not None
                program.move_sources(moves)

    def sum_up(self, bucket: int, turn: int) -> tuple[Sum, ...]:
        """Checksums of the regions of a bucket whose turn it is, as they arrive. Waits for the device."""
        # What is frozen is verified whole in every sync, whether it is sent or not.
        turn = 1 if bucket < self._num_frozen else turn
        rounds = [number for number in rounds_in(self._verify, turn) if number in self._rounds[bucket]]
        same = [given for number in rounds for given in self._rounds[bucket][number].same]
        values = self._sums.begin(bucket, rounds, self._ranges, self._views(bucket)).values()
        return (*_told(same, values), *self._sums_of_transformed(bucket, rounds))

    def sum_up_frozen(self) -> tuple[Sum, ...]:
        """Those of all frozen buckets, in a sync that sends none of them. Waits for the device."""
        values = self._sums.begin(_FROZEN, [0], self._ranges, self._frozen_views).values()
        made = [s for bucket in range(self._num_frozen) for s in self._sums_of_transformed(bucket, list(self._rounds[bucket]))]
        return (*_told(self._frozen, values), *made)

    def _sums_of_transformed(self, bucket: int, rounds: Sequence[int]) -> list[Sum]:
        """A bucket at a time: elements as they arrive take memory."""
        sums: list[Sum] = []
        for number in rounds:
            if not (made := self._rounds[bucket][number].transformed):
                continue
            arriving = self._arriving([r for _, r in made])
            # An allocator gives a sync the memory that it gave the one before, more often than not.
            sums += _told(made, self._sums_of_made.begin(bucket, [number], memory_ranges(arriving), _given(arriving)).values())
        self._computed.clear()
        return sums

    def _frozen_views(self, number: int) -> list[torch.Tensor]:
        return [self._view(r) for _, r in self._frozen]

    def _views(self, bucket: int) -> Views:
        return lambda number: [self._view(r) for _, r in self._rounds[bucket][number].same]

    def _by_round(self, bucket: int) -> dict[int, _Round]:
        """The regions of a bucket by the round in which they are verified."""
        rounds: dict[int, _Round] = defaultdict(lambda: _Round([], []))
        for sender in self._senders if num_rounds(self._verify) else ():
            for destination, r in sender.gives(bucket):
                # What is frozen is verified whole, and takes one launch for it.
                found = rounds[0 if bucket < self._num_frozen else round_of(self._verify, r.number)]
                (found.transformed if r.transform else found.same).append((destination, r))
        return dict(rounds)

    def _arriving(self, regions: Sequence[Region]) -> list[torch.Tensor]:
        """The elements of several regions as they arrive; casts of thousands are a few launches."""
        found = self._all_transformed(regions)
        casts: dict[torch.dtype, list[int]] = defaultdict(list)
        for index, (view, r) in enumerate(zip(found, regions, strict=True)):
            if view.dtype != (dtype := getattr(torch, r.dtype)):
                casts[dtype].append(index)
        for dtype, group in casts.items():
            views = [found[index] for index in group]
            made = torch.empty(sum(view.numel() for view in views), dtype=dtype, device=views[0].device)
            parts = [part.view(v.shape) for part, v in zip(made.split([v.numel() for v in views]), views, strict=True)]
            torch._foreach_copy_(parts, views)
            for index, part in zip(group, parts, strict=True):
                found[index] = part
        return found

    def _all_transformed(self, regions: Sequence[Region]) -> list[torch.Tensor]:
        """The elements of several regions; those of a transform that copies compute may be in the dtype that they are copied from."""
        self._compute([r.source_buffer for r in regions if _is_declared(r)])
        return [self._view(r) if _is_declared(r) or TRANSFORMS[r.transform].is_fused else self._transformed(r) for r in regions]

    def _transformed(self, r: Region) -> torch.Tensor:
        return transformed(self._view(r), r.transform, getattr(torch, r.dtype))

    def _view(self, r: Region) -> torch.Tensor:
        return _region_of((self._computed if _is_declared(r) else self._buffers)[r.source_buffer], r)

    def _compute(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """What the source declares of these buffers, computed once for a bucket."""
        missing = [name for name in dict.fromkeys(names) if name not in self._computed]
        if missing:
            assert self._declared.compute is not None, "what declares transforms computes them"
            self._computed.update(zip(missing, self._declared.compute(missing), strict=True))
        return self._computed


def _is_declared(r: Region) -> bool:
    return bool(r.transform) and TRANSFORMS[r.transform].is_declared


def _told(regions: Sequence[tuple[int, Region]], values: Sequence[int]) -> list[Sum]:
    """Checksums for the destinations of these regions."""
    return [Sum(destination, r.number, value) for (destination, r), value in zip(regions, values, strict=True)]


def _given(views: Sequence[torch.Tensor]) -> Views:
    return lambda number: views


def _bind(given: Iterable[_Pair]) -> tuple[_Program, ...]:
    """The programs that copy these pairs: in the host, and on the device that destinations are on."""
    pairs = list(given)
    in_host = [(d, s) for d, s in pairs if not d.is_cuda]
    # Sources by address: a tensor would keep memory alive that parameters have left.
    on_device = [(d, strided(s)) for d, s in pairs if d.is_cuda]
    programs: list[_Program] = [CopyProgram(in_host)] if in_host else []
    if on_device:
        programs.append(CudaCopyProgram(on_device, device=on_device[0][0].device))
    return tuple(programs)
