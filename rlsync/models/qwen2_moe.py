"""Qwen2-MoE: Qwen2 with experts, beside which every token also goes through a shared expert behind a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import dense_contradictions, dense_features
from rlsync.models.keys import HFConfig, Key, flag, size
from rlsync.models.layouts import Replicated
from rlsync.models.moe import (
    SPARSE_KEYS,
    expert_dims,
    expert_rules,
    expert_stacks,
    expert_transformer,
    impossible_choice,
    without_experts,
)
from rlsync.models.qwen2 import QWEN_KEYS
from rlsync.models.stacks import Family, HFTensor, Rule

_KEYS: Mapping[str, Key] = {
    **QWEN_KEYS,
    **SPARSE_KEYS,
    "num_key_value_heads": size(default=16, is_nullable=True),
    "num_experts": size(default=60),
    "shared_expert_intermediate_size": size(is_required=True),
    "qkv_bias": flag(default=True),
}
_SHARED = (
    *expert_rules("mlp.shared_experts.", "mlp.shared_expert.", "shared_ffn", ("gate_proj", "up_proj", "down_proj")),
    Rule("mlp.shared_experts.gate_weight", (HFTensor("mlp.shared_expert_gate.weight", "1", "hidden"),), Replicated()),
)


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    dims = expert_dims(values, values["num_experts"], values["moe_intermediate_size"])
    return {**dims, "shared_ffn": values["shared_expert_intermediate_size"]}


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    return dense_contradictions(values, config) + without_experts(values) + impossible_choice(values, values["num_experts"])


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    return dense_features(values) | ({"qkv_bias"} if values["qkv_bias"] else set())


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    return expert_transformer(values, dims) | {
        "moe_shared_expert_intermediate_size": dims["shared_ffn"],
        "moe_shared_expert_gate": True,
    }


QWEN2_MOE = Family(
    architectures=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    keys=_KEYS,
    dims=_dims,
    contradictions=_contradictions,
    features=_features,
    transformer=_transformer,
    stacks=expert_stacks(*_SHARED),
)
