"""Claims about what vLLM computes of a model where there are no GPUs, and what is refused there before an engine starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from rlsync.errors import ConfigError
from tests.unit.test_config import minimal
from tests.unit.test_models_config import DEEPSEEK_V3, QWEN2, QWEN3_MOE
from tests.unit.test_sft_config import minimal as sft_minimal
from workers.config import load_config, validate_engines_on_machine
from workers.config.machine import CPU_HEAD_SIZES, CPU_LATENT_SIZES

BESIDE = {"actor": {"lora": {"r": 4}, "megatron": {"mbridge": True}}, "weight_sync": {"lora": "adapter"}}
LATENT = {**DEEPSEEK_V3, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("sections", "hf_config", "said"),
    [
        (BESIDE, {**QWEN3_MOE, "head_dim": 32}, "weight_sync.lora=adapter: Qwen3MoeForCausalLM has experts"),
        ({}, {**QWEN3_MOE, "head_dim": 32}, ""),
        (BESIDE, {**QWEN2, "hidden_size": 128, "num_attention_heads": 4}, ""),
        ({}, {**QWEN2, "hidden_size": 64, "num_attention_heads": 4}, "config.json: heads of 16, which vLLM's attention on CPU"),
        ({}, {**LATENT, "kv_lora_rank": 32}, "config.json: kv_lora_rank . qk_rope_head_dim of 96, which vLLM's attention on CPU"),
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
