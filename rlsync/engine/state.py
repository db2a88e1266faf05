"""Hashes of everything a model computes from: the oracle that a synced engine is a fresh engine.

Walks the module tree and what hangs on it (quantisation methods, kernels, attention backends, closures), and hashes tensors as they
are addressed. Owns no knowledge of how any of them came about. Free of addresses, so that two processes can be compared.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rlsync.engine.compat import layers as compat_layers
from rlsync.engine.compat import lora as compat_lora

# (class, attribute) of state that may differ between engines with the same weights; * stands for any class.
NOT_STATE = frozenset(
    {
        ("*", "kv_cache"),  # what was computed for requests
        ("*", "kv_sharing_target_layer"),
        ("*", "aot_compiled_fn"),  # example inputs of the compiler: not what it computes from
        ("CPUDNNLGEMMHandler", "handler_tensor"),  # an address; the kernel behind it is probed
        ("*", "lora_manager"),  # which adapter is in which slot
        ("*", "punica_wrapper"),  # which slot each token of the last batch asked for
        # The same slots as those of the layer itself.
        *(("MoELoRAContext", name) for name in compat_lora.EXPERT_STACKS),
        ("FusedMoEWithLoRA", "lora_a_stacked"),
        ("FusedMoEWithLoRA", "lora_b_stacked"),
        ("VocabParallelEmbeddingWithLoRA", "lora_a_stacked_2d"),
    }
)
# Packages whose objects hold no weights: they are not entered, unless they are dataclasses.
_CLOSED_PACKAGES = frozenset({"torch", "transformers", "numpy"}) | sys.stdlib_module_names
_CLOSED_PREFIXES = ("vllm.config", "vllm.distributed", "vllm.transformers_utils")
_PROBE_ROWS = 256


def state_hashes(model: torch.nn.Module) -> dict[str, str]:
    """Path -> hash of every tensor and every float that is reachable from ``model``, sorted by path.

    Of slots for adapters those of the newest adapter count, and none where no slot has one.
    A tensor's hash covers dtype, shape, strides, the bytes it addresses, and which of the paths before it shares its memory. Weights
    inside an opaque kernel (oneDNN on CPU) have no bytes to read: such a linear layer has a path ending in ``#probe`` with the
    hash of what it makes of the unit vectors, which is every weight as the kernel uses it. Not collective.
    """
    walk = _Walk(compat_lora.newest_slot(model))
    with torch.no_grad():
        walk.visit("", model)
        for name, layer in model.named_modules():
            width = compat_layers.opaque_linear_width(layer)
            if width is not None:
                walk.hashes[f"{name}#probe"] = _probe(layer, width)
    return dict(sorted(walk.hashes.items()))


def state_difference(one: Mapping[str, str], other: Mapping[str, str]) -> tuple[str, ...]:
    """Paths at which two results of ``state_hashes`` differ, or that only one of them has."""
    return tuple(sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path)))


class _Walk:
    """Depth first, names sorted: the order of a registry changes with every reload, and must not show."""

    def __init__(self, slot: int | None) -> None:
        self._slot = slot
        self.hashes: dict[str, str] = {}
        self._seen: dict[int, Any] = {}
        self._storages: dict[int, str] = {}

    def visit(self, path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self.hashes[path] = self._tensor(path, value)
        elif isinstance(value, float):
            self.hashes[path] = value.hex()
        elif id(value) not in self._seen:
            # Kept, so that no other object takes its identity.
            self._seen[id(value)] = value
            slots = compat_lora.slots_of(value)
            for name, part in sorted(_parts(value), key=lambda row: row[0]):
                if name not in slots:
                    self.visit(f"{path}.{name}".lstrip("."), part)
                elif self._slot is not None:
                    self.visit(f"{path}.{name}".lstrip("."), [tensor[self._slot] for tensor in slots[name]])

    def _tensor(self, path: str, tensor: torch.Tensor) -> str:
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}".encode(), digest_size=16)
        if tensor.is_meta:
            digest.update(b"meta")
        elif tensor.numel():
            first = self._storages.setdefault(tensor.untyped_storage().data_ptr(), path)
            digest.update(first.encode() if first != path else b"")
            digest.update(_bytes(tensor))
        return digest.hexdigest()


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Attributes and elements of an object, by name."""
    if isinstance(value, torch.nn.Module):
        own = {n: v for n, v in vars(value).items() if n not in ("_parameters", "_buffers", "_modules") and not n.endswith("_hooks")}
        yield from _attributes(value, {**own, **value._parameters, **value._buffers, **value._modules})
    elif isinstance(value, Mapping):
        yield from ((f"[{key}]", part) for key, part in value.items() if isinstance(key, str | int))
    elif isinstance(value, list | tuple):
        yield from ((f"[{i:06}]", part) for i, part in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells if cell != types.CellType())
        yield from (("__defaults__", value.__defaults__), ("__kwdefaults__", value.__kwdefaults__), ("__dict__", vars(value)))
    elif _is_open(value):
        slots = {
            name: getattr(value, name) for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(value, name)
        }
        yield from _attributes(value, {**slots, **getattr(value, "__dict__", {})})


def _attributes(value: Any, attributes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    kind = type(value).__name__
    return ((n, v) for n, v in attributes.items() if ("*", n) not in NOT_STATE and (kind, n) not in NOT_STATE)


def _is_open(value: Any) -> bool:
    """Whether an object's attributes may hold weights."""
    if isinstance(value, type | types.ModuleType):
        return False
    module = type(value).__module__
    if module.startswith(_CLOSED_PREFIXES):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace) or module.split(".")[0] not in _CLOSED_PACKAGES


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes a tensor addresses, in row-major order of its elements."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _probe(layer: Any, width: int) -> str:
    """Hash of a linear layer's outputs for the ``width`` unit vectors: its weight, as exact as its kernel."""
    digest = hashlib.blake2b(digest_size=16)
    dtype = layer.weight.dtype
    for start in range(0, width, _PROBE_ROWS):
        rows = torch.zeros(min(_PROBE_ROWS, width - start), width, dtype=dtype)
        rows.diagonal(start).fill_(1.0)
        outcome = layer.quant_method.apply(layer, rows)
        digest.update(_bytes(outcome))
    return digest.hexdigest()
