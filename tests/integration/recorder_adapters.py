"""Adapters of experts in vLLM's own layer for them, without the kernel, which CPUs lack: how vLLM loads them is all that is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.lora.model_manager import LoRAModelManager

from rlsync.engine.compat import lora
from rlsync.engine.recorder import record_adapter
from rlsync.layout.geometry import TensorSpec
from tests.integration.recorder_models import differing, executed

EXPERTS, HIDDEN, INTERMEDIATE, R = 4, 12, 16, 4
PATH = "model.layers.0.mlp.experts"


def model_of(tp_rank: int, tp_size: int, ep_rank: int, ep_size: int) -> Any:
    """A model of one layer of experts with two slots for adapters of rank 8, as one worker has it."""
    layer: Any = FusedMoEWithLoRA.__new__(FusedMoEWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(
        hidden_dim=HIDDEN, num_experts=EXPERTS, num_local_experts=EXPERTS // ep_size,
        intermediate_size_per_partition=INTERMEDIATE // tp_size,
        moe_parallel_config=SimpleNamespace(use_ep=ep_size > 1, ep_rank=ep_rank),
    )  # fmt: skip
    layer.tp_rank, layer.tp_size, layer.device, layer._w13_slices = tp_rank, tp_size, torch.device("cpu"), 2
    config = LoRAConfig(max_lora_rank=8, max_loras=2, lora_dtype=torch.bfloat16)
    layer.create_lora_weights(2, config)
    manager: Any = LoRAModelManager.__new__(LoRAModelManager)
    manager.lora_config, manager.modules = config, {PATH: layer}
    manager.packed_modules = {PATH: [f"{PATH}.{e}.{name}" for e in range(EXPERTS) for name in ("gate_proj", "down_proj", "up_proj")]}
    for flag in ("_enable_moe_shared_loras", "_is_non_gated_moe", "is_pooling_model", "_enable_mixed_moe_lora_format"):
        setattr(manager, flag, False)
    model: Any = torch.nn.Module()
    model.lora_manager = manager
    return model


def factors() -> dict[str, torch.Tensor]:
    """Of every expert, float32."""
    generator, found = torch.Generator().manual_seed(0), {}
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            rows, columns = (HIDDEN, INTERMEDIATE) if name == "down_proj" else (INTERMEDIATE, HIDDEN)
            module = f"{PATH}.{expert}.{name}"
            found[f"{module}.lora_A.weight"] = torch.randn(R, columns, generator=generator)
            found[f"{module}.lora_B.weight"] = torch.randn(rows, R, generator=generator)
    return found


def check(tp_rank: int = 0, tp_size: int = 1, ep_rank: int = 0, ep_size: int = 1) -> list[str]:
    """What is recorded, executed, is what vLLM puts into its slot. Returns the factors of which it takes nothing."""
    model, tensors = model_of(tp_rank, tp_size, ep_rank, ep_size), factors()
    before = {name: tensor.clone() for name, tensor in lora.stacks(model).items()}
    specs = [TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in tensors.items()]
    recording = record_adapter(model, specs, R)
    assert not recording.findings and not recording.computed_names, recording
    assert differing(lora.stacks(model), before) == [], "recording has left something"
    buffers, findings = executed(recording, tensors)
    assert not findings, findings
    lora.load(model, tensors, R, device="cpu")
    wanted = {name: tensor[:1] for name, tensor in lora.stacks(model).items()}
    assert buffers.keys() == wanted.keys()
    assert differing(buffers, wanted) == []
    return list(recording.unused_names)
