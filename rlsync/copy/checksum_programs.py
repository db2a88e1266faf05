"""Checksums of elements that are the same in every sync, and whose memory rarely moves: programs that compute them on CUDA are kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from rlsync.copy.addresses import MemoryRanges
from rlsync.copy.checksum import checksums
from rlsync.copy.cuda import CudaCopyProgram, strided
from rlsync.copy.tables import moves_of

# From the number of a round to the views whose checksums are computed in it, in an order that stays the same.
Views = Callable[[int], Sequence[torch.Tensor]]


@dataclass(slots=True)
class BoundProgram:
    """A copy program on CUDA, and the ranges of device memory that its sources lie in. Keeps none of that memory alive."""

    ranges: MemoryRanges
    program: CudaCopyProgram

    def follows(self, ranges: MemoryRanges) -> bool:
        """Let the program read the same tensors at their current ``ranges``. False where it cannot: bind another one then."""
        if self.ranges != ranges:
            moves = moves_of((old, nbytes, new) for (old, nbytes), (new, _) in zip(self.ranges, ranges, strict=True))
            if moves is None:
                return False
            self.program.move_sources(moves)
            self.ranges = ranges
        return True


class PendingChecksums:
    """Result of ``ChecksumPrograms.begin``, which the device may still be computing."""

    def __init__(self, parts: Sequence[CudaCopyProgram | Sequence[int]]) -> None:
        self._parts = parts

    def values(self) -> list[int]:
        """The checksum of each view, as unsigned 64-bit integers: by round, and in each in the order of its views. Waits for the device."""
        return [v for part in self._parts for v in (part.checksums() if isinstance(part, CudaCopyProgram) else part)]


class ChecksumPrograms:
    """Computes checksums of views in rounds: on CUDA by one launch a round, of a program that is bound once and follows memory that moves;
    elsewhere by ``rlsync.copy.checksum.checksums``. Keeps no memory alive.

    A key names views that belong together, such as those of a bucket, and a round of a key those that are verified in the same syncs.
    """

    def __init__(self) -> None:
        self._bound: dict[tuple[Hashable, int], BoundProgram] = {}

    def prepare(self, key: Hashable, rounds: Sequence[int], ranges: MemoryRanges, views: Views) -> None:
        """Bind the programs of these rounds now, so that the first ``begin`` does not. Arguments are those of ``begin``."""
        for number in rounds:
            self._program(key, number, ranges, views)

    def begin(self, key: Hashable, rounds: Sequence[int], ranges: MemoryRanges, views: Views) -> PendingChecksums:
        """Compute the checksums of some rounds. Not collective.

        On CUDA it is enqueued on the current stream, and nothing waits: later work of that stream may overwrite the views. The result holds
        until the next call for the same key.

        Args:
            key: with a round it stands for the same views in every call, wherever they lie.
            rounds: numbers that ``views`` takes.
            ranges: where the tensors lie that all views of this key are of; in the same order in every call.
            views: called for a round whose program has to be bound, and where there is no CUDA.
        """
        programs = [self._program(key, number, ranges, views) for number in rounds]
        for program in programs:
            if isinstance(program, CudaCopyProgram):
                program.run()
        return PendingChecksums([p if isinstance(p, CudaCopyProgram) else checksums(p) for p in programs])

    def _program(self, key: Hashable, number: int, ranges: MemoryRanges, views: Views) -> CudaCopyProgram | Sequence[torch.Tensor]:
        """On CUDA a program, elsewhere the views themselves."""
        known = self._bound.get((key, number))
        if known is not None and known.follows(ranges):
            return known.program
        made = views(number)
        if not made or not made[0].is_cuda:
            return made
        program = CudaCopyProgram([(None, strided(view)) for view in made], device=made[0].device, summed=True)
        self._bound[key, number] = BoundProgram(ranges, program)
        return program
