"""One layer of vLLM at a time: checkpoint layout, post-processing, what is derived from it, and the healing of its faults.

Like compat, it holds private names and version branches of vLLM (0.25.1, 0.32.0) and nothing else does. Knows no bucket.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, MLAAttention, MMEncoderAttention
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_meta_tensor, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers, get_layer_tensors
from vllm.platforms import current_platform

from rlsync.engine import meta_tensors

# Attributes of attention that hold what was computed for requests.
ATTENTION_CACHES = ("kv_cache",)
# Attributes in which MLA keeps what it absorbed of kv_b_proj: views of its weight where nothing is quantised, else copies.
_ABSORBED = ("W_UV", "W_UK_T", "W_UK_T_dcp_qrep", "W_K", "W_K_scale", "W_V", "W_V_scale")


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
    """Number of inputs of a linear layer on CPU that computes from what cannot be read, or None for every other layer."""
    if not current_platform.is_cpu() or not _holds_weights(getattr(layer, "cpu_linear", None)):
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
    return meta_tensors.room(meta for name, meta in (parameters | buffers).items() if name not in keep and name not in SKIP_TENSORS)


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
                table[name], memory = meta_tensors.placed(meta, memory)


def complete(layer: torch.nn.Module) -> None:
    """vLLM's own post-processing of a materialised and filled layer, and the copy into the storages the engine computes with."""
    layerwise._layerwise_process(layer, layerwise.get_layerwise_info(layer))


def restore(layer: torch.nn.Module) -> None:
    """Give a materialised layer its live tensors back, whatever happened to it since."""
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
    """What ``bring_back`` restores. Tensors are referred to, not copied."""
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
    """Make the layer its live self again."""
    for owner, attributes in snapshot.attributes:
        vars(owner).clear()
        vars(owner).update(attributes)
    layerwise.get_layerwise_info(snapshot.layer).reset()


# What belongs to other layers.


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


# Experts on CPU.


def heal() -> None:
    """Make vLLM's CPU build pack experts in every load, not only in the first. Once per process; idempotent; nothing elsewhere.

    vLLM 0.32 packs in the experts' own post-processing, which runs only while there is no kernel yet: a reload leaves plain
    bytes where the kernel reads packed ones. vLLM 0.25 makes the kernel anew each time and is not touched. Not for
    other experts classes: some change scales in place. It can go with the last version for which ``reload_findings`` is not
    empty without it.
    """
    original = UnquantizedFusedMoEMethod._setup_kernel
    if not current_platform.is_cpu() or hasattr(original, "heals"):
        return

    def setup_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel, layer = self.moe_kernel, kwargs["layer"] if "layer" in kwargs else args[0]
        original(self, *args, **kwargs)
        if kernel is not None and kernel is self.moe_kernel and self.unquantized_backend.name == "CPU":
            kernel.fused_experts.process_weights_after_loading(layer)

    setup_kernel.heals = original  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel


def reload_findings(model: torch.nn.Module) -> tuple[str, ...]:
    """What vLLM's own reload would leave wrong, one sentence each. The model is not touched.

    Layers whose post-processing makes something else of the same weights when it runs for the second time: tried with random
    weights on a twin of one layer of each kind of experts on CPU, where vLLM has had this fault; takes twice that layer's memory
    for the moment. And attention sinks that are kept as a copy which nothing renews (FlashInfer in vLLM < 0.32).
    """
    return (*_stale_sinks(model), *(_unstable_experts(model) if current_platform.is_cpu() else ()))


def _stale_sinks(model: torch.nn.Module) -> list[str]:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = ((name, getattr(layer, "impl", None)) for name, layer in attention_layers(model))
    return [
        f"{name} computes with a copy of its sinks that this version of vLLM makes only once"
        for name, impl in kept
        if isinstance(sinks := getattr(impl, "sinks", None), torch.Tensor)
        and not hasattr(impl, "_sinks_source")
        and sinks.untyped_storage().data_ptr() not in parameters
    ]


def _unstable_experts(model: torch.nn.Module) -> list[str]:
    tried: set[LayerKind] = set()
    findings = []
    for name, layer in model.named_modules():
        kind = layer_kind(layer)
        if not isinstance(getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod) or kind in tried:
            continue
        tried.add(kind)
        twin = _shallow(layer)
        twin.quant_method = _shallow(layer.quant_method)
        twin.quant_method.moe_kernel = None
        layout = layerwise.get_layerwise_info(layer).restore_metadata[0]
        first, second = _processed(twin, layout), _processed(twin, layout)
        findings += [
            f"{name}.{n}: loading the same weights a second time leaves other bytes than the first ({kind.method}, {kind.backend})"
            for n in first
            if not torch.equal(first[n], second[n])
        ]
    return findings


def _processed(twin: Any, layout: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of a layer after post-processing of random weights, always the same, as bytes."""
    generator = torch.Generator().manual_seed(0)
    for name, meta in layout.items():
        tensor = materialize_meta_tensor(meta)
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        twin._parameters[name] = tensor
    with torch.no_grad():
        twin.quant_method.process_weights_after_loading(twin)
    return {n: p.detach().contiguous().view(-1).view(torch.uint8).clone() for n, p in twin._parameters.items() if p is not None}


def _shallow(module: torch.nn.Module) -> Any:
    """A module that shares the tensors of another, and on which they can be replaced."""
    twin = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = dict(module.__dict__[registry])
    return twin
