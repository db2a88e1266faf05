"""Mixtral: Llama with experts in every layer, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, dense_contradictions, dense_features, dense_transformer
from rlsync.models.keys import HFConfig, Key, number, size, unsupported
from rlsync.models.moe import ROUTING_KEYS, SOFTMAX_ROUTING, expert_dims, expert_stacks, impossible_choice
from rlsync.models.rope import RopeKind
from rlsync.models.stacks import Family, in_every_layer

_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    **ROUTING_KEYS,
    "num_key_value_heads": size(default=8, is_nullable=True),
    "max_position_embeddings": size(default=131072),
    "rms_norm_eps": number("layernorm_epsilon", default=1e-5),
    "num_local_experts": size(default=8),
    "num_experts_per_tok": size("moe_router_topk", default=2),
    "router_jitter_noise": unsupported("the actor routes without noise; set it to 0.0", default=0.0),
}


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return expert_dims(values, values["num_local_experts"], values["intermediate_size"])


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    return dense_contradictions(values, config) + impossible_choice(values, values["num_local_experts"])


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    # The softmax over the chosen experts is what transformers' softmax, cut and divided by its sum, comes to.
    return {
        **dense_transformer(values, dims),
        **SOFTMAX_ROUTING,
        "num_moe_experts": dims["num_experts"],
        "moe_ffn_hidden_size": dims["expert_ffn"],
        "moe_layer_freq": [1] * dims["num_layers"],
    }


MIXTRAL = Family(
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    keys=_KEYS,
    rope=RopeKind(theta=1e6),
    dims=_dims,
    contradictions=_contradictions,
    features=dense_features,
    transformer=_transformer,
    stacks=expert_stacks(
        block="block_sparse_moe.",
        projections=("w1", "w3", "w2"),
        sparse=in_every_layer,
        dense=None,
        stacked={"renamed": ((".block_sparse_moe.", ".mlp."),)},
    ),
)
