"""Strided regions of row-major memories, split into boxes of their shapes. Integers; knows no names and no framework.

A copy between two memories is a shape and, on each side, an offset and strides. Views change the dims of a region
(narrowed, transposed, flattened, unflattened), so that a region may run along parts of several dims of a memory's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from rlsync.layout.geometry import Box, collapse, contiguous_strides

# More boxes than this are taken for a region that has none: a transpose flattened to single elements.
MOST_REGIONS = 1 << 14
# Regions of up to so many parts are kept: layers and experts have the same ones, thousands of times.
_MOST_KEPT = 16


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a copy: ``offset`` and ``strides`` (elements) in a row-major memory of shape ``grid``."""

    grid: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    def is_inside(self, shape: Sequence[int]) -> bool:
        """Whether every element of a region of ``shape`` (not empty) lies in the memory."""
        last = self.offset + sum((n - 1) * s for n, s in zip(shape, self.strides, strict=True))
        return self.offset >= 0 and last < prod(self.grid) and min(self.strides, default=0) >= 0

    def dim_of(self, stride: int) -> int | None:
        """The dim of ``grid`` along which a step of ``stride`` goes to the next index, or None."""
        steps = contiguous_strides(self.grid)
        return next((d for d, (n, step) in enumerate(zip(self.grid, steps, strict=True)) if n > 1 and step == stride), None)

    @property
    def start(self) -> tuple[int, ...]:
        """Index of the first element."""
        index, rest = [], self.offset
        for step in contiguous_strides(self.grid):
            index.append(rest // step)
            rest %= step
        return tuple(index)


@dataclass(frozen=True, slots=True)
class StridedRegion:
    """A region that is a box of the shape of every side: each of its dims (none of size 1) runs along one dim of each."""

    shape: tuple[int, ...]
    sides: tuple[Side, ...]

    def axes(self, side: int) -> tuple[int, ...]:
        """For each dim of the part, the dim of that side's shape."""
        here = self.sides[side]
        return tuple(d for d in map(here.dim_of, here.strides) if d is not None)

    def box(self, side: int) -> Box:
        """The box it is in the coordinates of that side."""
        start = self.sides[side].start
        stop = [a + 1 for a in start]
        for axis, size in zip(self.axes(side), self.shape, strict=True):
            stop[axis] = start[axis] + size
        return Box(start, tuple(stop))


def split(shape: Sequence[int], sides: Sequence[Side], most: int = MOST_REGIONS) -> tuple[StridedRegion, ...] | None:
    """Parts that together are the region, each of its elements once, or None where that takes more than ``most`` parts.

    Every side must be inside its memory. An empty region has no parts.
    """
    known = _few_parts(tuple(shape), tuple(sides), min(most, _MOST_KEPT))
    return _split(shape, sides, most) if known is None and most > _MOST_KEPT else known


@lru_cache(maxsize=4096)
def _few_parts(shape: tuple[int, ...], sides: tuple[Side, ...], most: int) -> tuple[StridedRegion, ...] | None:
    return _split(shape, sides, most)


def _split(shape: Sequence[int], sides: Sequence[Side], most: int) -> tuple[StridedRegion, ...] | None:
    if not prod(shape):
        return ()
    order = sorted(range(len(shape)), key=lambda d: [-side.strides[d] for side in sides])
    dims, strides = collapse([shape[d] for d in order], *([side.strides[d] for d in order] for side in sides))
    waiting = [StridedRegion(dims, tuple(Side(side.grid, side.offset, steps) for side, steps in zip(sides, strides, strict=True)))]
    done: list[StridedRegion] = []
    while waiting:
        part = waiting.pop()
        pieces = _cut(part, most)
        if pieces is None:
            done.append(part)
        elif len(done) + len(waiting) + len(pieces) > most:
            return None
        else:
            waiting.extend(reversed(pieces))
    return tuple(done)


def _cut(part: StridedRegion, most: int) -> list[StridedRegion] | None:
    """Parts that are nearer to boxes, or None when this one is a box on every side."""
    for side in part.sides:
        start, runs = side.start, dict[int, int]()
        for dim, (size, stride) in enumerate(zip(part.shape, side.strides, strict=True)):
            axis = side.dim_of(stride)
            if axis is None:
                return _single(part, dim, most)
            if axis in runs:
                return _single(part, min(dim, runs[axis], key=part.shape.__getitem__), most)
            runs[axis] = dim
            room = side.grid[axis] - start[axis]
            if size > room and start[axis]:
                return [_range(part, dim, 0, room), _range(part, dim, room, size)]
            if size > room:
                whole = size // room * room
                rows = [_unflatten(_range(part, dim, 0, whole), dim, room)]
                return rows if whole == size else [*rows, _range(part, dim, whole, size)]
    return None


def _single(part: StridedRegion, dim: int, most: int) -> list[StridedRegion]:
    """One part for each index of a dim; at most one more than is allowed."""
    return [_drop(_range(part, dim, i, i + 1), dim) for i in range(min(part.shape[dim], most + 1))]


def _range(part: StridedRegion, dim: int, start: int, stop: int) -> StridedRegion:
    sides = (Side(s.grid, s.offset + start * s.strides[dim], s.strides) for s in part.sides)
    return StridedRegion((*part.shape[:dim], stop - start, *part.shape[dim + 1 :]), tuple(sides))


def _drop(part: StridedRegion, dim: int) -> StridedRegion:
    sides = (Side(s.grid, s.offset, (*s.strides[:dim], *s.strides[dim + 1 :])) for s in part.sides)
    return StridedRegion((*part.shape[:dim], *part.shape[dim + 1 :]), tuple(sides))


def _unflatten(part: StridedRegion, dim: int, inner: int) -> StridedRegion:
    rows = part.shape[dim] // inner
    split_dim = (rows, inner) if rows > 1 else (inner,)
    sides = []
    for s in part.sides:
        steps = (s.strides[dim] * inner, s.strides[dim]) if rows > 1 else (s.strides[dim],)
        sides.append(Side(s.grid, s.offset, (*s.strides[:dim], *steps, *s.strides[dim + 1 :])))
    return StridedRegion((*part.shape[:dim], *split_dim, *part.shape[dim + 1 :]), tuple(sides))
