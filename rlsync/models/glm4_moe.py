"""GLM-4.5: experts after dense layers, chosen by sigmoid scores and a bias, and attention in which half of each head turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import HFConfig, Key, flag, number, size
from rlsync.models.moe import SIGMOID_KEYS, further_layers, sigmoid_contradictions, sigmoid_dims, sigmoid_stacks, sigmoid_transformer
from rlsync.models.rope import RopeKind
from rlsync.models.stacks import Family

_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    **SIGMOID_KEYS,
    "num_key_value_heads": size(default=8),
    "max_position_embeddings": size(default=131072),
    "rms_norm_eps": number("layernorm_epsilon", default=1e-5),
    "attention_bias": flag(default=False),
    "use_qk_norm": flag(default=False),
}


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return {**dense_dims(values), **sigmoid_dims(values)}


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    return dense_contradictions(values, config) + sigmoid_contradictions(values, config)


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    switches = {"qkv_bias": values["attention_bias"], "qk_norm": values["use_qk_norm"]}
    return dense_features(values) | {name for name, is_on in switches.items() if is_on}


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    return dense_transformer(values, dims) | sigmoid_transformer(values, dims)


GLM4_MOE = Family(
    architectures=("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    keys=_KEYS,
    rope=RopeKind(partial=0.5),
    dims=_dims,
    contradictions=_contradictions,
    features=_features,
    transformer=_transformer,
    stacks=sigmoid_stacks(),
    kept=further_layers,
)
