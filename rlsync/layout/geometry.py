"""Boxes of Hugging Face tensors and the pieces of memory that hold them. Integers and names; knows no framework.

Coordinates: a *box* is a half-open range per dim of one HF tensor. A *piece* says where the elements of a box lie in
a holder's memory: HF element ``h`` lies at ``offset + sum((h[d] - box.start[d]) * strides[d])`` elements of ``buffer``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import ge, le, mul, sub


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open ranges ``[start[d], stop[d])`` per dim. A 0-dim tensor has one box with no dims and one element."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(map(sub, self.stop, self.start))

    def contains(self, other: Box) -> bool:
        return all(map(le, self.start, other.start)) and all(map(ge, self.stop, other.stop))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None when there is no common element. Boxes have equally many dims."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(map(ge, start, stop)):
            return None
        return self if start == self.start and stop == self.stop else Box(start, stop)

    def subtract(self, other: Box) -> tuple[Box, ...]:
        """Disjoint boxes that cover this box without ``other``; at most two per dim."""
        common = self.intersect(other)
        if common is None:
            return (self,)
        rest, start, stop = [], list(self.start), list(self.stop)
        for dim in range(len(start)):
            if start[dim] < common.start[dim]:
                rest.append(Box(tuple(start), (*stop[:dim], common.start[dim], *stop[dim + 1 :])))
                start[dim] = common.start[dim]
            if common.stop[dim] < stop[dim]:
                rest.append(Box((*start[:dim], common.stop[dim], *start[dim + 1 :]), tuple(stop)))
                stop[dim] = common.stop[dim]
        return tuple(rest)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Neutral description of one HF tensor. ``dtype`` is torch's name without the prefix, as ``"bfloat16"``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * DTYPE_BYTES[self.dtype]


DTYPE_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
# Dtypes between which a copy may cast.
FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the elements of one box of one HF tensor lie in a buffer of its holder.

    ``buffer`` names a parameter, file or bucket of the holder; ``offset`` and ``strides`` count elements of that buffer.
    """

    tensor: str
    box: Box
    buffer: str
    offset: int
    strides: tuple[int, ...]

    def offset_of(self, box: Box) -> int:
        """Offset of the first element of a box that lies inside this piece's box."""
        if box is self.box:
            return self.offset
        assert self.box.contains(box), f"{self.tensor}: {box} is not inside {self.box}"
        return self.offset + sum(map(mul, map(sub, box.start, self.box.start), self.strides))


@dataclass(frozen=True, slots=True)
class Padding:
    """A box of a holder's buffer that no HF element fills: ``value`` is written there (vocabulary padding)."""

    buffer: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """One addressable memory of a holder: ``size`` elements of ``dtype``, and the shape its owner gives it.

    ``has_gaps``: its holder uses the elements of its pieces and padding only, and the others may be anything.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    has_gaps: bool = False

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a holder's memory lies: its host, and the device there (a GPU's UUID) or None for host memory."""

    host: str
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Everything one holder has: its buffers, the HF boxes in them, and the places that no HF element fills.

    ``holder`` identifies it in errors and digests, as ``"actor 3"`` or ``"file model-00001-of-00002.safetensors"``.
    ``location`` is None where nobody asked for it; such a holder is equally far from all others.
    """

    holder: str
    buffers: tuple[BufferSpec, ...]
    pieces: tuple[Piece, ...]
    padding: tuple[Padding, ...] = ()
    location: Location | None = None


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merge neighbouring dims that are contiguous under every given set of strides, and drop dims of size 1.

    Returns the shorter shape and the matching strides. The element order is unchanged.
    """
    return _collapsed(tuple(shape), tuple(map(tuple, strides)))


# The layers of a model ask for the same few thousands of times.
@lru_cache(maxsize=4096)
def _collapsed(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    dims: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        here = [s[d] for s in strides]
        if dims and all(step[-1] == size * h for step, h in zip(steps, here, strict=True)):
            dims[-1] *= size
            for step, h in zip(steps, here, strict=True):
                step[-1] = h
        else:
            dims.append(size)
            for step, h in zip(steps, here, strict=True):
                step.append(h)
    return tuple(dims), tuple(tuple(s) for s in steps)


def cover(wanted: Box, candidates: Sequence[tuple[Box, int]]) -> tuple[list[tuple[Box, int]], list[Box]]:
    """Cover a box by candidates in order of preference, each element once.

    Returns the boxes taken with the index the candidate came with, and the boxes that nobody covers.
    """
    rest, taken = [wanted], []
    for box, index in candidates:
        if not rest:
            break
        left: list[Box] = []
        for part in rest:
            common = part.intersect(box)
            if common is None:
                left.append(part)
                continue
            taken.append((common, index))
            left.extend(part.subtract(common))
        rest = left
    return taken, rest


def box_in_buffer(buffer: BufferSpec, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Box | None:
    """The box that a strided region is in the coordinates of its buffer's shape, or None when it is no box of it.

    Dims of the region may come in any order (a transposed piece is a box too) and be fewer than the buffer's.
    """
    steps = contiguous_strides(buffer.shape)
    start, rest = [], offset
    for step, size in zip(steps, buffer.shape, strict=True):
        start.append(min(rest // step, size - 1) if step else 0)
        rest -= start[-1] * step
    extent = [1] * len(steps)
    for size, stride in zip(shape, strides, strict=True):
        # Dims of size 1 share a stride with their neighbour; the larger dim is the one that can move.
        dims = [d for d, step in enumerate(steps) if step == stride and extent[d] == 1 and start[d] + size <= buffer.shape[d]]
        if size == 1:
            continue
        if not dims:
            return None
        extent[dims[0]] = size
    return None if rest else Box(tuple(start), tuple(a + e for a, e in zip(start, extent, strict=True)))


def whole_tensors(holder: str, tensors: Iterable[TensorSpec]) -> Placement:
    """Every tensor complete and contiguous in a buffer of its name: an open checkpoint, a stream of exported tensors, a bucket."""
    tensors = tuple(tensors)
    return Placement(
        holder,
        tuple(BufferSpec(t.name, t.dtype, t.shape) for t in tensors),
        tuple(Piece(t.name, Box.whole(t.shape), t.name, 0, contiguous_strides(t.shape)) for t in tensors),
    )
