"""Checksums of the same elements in every sync, whose memory rarely moves. Owns the programs that compute them on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from rlsync.copy.checksum import checksums
from rlsync.copy.cuda import CudaCopyProgram, strided
from rlsync.copy.places import Place
from rlsync.copy.tables import moves_of

# Views of one round of those that belong to a key.
Views = Callable[[int], Sequence[torch.Tensor]]


@dataclass(slots=True)
class Bound:
    """A program, and the memory that its sources lie in, which it does not keep alive."""

    place: Place
    program: CudaCopyProgram

    def follows(self, place: Place) -> bool:
        """Whether the program reads the same pieces of memory where they are now; if not, it is to be made anew."""
        if self.place != place:
            moves = moves_of((old, nbytes, new) for (old, nbytes), (new, _) in zip(self.place, place, strict=True))
            if moves is None:
                return False
            self.program.move_sources(moves)
            self.place = place
        return True


class Begun:
    """Checksums that a device may still be computing."""

    def __init__(self, parts: Sequence[CudaCopyProgram | Sequence[int]]) -> None:
        self._parts = parts

    def values(self) -> list[int]:
        """All of them, one round after another. Waits for them."""
        return [v for part in self._parts for v in (part.checksums() if isinstance(part, CudaCopyProgram) else part)]


class Sums:
    """On CUDA one launch for each round, bound once and to follow memory that moves; elsewhere ``checksums``. Keeps no memory alive.

    A round of a key is a group of views that are summed up together.
    """

    def __init__(self) -> None:
        self._bound: dict[tuple[Hashable, int], Bound] = {}

    def prepare(self, key: Hashable, rounds: Sequence[int], place: Place, views: Views) -> None:
        """Bind the programs of these rounds, which the first ``begin`` would otherwise do."""
        for number in rounds:
            self._program(key, number, place, views)

    def begin(self, key: Hashable, rounds: Sequence[int], place: Place, views: Views) -> Begun:
        """Sum up the views of some rounds after everything that the current stream has been given. Not collective.

        On CUDA nothing waits here: what is enqueued on that stream behind it may overwrite the views, and the values are to be had
        until the next call for the same key.

        Args:
            key: same key and round, same views, but for where they lie.
            place: of the same pieces of memory for the same key.
        """
        programs = [self._program(key, number, place, views) for number in rounds]
        for program in programs:
            if isinstance(program, CudaCopyProgram):
                program.run()
        return Begun([p if isinstance(p, CudaCopyProgram) else checksums(p) for p in programs])

    def _program(self, key: Hashable, number: int, place: Place, views: Views) -> CudaCopyProgram | Sequence[torch.Tensor]:
        """On CUDA a program, elsewhere the views themselves."""
        known = self._bound.get((key, number))
        if known is not None and known.follows(place):
            return known.program
        made = views(number)
        if not made or not made[0].is_cuda:
            return made
        program = CudaCopyProgram([(None, strided(view)) for view in made], device=made[0].device, summed=True)
        self._bound[key, number] = Bound(place, program)
        return program
