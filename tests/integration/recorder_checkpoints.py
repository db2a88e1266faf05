"""Checkpoints of tiny models in which every element is random, for the tests of the recorder. Imports no vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, Qwen3MoeConfig

from tests.models import VOCAB_SIZE, tiny_config

# Under four ranks two key-value heads are held twice, and the vocabulary is padded for any number of ranks.
_MOE = {"vocab_size": VOCAB_SIZE, "hidden_size": 96, "num_attention_heads": 4, "max_position_embeddings": 128}


def config_of(name: str) -> PretrainedConfig:
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            **_MOE, num_hidden_layers=1, num_key_value_heads=2, head_dim=32, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2
        )
    if name == "deepseek_v3":
        return DeepseekV3Config(
            **_MOE, num_hidden_layers=2, first_k_dense_replace=1, num_key_value_heads=4, intermediate_size=160, moe_intermediate_size=64,
            n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=48, kv_lora_rank=32,
            qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
        )  # fmt: skip
    return tiny_config(name, tied=name == "qwen3", num_hidden_layers=2)


MODELS = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3")


def save_random(folder: Path, name: str) -> Path:
    """A checkpoint in which every element is random, in bfloat16; llama in float32, which its model casts."""
    config = config_of(name)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    generator = torch.Generator().manual_seed(7)
    tensors = {n: torch.randn(t.shape, generator=generator) for n, t in load_file(folder / "model.safetensors").items()}
    if name != "llama":
        # Its router computes with a correction in float32.
        tensors = {n: t if n.endswith("e_score_correction_bias") else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if name == "deepseek_v3":
        # transformers forgets this field, without which vLLM has no correction and refuses the checkpoint.
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"topk_method": "noaux_tc"}))
    return folder
