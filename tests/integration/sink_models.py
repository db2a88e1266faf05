"""Checkpoint folders for the sink tests: one tiny model per case and version, in which no parameter is trivial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, Qwen3MoeConfig

from tests.models import VOCAB_SIZE, save_tiny_model

_MOE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


def save_case(folder: Path, case: str, version: str) -> Path:
    """Save version ``a`` or ``b`` of a case, as ``qwen3-bfloat16``. The architecture's name decides the rest."""
    family, dtype = case.split("-")
    seed = ord(version)
    if family in ("qwen2", "qwen3"):
        return save_tiny_model(folder, family, tied=family == "qwen3", seed=seed, dtype=getattr(torch, dtype), num_hidden_layers=2)
    config = {"moe": _qwen3_moe, "mla": _deepseek}[family]()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if family == "mla":
        # transformers' class drops the key without which vLLM has no score correction.
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}))
    return folder


def _qwen3_moe() -> PretrainedConfig:
    return Qwen3MoeConfig(
        **_MOE, num_hidden_layers=1, num_experts=8, num_key_value_heads=2, head_dim=32, decoder_sparse_step=1, mlp_only_layers=[]
    )


def _deepseek() -> PretrainedConfig:
    """vLLM's attention on CPU knows one size of what a key and value are compressed to."""
    return DeepseekV3Config(
        **_MOE, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1,
        num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32,
    )  # fmt: skip
