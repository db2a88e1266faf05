"""Origins of the elements of tensors while a loader runs: views and plain copies of HF tensors, or a computation.

Knows storages and operators; knows neither the model nor what a loader writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


class OpTrace:
    """Origin of every storage that loaders make or receive.

    ``read``: HF names whose elements were used. ``computed``: those of them of which not only plain copies were made, so that any
    element may have been used.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        self.read: set[str] = set()
        self.computed: set[str] = set()
        # None: computed. The tensor beside it keeps the storage, whose identity must not be used again.
        self._known: dict[int, tuple[_Origin | None, torch.Tensor]] = {}
        for name, tensor in sources.items():
            shape = tuple(tensor.shape)
            self._known[key_of(tensor)] = (_Origin(name, tensor.dtype, shape, 0, contiguous_strides(shape), None), tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in an HF tensor or in memory that a loader made."""
        return key_of(tensor) in self._known

    def note_copied(self, tensor: torch.Tensor) -> None:
        """Mark ``tensor`` as read by a plain copy, which the recorder describes element by element."""
        origin, _ = self._known.get(key_of(tensor), (None, None))
        if origin is not None:
            self.read.add(origin.name)

    def note_computed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Mark these tensors as used by an operator other than a plain copy."""
        for tensor in _tensors((*args, *kwargs.values())):
            origin, _ = self._known.get(key_of(tensor), (None, None))
            if origin is not None:
                self.read.add(origin.name)
                self.computed.add(origin.name)

    def parts(self, tensor: torch.Tensor, dtype: torch.dtype) -> list[SourcePart] | None:
        """Parts of ``tensor`` by HF tensor, or None where a cast of an HF tensor to ``dtype`` gives other values."""
        origin, _ = self._known.get(key_of(tensor), (None, None))
        if origin is None or tensor.dtype != origin.dtype or origin.rounded not in (None, dtype):
            return None
        shape = tuple(tensor.shape)
        found = split(shape, [Side(shape, 0, contiguous_strides(shape)), Side(origin.grid, int(tensor.storage_offset()), tensor.stride())])
        if found is None:
            return None
        return [
            SourcePart(
                start=part.sides[0].start,
                dims=part.axes(0),
                shape=part.shape,
                name=origin.name,
                offset=origin.offset + sum(i * s for i, s in zip(part.sides[1].start, origin.strides, strict=True)),
                strides=tuple(origin.strides[axis] for axis in part.axes(1)),
            )
            for part in found
        ]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[torch.Tensor]) -> Any:
        """Execute an operator that writes into ``written``, none of them the model's tensors, and record its results."""
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        if not func.is_view:
            self.note_computed(args, kwargs)
        for tensor in written:
            self._known[key_of(tensor)] = (None, tensor)
        if written and any(t.is_meta for t in _tensors((*args, *kwargs.values()))) and not written[0].is_meta:
            # What has no memory cannot be copied into what has some; from now on the latter is computed anyway.
            return written[0] if func._schema.returns else None
        result = func(*args, **kwargs)
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

    def _composed(self, source: torch.Tensor, result: torch.Tensor) -> _Origin | None:
        """Origin of ``result``, a copy of ``source``: it must be dense, in any order of its dims."""
        origin, _ = self._known.get(key_of(source), (None, None))
        if origin is None:
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
