"""Checksums, sync after sync, of elements that mostly stay where they are. Owns the programs that sum them up on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch

from rlsync.copy.checksum import checksums
from rlsync.copy.cuda import CudaCopyProgram, strided


class Sums:
    """On CUDA one launch a call, bound once and again when memory has moved; elsewhere ``checksums``. Keeps no memory alive."""

    def __init__(self) -> None:
        self._bound: dict[Hashable, tuple[Sequence[int], CudaCopyProgram]] = {}

    def of(self, key: Hashable, places: Sequence[int], views: Callable[[], Sequence[torch.Tensor]]) -> list[int]:
        """Checksums of ``views()``, after everything that this thread's stream has been given. Waits for them. Not collective.

        Args:
            key: names what is summed up; same key, same views, but for where they lie.
            places: addresses of the memory that they lie in.
        """
        known = self._bound.get(key)
        if known is None or known[0] != places:
            made = views()
            if not made or not made[0].is_cuda:
                return checksums(made)
            known = places, CudaCopyProgram([(None, strided(view)) for view in made], device=made[0].device, summed=True)
            self._bound[key] = known
        known[1].run()
        return known[1].checksums()
