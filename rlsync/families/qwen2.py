"""Qwen2 and Qwen2.5: always a QKV bias."""

from __future__ import annotations

from rlsync.families.dense import DENSE_RULES, dense_dims, tie_features
from rlsync.families.rules import Family, HFConfig


def _features(config: HFConfig) -> frozenset[str]:
    return tie_features(config, default=False) | {"qkv_bias"}


QWEN2 = Family(("Qwen2ForCausalLM",), dense_dims, _features, DENSE_RULES)
