"""Origins of the elements of tensors while a loader runs: views and plain copies of HF tensors, or a computation.

Knows storages and operators; knows neither the model nor what a loader writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from rlsync.layout.geometry import contiguous_strides
from rlsync.layout.regions import Side, split

_aten = torch.ops.aten
# Operators whose result has the elements of their first argument, in its shape, and a memory of its own.
_COPIES = (_aten.clone.default, _aten._to_copy.default)


@dataclass(frozen=True, slots=True)
class SourcePart:
    """A box of a tensor's index space, and where its elements lie in an HF tensor.

    The box begins at index ``start`` and has extents ``shape`` along ``dims`` (others have size 1). Its elements lie at
    ``offset`` with ``strides``, one for each of ``dims``, of the row-major HF tensor ``name``.
    """

    start: tuple[int, ...]
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Origin:
    """Row-major memory of shape ``grid``: its element ``i`` is element ``offset + i . strides`` of HF tensor ``name``.

    ``rounded`` is a dtype that the values went through and that cannot hold all of the HF tensor's.
    """

    name: str
    dtype: torch.dtype
    grid: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    rounded: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Stack:
    """Row-major memory of several of one size, one after the other, each with elements of one HF tensor."""

    rows: tuple[_Origin, ...]

    @property
    def row_size(self) -> int:
        return prod(self.rows[0].grid)


class OpTrace:
    """Origin of every storage that loaders make or receive, and numbers that they make without memory.

    ``read``: HF names whose elements were used. ``computed``: those of them of which not only plain copies were made, so that any
    element may have been used.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        self.read: set[str] = set()
        self.computed: set[str] = set()
        # None: computed. The tensor beside it keeps the storage, whose identity must not be used again.
        self._known: dict[int, tuple[_Origin | _Stack | None, torch.Tensor]] = {}
        self._numbers: dict[int, tuple[float, torch.Tensor]] = {}
        # By grid, shape, offset and strides: experts and layers have the same views, thousands of times.
        self._boxes: dict[tuple[Any, ...], list[_ViewBox] | None] = {}
        for name, tensor in sources.items():
            shape = tuple(tensor.shape)
            self._known[key_of(tensor)] = (_Origin(name, tensor.dtype, shape, 0, contiguous_strides(shape), None), tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in an HF tensor or in memory that a loader made."""
        return key_of(tensor) in self._known

    def number(self, tensor: torch.Tensor) -> float | None:
        """The number that ``tensor`` was filled with when it was made; None for one that was made otherwise, or written since."""
        return self._numbers[key_of(tensor)][0] if key_of(tensor) in self._numbers else None

    def note_copied(self, tensor: torch.Tensor) -> None:
        """Mark ``tensor`` as read by a plain copy, which the recorder describes element by element."""
        self.read.update(self._names(tensor))

    def _names(self, tensor: torch.Tensor) -> list[str]:
        """HF tensors that a tensor's memory is of."""
        origin, _ = self._known.get(key_of(tensor), (None, None))
        return [] if origin is None else [row.name for row in (origin.rows if isinstance(origin, _Stack) else (origin,))]

    def note_computed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Mark these tensors as used by an operator other than a plain copy."""
        for tensor in _tensors((*args, *kwargs.values())):
            self.read.update(self._names(tensor))
            self.computed.update(self._names(tensor))

    def parts(self, tensor: torch.Tensor, dtype: torch.dtype) -> list[SourcePart] | None:
        """Parts of ``tensor`` by HF tensor, or None where a cast of an HF tensor to ``dtype`` gives other values."""
        origin, _ = self._known.get(key_of(tensor), (None, None))
        shape, offset, strides = tuple(tensor.shape), int(tensor.storage_offset()), tensor.stride()
        if isinstance(origin, _Stack):
            return self._parts_of_rows(origin, tensor.dtype, dtype, shape, offset, strides)
        return None if origin is None else self._parts_of_origin(origin, tensor.dtype, dtype, shape, offset, strides)

    def _parts_of_rows(
        self, stack: _Stack, held: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
    ) -> list[SourcePart] | None:
        """The parts of a view that has the rows along its first dim."""
        size = stack.row_size
        if not shape or (strides[0] != size and shape[0] > 1):
            return None
        row, inside = divmod(offset, size)
        if inside + sum((n - 1) * step for n, step in zip(shape[1:], strides[1:], strict=True)) >= size:
            return None
        found: list[SourcePart] = []
        for i in range(shape[0]):
            parts = self._parts_of_origin(stack.rows[row + i], held, dtype, shape[1:], inside, strides[1:])
            if parts is None:
                return None
            found += (replace(p, start=(i, *p.start), dims=tuple(dim + 1 for dim in p.dims)) for p in parts)
        return found

    def _parts_of_origin(
        self, origin: _Origin, held: torch.dtype, dtype: torch.dtype, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]
    ) -> list[SourcePart] | None:
        """The parts of a view of one origin's memory, which holds elements of dtype ``held``."""
        if held != origin.dtype or origin.rounded not in (None, dtype):
            return None
        view = origin.grid, shape, offset, strides
        if view not in self._boxes:
            self._boxes[view] = _boxes(*view)
        found = self._boxes[view]
        if found is None:
            return None
        return [
            SourcePart(
                start=start,
                dims=dims,
                shape=extents,
                name=origin.name,
                offset=origin.offset + sum(i * s for i, s in zip(begin, origin.strides, strict=True)),
                strides=tuple(origin.strides[axis] for axis in axes),
            )
            for start, dims, extents, begin, axes in found
        ]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[torch.Tensor]) -> Any:
        """Execute an operator that writes into ``written``, none of them the model's tensors, and record its results."""
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        if func is _aten.stack.default and {"dim": 0, **dict(zip(("tensors", "dim"), args, strict=False)), **kwargs}["dim"] == 0:
            return self._stack(args[0])
        if not func.is_view:
            self.note_computed(args, kwargs)
        for tensor in written:
            self._known[key_of(tensor)] = (None, tensor)
            self._numbers.pop(key_of(tensor), None)
        if written and any(t.is_meta for t in _tensors((*args, *kwargs.values()))) and not written[0].is_meta:
            # What has no memory cannot be copied into what has some; from now on the latter is computed anyway.
            return written[0] if func._schema.returns else None
        result = func(*args, **kwargs)
        if func is _aten.scalar_tensor.default:
            # What ``tensor[i] = number`` writes.
            self._numbers[key_of(result)] = float(args[0]), result
        for tensor in _tensors([result]):
            if not func.is_view:
                self._known.setdefault(key_of(tensor), (None, tensor))
        return result

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        source = args[0]
        self.note_copied(source)
        if source.is_meta and "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        result = func(*args, **kwargs)
        origin = self._composed(source, result)
        if origin is None:
            self.note_computed((source,), {})
        self._known[key_of(result)] = (origin, result)
        return result

    def _stack(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Copies of equally shaped tensors, one after the other."""
        result = _aten.stack.default(tensors)
        rows = [self._composed(tensor, tensor.new_empty(tensor.shape)) for tensor in tensors]
        if any(row is None for row in rows):
            self.note_computed(tensors, {})
        for tensor in tensors:
            self.note_copied(tensor)
        self._known[key_of(result)] = (None if None in rows else _Stack(tuple(row for row in rows if row is not None)), result)
        return result

    def _composed(self, source: torch.Tensor, result: torch.Tensor) -> _Origin | None:
        """Origin of ``result``, a copy of ``source``: it must be dense, in any order of its dims."""
        origin, _ = self._known.get(key_of(source), (None, None))
        if origin is None or isinstance(origin, _Stack):
            return None
        exact = holds(result.dtype, origin.dtype)
        parts = self.parts(source, origin.rounded if exact and origin.rounded is not None else result.dtype)
        order = sorted(range(result.ndim), key=result.stride().__getitem__, reverse=True)
        if parts is None or len(parts) != 1 or not result.permute(order).is_contiguous():
            return None
        strides = dict(zip(parts[0].dims, parts[0].strides, strict=True))
        return _Origin(
            name=origin.name,
            dtype=result.dtype,
            grid=tuple(result.shape[dim] for dim in order),
            offset=parts[0].offset,
            strides=tuple(strides.get(dim, 0) for dim in order),
            rounded=origin.rounded if exact else result.dtype,
        )


_Numbers = tuple[int, ...]
# Where a box of a view starts, its dims and extents; and in the memory where it starts, and its dims.
_ViewBox = tuple[_Numbers, _Numbers, _Numbers, _Numbers, _Numbers]


def _boxes(grid: _Numbers, shape: _Numbers, offset: int, strides: _Numbers) -> list[_ViewBox] | None:
    """Boxes of a view of a row-major memory of shape ``grid``, or None where they would be too many."""
    found = split(shape, [Side(shape, 0, contiguous_strides(shape)), Side(grid, offset, strides)])
    if found is None:
        return None
    return [(part.sides[0].start, part.axes(0), part.shape, part.sides[1].start, part.axes(1)) for part in found]


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of ``narrow`` is one of ``wide``."""
    if wide == narrow:
        return True
    if not (wide.is_floating_point and narrow.is_floating_point):
        return False
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny


def key_of(tensor: torch.Tensor) -> int:
    """Identity of the storage; meta tensors have no address."""
    return tensor.untyped_storage()._cdata


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
