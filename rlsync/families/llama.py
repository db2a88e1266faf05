"""Llama 2 and 3.x. QKV bias only where the config asks for it."""

from __future__ import annotations

from rlsync.errors import ConfigError
from rlsync.families.dense import DENSE_RULES, dense_dims, tie_features
from rlsync.families.rules import Family, HFConfig


def _features(config: HFConfig) -> frozenset[str]:
    if config.get("attention_bias") or config.get("mlp_bias"):
        # HF's Llama bias covers o_proj (and the MLP) too, which Megatron ties to add_bias_linear.
        raise ConfigError("config.json: LlamaForCausalLM with attention_bias or mlp_bias is not supported; no released Llama has them")
    return tie_features(config, default=False)


LLAMA = Family(("LlamaForCausalLM",), dense_dims, _features, DENSE_RULES)
