"""LoRA in a worker of vLLM: the layers that wrap others, the slots in which these hold adapters, and which adapter is in which slot.

Private names of vLLM's ``lora`` package are here and nowhere else. Written against vLLM 0.25.1 and 0.32.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from rlsync.engine.handles.adapters import SYNCED_PATH
from rlsync.models.lora import PREFIX

# Of wrapping layers: attributes whose tensors have a slot in each row, of experts and of all others.
EXPERT_STACKS = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked", "adapter_enabled")
_STACKS = ("lora_a_stacked", "lora_b_stacked")


def manager_of(model: Any) -> Any:
    """vLLM's own books of a model's adapters; None for a model without slots."""
    return getattr(model, "lora_manager", None)


def _stacks_of(layer: torch.nn.Module) -> dict[str, Any]:
    """Attributes of one wrapping layer that hold slots, by name: tensors, or tuples of them."""
    names = EXPERT_STACKS if hasattr(layer, "w13_lora_a_stacked") else _STACKS
    return {name: vars(layer)[name] for name in names}


def stacks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that holds slots, by a name made of its layer's path, its attribute and its place there. Its rows are slots."""
    return {
        f"{path}.{attribute}.{i}": tensor
        for path, layer in manager_of(model).modules.items()
        for attribute, held in _stacks_of(layer).items()
        for i, tensor in enumerate(_each(held))
    }


def _each(held: Any) -> tuple[torch.Tensor, ...]:
    return (held,) if isinstance(held, torch.Tensor) else tuple(held)


@contextlib.contextmanager
def one_slot_on_meta(model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """For the moment, layers have one slot and that without memory; gives its tensors by the names of :func:`stacks`."""
    kept = [(layer, _stacks_of(layer)) for layer in manager_of(model).modules.values()]
    try:
        for layer, held in kept:
            for attribute, value in held.items():
                made = tuple(torch.empty_like(tensor[:1], device="meta") for tensor in _each(value))
                vars(layer)[attribute] = made[0] if isinstance(value, torch.Tensor) else made
        yield stacks(model)
    finally:
        for layer, held in kept:
            vars(layer).update(held)


def load(model: Any, tensors: Mapping[str, torch.Tensor], r: int, *, device: str = "meta") -> None:
    """vLLM's own way of an adapter into slot 0: rank ``r``, scaling 1, factors on ``device`` by their names in PEFT."""
    manager = manager_of(model)
    adapter = LoRAModel.from_lora_tensors(
        1,
        {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()},
        PEFTHelper(r=r, lora_alpha=r, target_modules=[]),
        device=device,
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=_renaming(model),
    )
    manager._create_merged_loras_inplace(adapter)
    for path, layer in manager.modules.items():
        factors = manager._get_lora_layer_weights(adapter, path)
        if factors is not None:
            layer.set_lora(0, factors.lora_a, factors.lora_b)


def _renaming(model: Any) -> Any:
    """vLLM's mapper of a model's names as it takes it for adapters: names change, and nothing is stacked by them. None without one."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    for variant in ("get_rename_mapper", "get_unstacked_mapper"):  # the latter before vLLM 0.32
        if hasattr(mapper, variant):
            return getattr(mapper, variant)()
    return mapper


@contextlib.contextmanager
def base_layers(model: torch.nn.Module) -> Iterator[None]:
    """For the moment, every wrapping layer has left its place to the layer that it wraps: the model of an engine without LoRA.

    Nothing may be computed meanwhile. Does nothing for a model without slots.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    prefixed: list[Any] = []
    try:
        for module in list(model.modules()) if manager_of(model) is not None else ():
            if isinstance(module, BaseLayerWithLoRA):
                continue
            for name, child in module._modules.items():
                if isinstance(child, BaseLayerWithLoRA):
                    kept.append((module._modules, name, child))
        for children, name, wrapper in kept:
            children[name] = wrapper.base_layer
            experts: Any = getattr(wrapper.base_layer, "routed_experts", None)
            if getattr(experts, "lora_base_layer_prefix", ""):
                prefixed.append(experts)
                experts.lora_base_layer_prefix = ""
        yield
    finally:
        for children, name, wrapper in kept:
            children[name] = wrapper
        for experts in prefixed:
            experts.lora_base_layer_prefix = "base_layer."


def forget(model: torch.nn.Module, adapter_id: int) -> None:
    """Let no request run on an adapter any more."""
    manager_of(model).remove_adapter(adapter_id)


def register(model: torch.nn.Module, adapters: Sequence[int | None], r: int) -> None:
    """Tell vLLM which adapter each slot holds, by slot; None leaves one alone. Idempotent.

    What vLLM keeps in host memory of an adapter is empty: it would be read where a slot is to be filled again, and slots are not emptied.
    """
    manager = manager_of(model)
    for slot, adapter_id in enumerate(adapters):
        if adapter_id is None or (adapter_id in manager.list_adapters() and manager.lora_index_to_id[slot] == adapter_id):
            continue
        manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, r, {})
        manager._active_adapters[adapter_id] = None
        manager.lora_index_to_id[slot] = adapter_id
        # vLLM 0.25 looks at slots again only where a batch asks for other adapters than the one before.
        manager._last_mapping = None


def newest_slot(model: torch.nn.Module) -> int | None:
    """The slot of the adapter with the highest number; None where no slot has one."""
    manager = manager_of(model)
    held = [] if manager is None else [(adapter, slot) for slot, adapter in enumerate(manager.lora_index_to_id) if adapter is not None]
    return max(held)[1] if held else None


def slots_of(value: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    """Tensors whose rows are slots, by the name of the attribute that holds them; of what is no wrapping layer, none."""
    is_layer = isinstance(value, BaseLayerWithLoRA) and "lora_a_stacked" in vars(value)
    return {name: _each(held) for name, held in _stacks_of(value).items()} if is_layer else {}


def synced_number(lora_request: Any) -> int | None:
    """The number of adapters that a sync has brought, from the path that a server was told for them; None for a folder."""
    scheme, _, number = lora_request.lora_path.partition(":")
    return int(number) if f"{scheme}:" == SYNCED_PATH and number.isdecimal() else None


def request(adapter_id: int, name: str, folder: str | None = None) -> Any:
    """What a request says that is to run on an adapter, which is in ``folder`` or has come by a sync. Its name is part of the keys of the
    prefix cache.
    """
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, adapter_id, f"{name}: it came by a sync, and is in no folder" if folder is None else folder)
