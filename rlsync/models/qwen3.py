"""Qwen3 dense: RMSNorm over each query and key head, no QKV bias, and a head_dim of its own (128 where the config is silent)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_STACKS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import Key, size, unsupported
from rlsync.models.qwen2 import QWEN_KEYS
from rlsync.models.stacks import Family

QWEN3_KEYS: Mapping[str, Key] = {
    **QWEN_KEYS,
    "head_dim": size(default=128),
    "attention_bias": unsupported("no released Qwen3 has biases, and the table of the family lacks them", default=False),
}


def qwen3_features(values: Mapping[str, Any]) -> frozenset[str]:
    """Features of every Qwen3, which has a norm of each query and key head."""
    return dense_features(values) | {"qk_norm"}


QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    keys=QWEN3_KEYS,
    dims=dense_dims,
    contradictions=dense_contradictions,
    features=qwen3_features,
    transformer=dense_transformer,
    stacks=DENSE_STACKS,
)
