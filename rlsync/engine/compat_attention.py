"""What vLLM makes in one layer of the weights of others: attention, the tensors it absorbs, and modules that no reload finishes.

Like compat, it holds private names and version branches of vLLM (0.25.1, 0.32.0). Knows no checkpoint layout and no bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention, MMEncoderAttention
from vllm.model_executor.model_loader.reload import layerwise

# Attributes of attention that hold what was computed for requests.
ATTENTION_CACHES = ("kv_cache",)
# Attributes in which MLA keeps what it absorbed of kv_b_proj: views of its weight where nothing is quantised, else copies.
_ABSORBED = ("W_UV", "W_UK_T", "W_UK_T_dcp_qrep", "W_K", "W_K_scale", "W_V", "W_V_scale")


def _is_deferred_attention(layer: torch.nn.Module) -> bool:
    if hasattr(layerwise, "is_deferred_attention_layer"):  # vLLM >= 0.32
        return bool(layerwise.is_deferred_attention_layer(layer))
    return isinstance(layer, (Attention, MLAAttention, MMEncoderAttention)) and hasattr(layer, "process_weights_after_loading")


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that are post-processed after all others, from the weights of others."""
    return ((name, layer) for name, layer in model.named_modules() if _is_deferred_attention(layer))


def attention_parts(layer: Any) -> tuple[Any, ...]:
    """An attention layer and the objects whose attributes its post-processing can change."""
    return tuple(part for part in (layer, getattr(layer, "impl", None), getattr(layer, "quant_method", None)) if hasattr(part, "__dict__"))


def finish_attention(layer: Any, model_config: Any) -> None:
    """Post-process an attention layer, as vLLM does at the end of a load and of a reload."""
    layer.process_weights_after_loading(model_config.dtype)


def absorbed_tensors(attention: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]] | None:
    """``(kv_b_proj, name -> tensor made of its weight)`` of an MLA layer, or None."""
    projection = getattr(attention, "kv_b_proj", None)
    if projection is None:
        return None
    found = {name: getattr(attention, name, None) for name in _ABSORBED}
    return projection, {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def own_post_processing(model: torch.nn.Module) -> tuple[str, ...]:
    """Modules with a post-processing that vLLM runs in a load and in no reload (the model itself, from 0.32 on; HPC modules)."""
    deferred = {id(layer) for _, layer in attention_layers(model)}
    return tuple(
        name or type(module).__name__
        for name, module in model.named_modules()
        if callable(getattr(module, "process_weights_after_loading", None)) and id(module) not in deferred and not _is_method(module)
    )


def _is_method(module: torch.nn.Module) -> bool:
    """Some quantisation methods and kernels are modules themselves; their layer runs their post-processing."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return isinstance(module, QuantizeMethodBase)
