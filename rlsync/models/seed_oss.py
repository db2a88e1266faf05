"""Seed-OSS: Llama with a head_dim of its own and, by default, biases of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, DENSE_STACKS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import Key, flag, harmless, size, unsupported
from rlsync.models.stacks import Family

_BIAS = "no released Seed-OSS has it, and the table of the family lacks it"

_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    "num_key_value_heads": size(default=8, is_nullable=True),
    "head_dim": size(default=128, is_nullable=True),
    "max_position_embeddings": size(default=524288),
    "attention_bias": flag(default=True),
    "attention_out_bias": unsupported(_BIAS, default=False),
    "mlp_bias": unsupported(_BIAS, default=False),
    # Released files have 0.1.
    **harmless("of transformers' own training step; the actor trains without dropout", "attention_dropout", "residual_dropout"),
}


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    return dense_features(values) | ({"qkv_bias"} if values["attention_bias"] else set())


SEED_OSS = Family(
    architectures=("SeedOssForCausalLM",),
    model_type="seed_oss",
    keys=_KEYS,
    dims=dense_dims,
    contradictions=dense_contradictions,
    features=_features,
    transformer=dense_transformer,
    stacks=DENSE_STACKS,
)
