"""Everything that recording could leave behind in a process, by path, so that before and after can be compared."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.reload import layerwise

from rlsync.engine.state import state_hashes


@dataclass(frozen=True)
class Same:
    """Equal to nothing but the very same object, which it keeps alive."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing


def trace_of(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """Identities, addresses, values and attributes of the model's modules and tensors, and vLLM's registries."""
    compilation = config.compilation_config
    found: dict[str, Any] = {
        "hashes": state_hashes(model),
        "static_forward_context": _entries(compilation.static_forward_context),
        "static_all_moe_layers": list(compilation.static_all_moe_layers),
        "custom ops": (dict(compilation.enabled_custom_ops), dict(compilation.disabled_custom_ops)),
        "rotary cache": _entries(rotary_embedding._ROPE_DICT),
        "layers loading": set(layerwise.LOADING_LAYERS),
        "layers with metadata": [name for name, module in model.named_modules() if module in layerwise.LAYERWISE_INFO],
        "random": tuple(torch.random.get_rng_state().tolist()),
        "logging": logging.getLogger("vllm").level,
        "dtype": torch.get_default_dtype(),
    }
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name} attributes"] = _entries(vars(module))
        found[f"{name} modules"] = _entries(module._modules)
        found[f"{name} non-persistent"] = set(module._non_persistent_buffers_set)
        for kind, table in (("parameter", module._parameters), ("buffer", module._buffers)):
            found[f"{name} {kind}s"] = _entries(table)
            found |= {f"{name} {kind} {key}": _tensor(t) for key, t in table.items() if t is not None}
        info = layerwise.LAYERWISE_INFO.get(module)
        if info is not None:
            found[f"{name} reload"] = (info.load_numel, info.load_numel_total, len(info.loaded_weights), info.kernel_tensors)
            for group in info.restore_metadata:
                found |= {f"{name} metadata {key}": (Same(t), _entries(vars(t))) for key, t in group.items()}
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _entries(table: Any) -> list[tuple[Any, Same]]:
    """Keys in their order, and the objects under them."""
    return [(key, Same(value)) for key, value in table.items()]


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    view = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, type(tensor))
    return (Same(tensor), *view, tensor.requires_grad, _entries(vars(tensor)))
