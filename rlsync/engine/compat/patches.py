"""Faults of vLLM's own reload and weight updates: patched where possible, and otherwise detected before a sync relies on them.

Like compat, it holds private names and version branches of vLLM (0.25.1, 0.32.0). It goes when no supported version has these faults.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from rlsync.engine.compat.engine import UPDATE
from rlsync.engine.compat.layers import LayerKind, attention_layers, layer_kind
from rlsync.engine.plugin import BACKEND

_log = logging.getLogger(__name__)


def apply() -> None:
    """Apply the patches in this process; idempotent."""
    _begin_updates_anew()
    _update_at_once()
    _keep_adapters()
    _find_adapters_in_slots()
    _pack_experts_in_every_load()


def restore_constants(model: torch.nn.Module, vllm_config: Any) -> None:
    """Give a model that was loaded with dummy weights its constants back: no checkpoint has them, so that no sync brings them.

    vLLM 0.32 keeps mean and deviation of pixels as persistent buffers of a tower, to which ``load_format=dummy`` gives random values.
    Needs vLLM's config to be current. It can go when dummy weights spare buffers that no checkpoint has.
    """
    if str(vllm_config.load_config.load_format) != "dummy":
        return
    try:
        from vllm.model_executor.layers.fusion.mm_input_norm import FusedMMInputNorm, build_mm_input_norm
    except ImportError:  # before there was such a layer
        return
    norms = [module for module in model.modules() if isinstance(module, FusedMMInputNorm)]
    fresh = dict(build_mm_input_norm(vllm_config.model_config).named_buffers()) if norms else {}
    with torch.no_grad():
        for norm in norms:
            for name, value in fresh.items():
                norm.get_buffer(name).copy_(value)


def _begin_updates_anew() -> None:
    """Have a worker end an update that somebody left open when the next one begins, instead of refusing that one.

    All workers refuse, and an executor of several processes takes what it does not read for answers to its next calls: see
    ``compat.is_read_last``. Nothing is lost: a version is committed inside its update. Workers of other backends are left alone.
    """
    original = Worker.start_weight_update
    if hasattr(original, "patches"):
        return

    def start_weight_update(self: Any) -> None:
        if self._weight_update_active and self.vllm_config.weight_transfer_config.backend == BACKEND:
            _log.warning("a weight update was left open, by an actor that is gone or did not wait for it; it ends and a new one begins")
            self._weight_update_active = False
        original(self)

    start_weight_update.patches = original  # type: ignore[attr-defined]
    Worker.start_weight_update = start_weight_update


def _update_at_once() -> None:
    """Give a worker a call that is a whole update: each call of a core takes its way to every process of its workers."""

    def update(self: Any, update_info: dict[str, Any]) -> None:
        self.start_weight_update()
        self.update_weights(update_info)
        self.finish_weight_update()

    setattr(Worker, UPDATE, update)


def _keep_adapters() -> None:
    """Have a worker register the adapters that syncs have brought once more when an update has ended, with which it forgets them.

    vLLM 0.28 and later forgets them, because an update may have changed the base under them. Transfer engines of others are left alone.
    """
    original = Worker.finish_weight_update
    if hasattr(original, "patches"):
        return

    def finish_weight_update(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        # A bench puts engines of vLLM's own in the place of rlsync's.
        keep = getattr(self.weight_transfer_engine, "keep_adapters", None)
        if keep is not None:
            keep()

    finish_weight_update.patches = original  # type: ignore[attr-defined]
    Worker.finish_weight_update = finish_weight_update


def _find_adapters_in_slots() -> None:
    """Have a worker that is to load adapters which a sync has brought find them in its slots, under the number that its server gives them.

    The routes of a server name adapters by a folder alone. Transfer engines of others are left alone.
    """
    original = Worker.add_lora
    if hasattr(original, "patches"):
        return

    def add_lora(self: Any, lora_request: Any) -> bool:
        find = getattr(self.weight_transfer_engine, "find_adapter", None)
        return bool((find is not None and find(lora_request)) or original(self, lora_request))

    add_lora.patches = original  # type: ignore[attr-defined]
    Worker.add_lora = add_lora


def _pack_experts_in_every_load() -> None:
    """vLLM's CPU build packs experts in the first load only. Nothing elsewhere.

    vLLM 0.32 packs in the experts' own post-processing, which runs only while there is no kernel yet: a reload leaves plain
    bytes where the kernel reads packed ones. vLLM 0.25 makes the kernel anew each time and is not touched. Not for
    other experts classes: some change scales in place. It can go with the last version for which ``reload_findings`` is not
    empty without it.
    """
    original = UnquantizedFusedMoEMethod._setup_kernel
    if not current_platform.is_cpu() or hasattr(original, "patches"):
        return

    def setup_kernel(self: Any, *args: Any, **kwargs: Any) -> None:
        kernel, layer = self.moe_kernel, kwargs["layer"] if "layer" in kwargs else args[0]
        original(self, *args, **kwargs)
        if kernel is not None and kernel is self.moe_kernel and self.unquantized_backend.name == "CPU":
            kernel.fused_experts.process_weights_after_loading(layer)

    setup_kernel.patches = original  # type: ignore[attr-defined]
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
