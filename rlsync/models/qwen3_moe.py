"""Qwen3-MoE: Qwen3 whose layers route each token to some of many experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import dense_contradictions
from rlsync.models.keys import HFConfig, Key, size, unsupported
from rlsync.models.moe import SPARSE_KEYS, expert_dims, expert_stacks, expert_transformer, impossible_choice, without_experts
from rlsync.models.qwen3 import QWEN3_KEYS, qwen3_features
from rlsync.models.stacks import Family

QWEN3_MOE_KEYS: Mapping[str, Key] = {
    **QWEN3_KEYS,
    **SPARSE_KEYS,
    "head_dim": size(is_nullable=True),
    "num_key_value_heads": size(default=4, is_nullable=True),
    # transformers writes num_local_experts, released files have num_experts.
    "num_experts": size(default=128),
    "num_local_experts": size(is_nullable=True),
    "shared_expert_intermediate_size": unsupported("engines would build a shared expert, which transformers' Qwen3-MoE has not", default=0),
}


def num_experts(values: Mapping[str, Any]) -> int:
    """Experts of a layer, whose number has two names."""
    return int(values["num_experts"] if values["num_local_experts"] is None else values["num_local_experts"])


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return expert_dims(values, num_experts(values), values["moe_intermediate_size"])


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    findings = dense_contradictions(values, config) + without_experts(values) + impossible_choice(values, num_experts(values))
    one, other = config.get("num_experts"), config.get("num_local_experts")
    if None not in (one, other) and one != other:
        findings.append(f"num_experts is {one} and num_local_experts is {other}: both name the number of experts; keep one of them")
    return findings


QWEN3_MOE = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    keys=QWEN3_MOE_KEYS,
    dims=_dims,
    contradictions=_contradictions,
    features=qwen3_features,
    transformer=expert_transformer,
    stacks=expert_stacks(),
)
