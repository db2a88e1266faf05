"""Claims about what vLLM computes of a model where there are no GPUs, and what is refused there before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from rlsync.errors import ConfigError
from tests.unit.test_config import minimal
from tests.unit.test_models_config import DEEPSEEK_V3, QWEN2, QWEN3_MOE
from tests.unit.test_sft_config import minimal as sft_minimal
from workers.config import load_config, validate_engines_on_machine
from workers.config.machine import CPU_HEAD_SIZES, CPU_LATENT_SIZES

BESIDE = {"actor": {"lora": {"r": 4}, "megatron": {"mbridge": True}}, "weight_sync": {"lora": "adapter"}}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 64}
LATENT = {**DEEPSEEK_V3, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "rope_scaling": YARN}


@pytest.mark.parametrize(
    ("sections", "hf_config", "said"),
    [
        (BESIDE, {**QWEN3_MOE, "head_dim": 32}, "weight_sync.lora=adapter: Qwen3MoeForCausalLM has experts"),
        ({}, {**QWEN3_MOE, "head_dim": 32}, ""),
        (BESIDE, {**QWEN2, "hidden_size": 128, "num_attention_heads": 4}, ""),
        ({}, {**QWEN2, "hidden_size": 64, "num_attention_heads": 4}, "config.json: heads of 16, which vLLM's attention on CPU"),
        ({}, {**LATENT, "kv_lora_rank": 32}, "config.json: kv_lora_rank . qk_rope_head_dim of 96, which vLLM's attention on CPU"),
        (
            {},
            {**LATENT, "rope_scaling": None},
            "config.json: latent attention without yarn, whose queries vLLM's kernel on CPU turns wrongly",
        ),
        ({}, LATENT, ""),
    ],
)
def test_what_engines_compute_on_gpus_alone_is_refused_on_a_cpu(sections: Any, hf_config: Mapping[str, Any], said: str) -> None:
    """Negative controls: the same with GPUs, and in a run without engines."""
    config = load_config(minimal(**sections))
    if said:
        with pytest.raises(ConfigError, match=said):
            validate_engines_on_machine(config, hf_config, on_gpu=False)
    else:
        validate_engines_on_machine(config, hf_config, on_gpu=False)
    validate_engines_on_machine(config, hf_config, on_gpu=True)
    validate_engines_on_machine(load_config(sft_minimal(**sections), "sft"), hf_config, on_gpu=False)


def test_sizes_of_heads_are_those_of_vllms_kernels() -> None:
    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
    assert tuple(CPUMLABackend.get_supported_head_sizes()) == CPU_LATENT_SIZES


def test_vllms_rotary_kernel_for_cpu_turns_the_heads_of_latent_attention_wrongly() -> None:
    """It takes queries (tokens, heads, size) as latent attention gives them. Negative controls: flat ones, and its own embedding of yarn,
    which has no kernel. A release that turns them all alike lets the refusal go."""
    torch.manual_seed(0)
    queries, keys, positions = torch.randn(5, 2, 64), torch.randn(5, 1, 64), torch.arange(5)

    def worst(rope: dict[str, Any], *, is_flat: bool) -> float:
        with set_current_vllm_config(VllmConfig()):
            rotary = get_rope(64, max_position=512, rope_parameters=rope, is_neox_style=False, dtype=torch.float32)
        expected, _ = rotary.forward_native(positions, queries.clone(), keys.clone())
        given = [tensor.clone().flatten(1) if is_flat else tensor.clone() for tensor in (queries, keys)]
        return float((rotary.forward_cpu(positions, *given)[0].view_as(queries) - expected).abs().max())

    plain, yarn = {"rope_type": "default", "rope_theta": 10000.0}, {**YARN, "rope_type": "deepseek_yarn"}
    assert worst(plain, is_flat=False) > 1 and worst(plain, is_flat=True) < 1e-5 and worst(yarn, is_flat=False) < 1e-5
