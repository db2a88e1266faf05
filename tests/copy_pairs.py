"""Random pairs of strided views, drawn as numbers, so that the same pairs can be laid over memory of any device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from rlsync.copy.tables import CASTS
from rlsync.layout.geometry import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Drawn:
    """A view of some memory; ``strides`` in elements."""

    byte_offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def over(self, memory: torch.Tensor) -> torch.Tensor:
        """The view of 1-D uint8 memory that begins at a multiple of 16 bytes."""
        dtype = getattr(torch, self.dtype)
        whole = memory[: len(memory) // 8 * 8].view(dtype)
        return whole.as_strided(self.shape, self.strides, whole.storage_offset() + self.byte_offset // dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Disjoint destinations in one memory, sources in another, and constants for further destinations; bytes each memory needs."""

    copies: tuple[tuple[Drawn, Drawn], ...]
    constants: tuple[tuple[Drawn, float], ...]
    taken_bytes: int
    given_bytes: int


class _Shelf:
    """Lays views into a memory, one behind the other, with gaps."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.nbytes = rng, 0

    def put(self, dtype: str, shape: Sequence[int], *, may_repeat: bool) -> Drawn:
        """A view with its dims in any order in memory, sometimes with gaps between them; repeated ones have stride 0."""
        rng, item = self.rng, DTYPE_BYTES[dtype]
        strides, step = [0] * len(shape), 1
        order = list(range(len(shape)))[::-1]
        if rng.random() < 0.4:
            rng.shuffle(order)
        for dim in order:
            if may_repeat and rng.random() < 0.05:
                continue
            strides[dim] = step
            step = step * max(1, shape[dim]) + (rng.choice((0, 0, 1, 8)) if rng.random() < 0.3 else 0)
        alignment = rng.choice((item, 16, 16, 64))
        begin = -(-(self.nbytes + rng.randrange(40)) // alignment) * alignment
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if prod(shape) else -1
        self.nbytes = begin + (last + 1) * item
        return Drawn(begin, dtype, tuple(shape), tuple(strides))


def draw_pairs(rng: random.Random, count: int, *, most_elements: int = 6000) -> Pairs:
    """``count`` copies and a few constants: any shapes (0-dim and empty too), strides, dtypes, casts and alignments."""
    giver, taker = _Shelf(rng), _Shelf(rng)
    copies, constants = [], []
    for _ in range(count):
        dtypes = rng.choice(CASTS) if rng.random() < 0.3 else (rng.choice(list(DTYPE_BYTES)),) * 2
        shape = _shape(rng, most_elements)
        copies.append((taker.put(dtypes[1], shape, may_repeat=False), giver.put(dtypes[0], shape, may_repeat=True)))
        if rng.random() < 0.15:
            constants.append(
                (taker.put(rng.choice(list(DTYPE_BYTES)), _shape(rng, most_elements), may_repeat=False), rng.choice((0.0, 1.0)))
            )
    return Pairs(tuple(copies), tuple(constants), taker.nbytes + 64, giver.nbytes + 64)


def give(pairs: Pairs, seed: int) -> torch.Tensor:
    """Random bytes for the sources, on CPU; booleans are 0 and 1, and what is cast holds infinities and subnormals but no NaN."""
    memory = torch.frombuffer(bytearray(random.Random(seed).randbytes(pairs.given_bytes)), dtype=torch.uint8)
    for taken, given in pairs.copies:
        view = given.over(memory)
        span = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)) + 1 if view.numel() else 0
        dense = view.as_strided((span,), (1,))
        if given.dtype == "bool":
            dense.view(torch.uint8).bitwise_and_(1)
        elif taken.dtype != given.dtype:
            dense.copy_(torch.where(dense.isnan(), torch.ones_like(dense), dense))
    return memory


def _shape(rng: random.Random, most_elements: int) -> tuple[int, ...]:
    shape: list[int] = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 6))):
        left = most_elements // max(1, prod(shape))
        shape.append(rng.choice((1, 2, 3, 8, 16, rng.randrange(1, 80), rng.randrange(1, most_elements), 0 if rng.random() < 0.1 else 4)))
        shape[-1] = min(shape[-1], left)
    rng.shuffle(shape)
    return tuple(shape)
