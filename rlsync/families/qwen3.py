"""Qwen3 dense: RMSNorm over each query and key head, no QKV bias, and a head_dim of its own (128 where the config is silent)."""

from __future__ import annotations

from rlsync.errors import ConfigError
from rlsync.families.dense import DENSE_RULES, dense_dims, tie_features
from rlsync.families.rules import Family, HFConfig


def _dims(config: HFConfig) -> dict[str, int]:
    return dense_dims({"head_dim": 128, **config})


def _features(config: HFConfig) -> frozenset[str]:
    if config.get("attention_bias"):
        raise ConfigError("config.json: Qwen3ForCausalLM with attention_bias is not supported; no released Qwen3 has it")
    return tie_features(config, default=False) | {"qk_norm"}


QWEN3 = Family(("Qwen3ForCausalLM",), _dims, _features, DENSE_RULES)
