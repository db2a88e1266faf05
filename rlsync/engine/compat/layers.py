"""One layer of vLLM at a time: its kind, its checkpoint layout, its post-processing, in place or beside the live layer; and attention,
which vLLM post-processes after all others, from the weights of others.

Knows no bucket and no model but to list its layers.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention, MMEncoderAttention
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors
from vllm.platforms import current_platform


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What decides whether a layer's parameters stay as its checkpoint has them.

    ``platform`` is ``cpu``, ``cuda`` or ``other``; ``method`` the full name of its quantisation method's class, or of its own
    class where it has none; ``backend`` the kernel it computes with, where there is a choice.
    """

    platform: str
    method: str
    backend: str = ""


def platform_name() -> str:
    return "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda() else "other"


def layer_kind(layer: torch.nn.Module) -> LayerKind:
    """The kind of one layer as it stands."""
    method = getattr(layer, "quant_method", None)
    # With enable_lora experts have one around the one that made their weights.
    method = getattr(method, "old_quant_method", method)
    cls = type(layer if method is None else method)
    backend = getattr(method, "unquantized_backend", None)
    name = getattr(backend, "name", "")
    if current_platform.is_cpu() and not name and method is not None:
        name = "packed" if _holds_weights(getattr(layer, "cpu_linear", None)) else "plain"
    return LayerKind(platform_name(), f"{cls.__module__}.{cls.__qualname__}", name)


def _holds_weights(function: Any) -> bool:
    """Whether a layer's own product on CPU has anything but its arguments to compute from: packed copies, kernel handles."""
    if function is None or isinstance(function, types.BuiltinFunctionType):
        return False
    bare = isinstance(function, types.FunctionType) and not (function.__closure__ or function.__defaults__ or function.__kwdefaults__)
    return not bare


def opaque_linear_width(layer: Any) -> int | None:
    """Number of inputs of a linear layer on CPU whose kernel hides its weights, or None for every other layer."""
    # Of itself: a layer that wraps another for adapters gives that one's.
    if not current_platform.is_cpu() or not _holds_weights(vars(layer).get("cpu_linear")):
        return None
    return int(checkpoint_layout(layer)["weight"].shape[1])


# Layout.


