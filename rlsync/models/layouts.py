"""Layouts: how one Megatron parameter packs and splits the HF tensors it is made of. Pure values and integers.

Packing facts are those of Megatron-Core 0.16 (``megatron/core/transformer/attention.py``, ``mlp.py``,
``tensor_parallel/layers.py``). A layout never reads tensor attributes such as ``partition_dim``: TransformerEngine sets
them wrongly for experts, MLA and gated layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rlsync.errors import PlacementError
from rlsync.layout.geometry import Box, contiguous_strides

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of the ``source``-th HF tensor of a rule, and where it lies in the local parameter (elements)."""

    source: int
    box: Box
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Padding:
    """Rows of the local parameter that no HF element fills."""

    offset: int
    shape: Shape
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalLayout:
    """One rank's share of a Megatron parameter: its shape, the HF parts in it, and its padding."""

    shape: Shape
    parts: tuple[Part, ...]
    padding: tuple[Padding, ...] = ()


def transposed_in_block(local: LocalLayout, index: int, count: int) -> LocalLayout:
    """A matrix, transposed, as the ``index``-th of ``count`` such that lie one after another in one parameter (GroupedMLP).

    ``local`` lies row by row and has no padding. The shape is that of the views that GroupedMLP computes with.
    """
    rows, columns = local.shape
    first = index * rows * columns
    parts = (replace(part, offset=first + part.offset % columns * rows + part.offset // columns, strides=(1, rows)) for part in local.parts)
    return LocalLayout((count, columns, rows), tuple(parts))


class Layout(Protocol):
    """What every layout can do."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        """The share of ``rank`` on a tensor axis of ``size`` ranks.

        ``shapes`` are the HF shapes in the order of the rule, ``dims`` the model's named sizes.
        Raises PlacementError when the axis cannot divide the tensor.
        """


def _divided(total: int, size: int, what: str) -> int:
    if total % size:
        raise PlacementError(f"{what} of {total} cannot be divided by a tensor axis of {size} ranks")
    return total // size


def _rows(shape: Shape, rows: int) -> Shape:
    return (rows, *shape[1:])


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank holds the whole tensor: norms, routers, row-parallel biases."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        (shape,) = shapes
        return LocalLayout(shape, (Part(0, Box.whole(shape), 0, contiguous_strides(shape)),))


@dataclass(frozen=True, slots=True)
class Column:
    """Dim 0 is split into equal consecutive chunks (ColumnParallelLinear)."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        (shape,) = shapes
        rows = _divided(shape[0], size, "dim 0")
        local = _rows(shape, rows)
        box = Box((rank * rows, *(0 for _ in shape[1:])), ((rank + 1) * rows, *shape[1:]))
        return LocalLayout(local, (Part(0, box, 0, contiguous_strides(local)),))


@dataclass(frozen=True, slots=True)
class HeadColumn:
    """A ``Column`` whose dim 0 is attention heads of equal size: a rank holds whole heads."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        if dims["num_heads"] % size:
            raise PlacementError(f"{dims['num_heads']} attention heads cannot be divided by a tensor axis of {size} ranks")
        return Column().local(shapes, rank, size, dims)


@dataclass(frozen=True, slots=True)
class Row:
    """Dim 1 is split into equal consecutive chunks (RowParallelLinear)."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        (shape,) = shapes
        columns = _divided(shape[1], size, "dim 1")
        local = (shape[0], columns)
        box = Box((0, rank * columns), (shape[0], (rank + 1) * columns))
        return LocalLayout(local, (Part(0, box, 0, contiguous_strides(local)),))


@dataclass(frozen=True, slots=True)
class GatedColumn:
    """(gate, up) in one parameter: rank ``r`` holds ``[gate_r; up_r]``, each the r-th chunk of dim 0."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        gate, up = shapes
        if gate != up:
            raise PlacementError(f"gate and up projections differ: {gate} against {up}")
        half = Column().local((gate,), rank, size, dims)
        box, rows = half.parts[0].box, half.shape[0]
        strides = contiguous_strides(half.shape)
        return LocalLayout(
            _rows(gate, 2 * rows),
            (Part(0, box, 0, strides), Part(1, box, rows * strides[0], strides)),
        )


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """(q, k, v) packed per query group: ``[q heads of the group | k head | v head]``, then split evenly over dim 0.

    The even split also holds where there are fewer groups than ranks: a rank then owns a part of a group's rows
    (``SelfAttention`` of Megatron-Core gathers the activations). Serves weights (2-D) and biases (1-D).
    """

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        heads, groups, head_dim = dims["num_heads"], dims["num_groups"], dims["head_dim"]
        if heads % size:
            raise PlacementError(f"{heads} attention heads cannot be divided by a tensor axis of {size} ranks")
        if groups % size and size % groups:
            raise PlacementError(f"{groups} key-value heads and a tensor axis of {size} ranks do not divide one another")
        per_group = heads // groups * head_dim
        packed = groups * (per_group + 2 * head_dim)
        rows = _divided(packed, size, "packed QKV rows")
        local = _rows(shapes[0], rows)
        strides = contiguous_strides(local)
        parts = []
        for group in range(groups):
            base = group * (per_group + 2 * head_dim)
            for source, begin, length in ((0, 0, per_group), (1, per_group, head_dim), (2, per_group + head_dim, head_dim)):
                first, last = max(base + begin, rank * rows), min(base + begin + length, (rank + 1) * rows)
                if first >= last:
                    continue
                hf = group * length + first - (base + begin)
                tail = shapes[source][1:]
                box = Box((hf, *(0 for _ in tail)), (hf + last - first, *tail))
                parts.append(Part(source, box, (first - rank * rows) * strides[0], strides))
        return LocalLayout(local, tuple(parts))


@dataclass(frozen=True, slots=True)
class Fused:
    """Another layout whose HF tensors are the rows of a single one, each below another.

    Attributes:
        layout: of the tensors by themselves.
        rows: the dim that counts the rows of each, in the order in which ``layout`` expects them.
        order: which of them is the first in the single tensor, which the second, ...; () where that is the order of ``layout``.
    """

    layout: Layout
    rows: tuple[str, ...]
    order: tuple[int, ...] = ()

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        (shape,) = shapes
        heights = [dims[name] for name in self.rows]
        if sum(heights) != shape[0]:
            raise PlacementError(f"{' + '.join(self.rows)} are {sum(heights)} rows, and the tensor has {shape[0]}")
        above, first = 0, [0] * len(heights)
        for source in self.order or range(len(heights)):
            first[source], above = above, above + heights[source]
        split = self.layout.local([_rows(shape, height) for height in heights], rank, size, dims)

        def in_one(part: Part) -> Part:
            start, stop = ((first[part.source] + corner[0], *corner[1:]) for corner in (part.box.start, part.box.stop))
            return Part(0, Box(start, stop), part.offset, part.strides)

        return LocalLayout(split.shape, tuple(map(in_one, split.parts)))


@dataclass(frozen=True, slots=True)
class VocabPadded:
    """Dim 0 is the vocabulary, padded to ``dims["padded_vocab"]`` rows and split evenly; padding rows are zero."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        (shape,) = shapes
        rows = _divided(dims["padded_vocab"], size, "padded vocabulary")
        local = _rows(shape, rows)
        strides = contiguous_strides(local)
        first, last = rank * rows, min((rank + 1) * rows, shape[0])
        real = max(0, last - first)
        parts: tuple[Part, ...] = ()
        padding: tuple[Padding, ...] = ()
        if real:
            tail = shape[1:]
            parts = (Part(0, Box((first, *(0 for _ in tail)), (last, *tail)), 0, strides),)
        if real < rows:
            padding = (Padding(real * strides[0], _rows(shape, rows - real), strides),)
        return LocalLayout(local, parts, padding)
