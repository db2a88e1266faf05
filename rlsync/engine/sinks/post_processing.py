"""Skips post-processing whose result does not depend on the weights.

vLLM post-processes every attention layer at the end of a load. For plain attention that sets a handful of scales to 1.0, by a launch each;
for MLA it computes from weights and runs in every sync, unless it only takes views of them. Which is which is not known from names or
classes: the first runs are traced. Owns the traces and the constants that remain to be written. Imports no vLLM.

Measured per layer of plain attention (vLLM 0.32 on one CPU core): 35 us and four operators to run, 13 us and a share of one grouped copy
to skip. On GPUs each operator is a launch, between the last byte and the commit.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Each gives its first argument new values, whatever it had.
_OVERWRITES = frozenset({_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default, _aten.copy_.default})
# How a tensor that Python's numbers were put into is seen for the first time.
_BIRTH = _aten.lift_fresh.default


class PostProcessingCache:
    """Post-processing of a fixed number of layers.

    A layer is skipped when its last run read no tensor that existed before, left every attribute as it was, and wrote nothing but
    constants into tensors that are attributes. To take views of parameters and buffers is not to read them: views show what is written to
    these later. While all its attributes are still the same objects, and those parameters where they were, only the constants are
    written again, because sleep may have discarded them. Otherwise the layer runs, and is traced.

    Args:
        layers: in the order in which they are post-processed.
        parts: the objects of a layer whose attributes post-processing can change, the layer first.
        ignored: names of attributes that say nothing about weights.
    """

    def __init__(self, layers: Sequence[Any], parts: Callable[[Any], Sequence[Any]], ignored: Collection[str] = ()) -> None:
        self._layers, self._parts, self._ignored = tuple(layers), parts, frozenset(ignored)
        self._cached: list[_Cached | None] = [None] * len(self._layers)
        self._groups: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        # Whether _groups is that of other skipped layers.
        self._changed = False

    @property
    def num_skipped(self) -> int:
        """Layers that the next ``run`` skips unless they change before."""
        return sum(cached is not None for cached in self._cached)

    @torch.no_grad()
    def run(self, process: Callable[[Any], None]) -> None:
        """Post-process every layer by ``process``, or write the constants that this would write."""
        for number, layer in enumerate(self._layers):
            known = self._cached[number]
            if known is None or not known.is_current():
                found = self._cached[number] = self._trace(layer, process)
                # Remembered, because a run that ends in an error leaves it to the next one to write what is skipped since.
                self._changed = self._changed or found is not known
        if self._changed:
            self._groups = _grouped([c for cached in self._cached if cached is not None for c in cached.constants])
            self._changed = False
        for targets, values in self._groups:
            torch._foreach_copy_(targets, values)

    def _trace(self, layer: Any, process: Callable[[Any], None]) -> _Cached | None:
        """Run the layer. What the next run has to write, or None where the layer has to run again."""
        before, weights = self._attributes(layer), self._weights(layer)
        with _Trace() as trace:
            process(layer)
        after = self._attributes(layer)
        owned = {id(value) for value in after.values() if isinstance(value, torch.Tensor)}
        written = {id(tensor): tensor for tensor in trace.written}
        if trace.reads or not written.keys() <= owned or trace.leaves_others_than(owned) or not after.repeat(before):
            return None
        # Those that the run has left there: an attribute that it sets may itself be a view of what is gone.
        left = {id(tensor) for tensor in self._weights(layer)}
        viewed = [tensor for tensor in weights if id(tensor) in left and _memory(tensor) in trace.viewed]
        if not trace.viewed <= {_memory(tensor) for tensor in viewed}:
            return None
        places = tuple((tensor, tensor.data_ptr()) for tensor in viewed)
        return _Cached(after, tuple((target, target.clone()) for target in written.values()), places)

    def _weights(self, layer: Any) -> list[torch.Tensor]:
        """Parameters and buffers of the parts that are modules."""
        modules = [part for part in self._parts(layer) if isinstance(part, torch.nn.Module)]
        return [t for module in modules for table in (module._parameters, module._buffers) for t in table.values() if t is not None]

    def _attributes(self, layer: Any) -> _Attributes:
        tables: list[dict[str, Any]] = []
        for part in self._parts(layer):
            modular = isinstance(part, torch.nn.Module)
            tables += [vars(part), *([part._parameters, part._buffers] if modular else [])]
        kept = [tuple(name for name in table if name not in self._ignored) for table in tables]
        rows = ((table, len(table), names, tuple(map(table.get, names))) for table, names in zip(tables, kept, strict=True))
        return _Attributes(tuple(rows))


@dataclass(frozen=True, slots=True)
class _Attributes:
    """Attribute tables of some objects: each table, its length, and its relevant names and values, by reference."""

    rows: tuple[tuple[dict[str, Any], int, tuple[str, ...], tuple[Any, ...]], ...]

    def values(self) -> Iterator[Any]:
        return (value for *_, values in self.rows for value in values)

    def are_untouched(self) -> bool:
        """Whether they are the same objects still. Takes no look at the values of tensors."""
        return all(len(table) == size and all(map(is_, map(table.get, names), values)) for table, size, names, values in self.rows)

    def repeat(self, before: _Attributes) -> bool:
        """Whether each value is the former object, or an equal one."""
        if len(self.rows) != len(before.rows):
            return False
        for (*_, names, values), (*_, former_names, former) in zip(self.rows, before.rows, strict=True):
            old = dict(zip(former_names, former, strict=True))
            if old.keys() != set(names) or not all(_equal(value, old[name]) for name, value in zip(names, values, strict=True)):
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Cached:
    """A layer as its last run left it; tensors that it wrote, with their values; and those that it took views of, with their addresses."""

    attributes: _Attributes
    constants: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    viewed: tuple[tuple[torch.Tensor, int], ...]

    def is_current(self) -> bool:
        return self.attributes.are_untouched() and all(tensor.data_ptr() == address for tensor, address in self.viewed)


class _Trace(TorchDispatchMode):
    """Sees every operation on tensors.

    Attributes:
        reads: whether one depends on a tensor that there was before, or on chance.
        written: tensors that there were before and that were given other values.
        viewed: memory of tensors that there were before, of which views were taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = False
        self.viewed: set[int] = set()
        self.written: list[torch.Tensor] = []
        # Kept until the end, so that no other tensor takes the identity of one that is gone.
        self._made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.reads:
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        old = [] if func is _BIRTH else [t for t in given if id(t) not in self._made]
        if func in _OVERWRITES and old and old[0] is given[0]:
            self.written.append(old.pop(0))
        if func.is_view and old:
            # Some copy where they must, as reshape and contiguous do. What a view gives counts as old too: nobody has made it.
            memory = {_memory(tensor) for tensor in old}
            if all(_memory(leaf) in memory for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
                self.viewed |= memory
                return result
        self.reads = bool(old) or torch.Tag.nondeterministic_seeded in func.tags
        if self.reads:
            # There is nothing left to prove, and intermediate results of weights may be large.
            self._made.clear()
            return result
        written = {id(t) for t in self.written}
        self._made |= {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and id(leaf) not in written}
        return result

    def leaves_others_than(self, owned: Collection[int]) -> bool:
        """Whether a tensor created during the run is still referred to, other than these. Clears the record."""
        left = [weakref.ref(tensor) for number, tensor in self._made.items() if number not in owned]
        self._made.clear()
        return any(reference() is not None for reference in left)


def _memory(tensor: torch.Tensor) -> int:
    """The same for all views of one piece of memory."""
    return int(tensor.untyped_storage()._cdata)


def _equal(value: Any, former: Any) -> bool:
    if value is former:
        return True
    if type(value) is not type(former):
        return False
    if isinstance(value, torch.Tensor):
        same = (value.device, value.dtype, value.shape) == (former.device, former.dtype, former.shape)
        return same and torch.equal(value, former)
    return isinstance(value, bool | int | float | str) and value == former


def _grouped(constants: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Targets and values that one launch can write."""
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for target, value in constants:
        targets, values = groups[target.device, target.dtype]
        targets.append(target)
        values.append(value)
    return list(groups.values())