def checkpoint_layout(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The layer's own parameters and buffers as its loaders want them: on meta, or live where vLLM leaves them live in a reload."""
    parameters, buffers = layerwise.get_layerwise_info(layer).restore_metadata
    return {n: t for n, t in get_layer_tensors(layer).items() if n in SKIP_TENSORS} | parameters | buffers


def live_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The layer's own parameters and buffers."""
    return dict(get_layer_tensors(layer))


def stays_as_loaded(name: str) -> bool:
    """Whether tensors of this name are live in a reload and nothing post-processes them (expert maps, score corrections)."""
    return name in SKIP_TENSORS and name != "bias"


def is_host_offloaded(tensor: torch.Tensor) -> bool:
    """Whether vLLM keeps this parameter in host memory and lets the GPU read it there."""
    return bool(getattr(tensor, "_vllm_is_uva_offloaded", False))


def room(layer: torch.nn.Module, keep: Collection[str]) -> int:
    """Bytes of the memory that ``materialize`` wants."""
    parameters, buffers = layerwise.get_layerwise_info(layer).restore_metadata
    return metas_bytes(meta for name, meta in (parameters | buffers).items() if name not in keep and name not in SKIP_TENSORS)


def materialize(layer: torch.nn.Module, keep: Collection[str], memory: torch.Tensor | None = None) -> None:
    """Put a layer into checkpoint layout, uninitialised: in ``memory`` (1-D uint8, as much as ``room`` says), or in new one.

    Tensors named in ``keep``, and those that vLLM leaves live in a reload, are the live ones: a write to them is a write to the
    engine. ``complete`` or ``restore`` ends this state.
    """
    info = layerwise.get_layerwise_info(layer)
    live = get_layer_tensors(layer)
    info.kernel_tensors = get_layer_params_buffers(layer)
    if hasattr(info, "kernel_non_persistent_buffers"):  # vLLM >= 0.32
        info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
    restore_layer_on_meta(layer, info)
    for name in keep:
        setattr(layer, name, live[name])
    if memory is None:
        memory = torch.empty(room(layer, keep), dtype=torch.uint8, device=info.restore_device)
    tables: tuple[dict[str, torch.Tensor | None], ...] = (layer._parameters, layer._buffers)  # type: ignore[assignment]
    for table in tables:
        for name, meta in table.items():
            if meta is not None and meta.is_meta and name not in SKIP_TENSORS:
                table[name], memory = placed_like(meta, memory)


def complete(layer: torch.nn.Module) -> None:
    """vLLM's own post-processing of a materialised and filled layer, and the copy into the storages the engine computes with."""
    layerwise._layerwise_process(layer, layerwise.get_layerwise_info(layer))


def restore(layer: torch.nn.Module) -> None:
    """Restore the live tensors of a materialised layer."""
    info = layerwise.get_layerwise_info(layer)
    if info.kernel_tensors is not None:
        layerwise._place_kernel_tensors(layer, info)
    info.reset()


# Beside the live layer, for comparisons.


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Attributes of a layer and of the objects that post-processing changes, as they were."""

    layer: torch.nn.Module
    attributes: tuple[tuple[Any, dict[str, Any]], ...]


def snapshot(layer: torch.nn.Module) -> Snapshot:
    """Attributes that ``bring_back`` restores. Tensors are referred to, not copied."""
    method = getattr(layer, "quant_method", None)
    kernel = getattr(method, "moe_kernel", None)
    objects = [o for o in (layer, method, kernel, getattr(kernel, "fused_experts", None)) if hasattr(o, "__dict__")]
    return Snapshot(layer, tuple((o, {n: copy.copy(v) if isinstance(v, dict | set) else v for n, v in vars(o).items()}) for o in objects))


def stand_in(layer: torch.nn.Module, names: Collection[str]) -> int:
    """Put the layer into checkpoint layout with no tensor among ``names`` (full ones) being live; returns the bytes taken.

    Others keep their live values in tensors of their own.
    """
    live = live_tensors(layer)
    filled = {name.rpartition(".")[2] for name in names}
    materialize(layer, ())
    for name, tensor in live_tensors(layer).items():
        if name in live and (tensor is live[name] or (name not in filled and tensor.shape == live[name].shape)):
            setattr(layer, name, _copied(live[name]))
    # Without live tensors to copy into, post-processing leaves its results where they are.
    layerwise.get_layerwise_info(layer).kernel_tensors = None
    return sum(tensor.nbytes for tensor in live_tensors(layer).values())


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    twin = tensor.detach().clone()
    twin.__class__, twin.__dict__ = tensor.__class__, tensor.__dict__.copy()
    return twin


def process_apart(layer: torch.nn.Module) -> None:
    """vLLM's post-processing of a layer that stands in for the live one."""
    layerwise._layerwise_process(layer, layerwise.get_layerwise_info(layer))


def bring_back(snapshot: Snapshot) -> None:
    """Restore the attributes of a snapshot."""
    for owner, attributes in snapshot.attributes:
        vars(owner).clear()
        vars(owner).update(attributes)
    layerwise.get_layerwise_info(snapshot.layer).reset()


# Tensors on meta, and where they lie in a piece of memory.

# As torch aligns what it allocates on a GPU.
META_ALIGNMENT = 512


def metas_bytes(metas: Iterable[torch.Tensor]) -> int:
    """Bytes that they take together."""
    return sum(_aligned_bytes(meta) for meta in metas)


def placed_like(meta: torch.Tensor, memory: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A tensor like ``meta`` (of its class, with its attributes and strides) at the start of ``memory`` (1-D uint8); and the rest of it."""
    elements = memory[: _extent(meta) * meta.itemsize].view(meta.dtype)
    made: Any = elements.as_strided(meta.shape, meta.stride())
    made.__class__, made.__dict__ = meta.__class__, meta.__dict__.copy()
    return made, memory[_aligned_bytes(meta) :]


def _extent(meta: torch.Tensor) -> int:
    """Elements from the first to the last one."""
    return 1 + sum((n - 1) * step for n, step in zip(meta.shape, meta.stride(), strict=True)) if meta.numel() else 0


def _aligned_bytes(meta: torch.Tensor) -> int:
    return -(-_extent(meta) * meta.itemsize // META_ALIGNMENT) * META_ALIGNMENT


# Attention.

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
    """An attention layer, the objects whose attributes its post-processing can change, and the one whose weight MLA takes views of."""
    found = (layer, *(getattr(layer, name, None) for name in ("impl", "quant_method", "kv_b_proj")))
    return tuple(part for part in found if hasattr(part, "__dict__"))


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
