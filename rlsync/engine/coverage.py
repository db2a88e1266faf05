"""Which HF names a model takes and which parameters they fill, found on the live model before a byte moves.

vLLM's own loaders are run on tensors without memory while the parameters are on meta; every write is recorded and none
is executed. vLLM itself only warns about a parameter that nothing loads, and skips some unknown names in silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlsync.control import BucketEntry
from rlsync.engine.compat import load_weights, parameters_on_meta, quiet
from rlsync.geometry import Box, BufferSpec, box_in_buffer, cover

_aten = torch.ops.aten
_FILLS = (_aten.fill_.Scalar, _aten.fill_.Tensor, _aten.zero_.default)
_ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Coverage:
    """``unused_names``: HF names that no loader read. ``unfilled``: parameters that were not written completely.

    ``findings``: one sentence for each tensor at which a loader raised, other than for its name.
    """

    unused_names: tuple[str, ...]
    unfilled: tuple[str, ...]
    findings: tuple[str, ...]


def check_coverage(model: torch.nn.Module, entries: Sequence[BucketEntry]) -> Coverage:
    """Run the loaders of ``model`` on every entry, without memory. Leaves the model as it was.

    With tensor or pipeline parallelism each worker sees its own share; names are to be judged on the union.
    """
    twins = _twins(model)
    with parameters_on_meta(model), quiet():
        sources = {e.name: torch.empty(e.shape, dtype=getattr(torch, e.dtype), device="meta") for e in entries}
        recorder, findings = _Recorder(sources), list[str]()
        try:
            with recorder:
                load_weights(model, iter(sources.items()))
        except Exception:
            # Once more, one by one, so that all that is wrong is found together.
            recorder, findings = _load_one_by_one(model, sources)
        unfilled = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not recorder.is_full(parameter)}
    unfilled -= {name for name in unfilled if any(twin not in unfilled for twin in twins[name])}
    named = {f.split(" ", 1)[0] for f in findings}
    unused = tuple(name for name in sources if name not in recorder.read and name not in named)
    return Coverage(unused, tuple(sorted(unfilled)), tuple(findings))


def _load_one_by_one(model: torch.nn.Module, sources: dict[str, torch.Tensor]) -> tuple[_Recorder, list[str]]:
    recorder, findings = _Recorder(sources), []
    for name, tensor in sources.items():
        try:
            with recorder:
                load_weights(model, iter([(name, tensor)]))
        except (ValueError, KeyError, AttributeError) as error:
            # How models answer to a name they do not have; shapes are asserted.
            if name in recorder.read:
                findings.append(_finding(name, tensor, error))
        except Exception as error:
            findings.append(_finding(name, tensor, error))
    return recorder, findings


def _finding(name: str, tensor: torch.Tensor, error: Exception) -> str:
    text = " ".join(str(error).split())[:_ERROR_CHARS]
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} does not fit the engine's model: {type(error).__name__}: {text}"


class _Recorder(TorchDispatchMode):
    """Notes what is written and what is read, and executes neither."""

    def __init__(self, sources: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self._names = {_key(tensor): name for name, tensor in sources.items()}
        self._regions: dict[int, set[tuple[Any, ...]]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _aten.copy_.default:
            target, source = args[:2]
            if target.shape.numel() != source.shape.numel():
                raise ValueError(f"{tuple(source.shape)} is copied into {tuple(target.shape)}")
            self._write(target)
            self._note_read(source)
            return target
        if func in _FILLS:
            self._write(args[0])
            return args[0]
        if not func.is_view:
            for arg in args:
                if isinstance(arg, torch.Tensor):
                    self._note_read(arg)
        return func(*args, **(kwargs or {}))

    def _note_read(self, tensor: torch.Tensor) -> None:
        name = self._names.get(_key(tensor))
        if name is not None:
            self.read.add(name)

    def _write(self, target: torch.Tensor) -> None:
        self._regions[_key(target)].add((target.storage_offset(), tuple(target.shape), tuple(target.stride())))

    def is_full(self, parameter: torch.Tensor) -> bool:
        """Whether every element was written."""
        regions = self._regions[_key(parameter)]
        if sum(prod(shape) for _, shape, _ in regions) < parameter.numel():
            return False
        buffer = BufferSpec("", "", tuple(parameter.shape))
        boxes = [box_in_buffer(buffer, *region) for region in regions]
        if None not in boxes:
            return not cover(Box.whole(buffer.shape), [(box, 0) for box in boxes if box is not None])[1]
        # Some region is no box of the parameter's shape (a loader that flattens): look at each element.
        written = torch.zeros(parameter.numel(), dtype=torch.bool)
        for offset, shape, strides in regions:
            written.as_strided(shape, strides, offset).fill_(True)
        return bool(written.all())


def _key(tensor: torch.Tensor) -> int:
    """Identity of the storage; meta tensors have no address."""
    return tensor.untyped_storage()._cdata


def _twins(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter name, the names of the live parameters that share its memory (tied embeddings)."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[parameter.data_ptr() if parameter.numel() else id(parameter)].append(name)
    return {name: tuple(n for n in group if n != name) for group in groups.values() for name in group}
