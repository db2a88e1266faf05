"""GLM-4: norms after attention and MLP too, neighbouring dimensions of half of each head turn together, gate and up are one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import (
    ATTENTION,
    DENSE_KEYS,
    MLP,
    decoder_stacks,
    dense_contradictions,
    dense_dims,
    dense_features,
    dense_transformer,
    layer_stack,
)
from rlsync.models.keys import Key, flag, number, size
from rlsync.models.layouts import Fused, GatedColumn, Replicated
from rlsync.models.rope import RopeKind
from rlsync.models.stacks import Family, HFTensor, Rule

_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    "num_key_value_heads": size(default=2),
    "head_dim": size(default=128),
    "max_position_embeddings": size(default=131072),
    "rms_norm_eps": number("layernorm_epsilon", default=1.5625e-07),
    "attention_bias": flag(default=True),
}
_BEFORE_MLP, _, _DOWN = MLP
_NORM = ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
_LAYER = (
    *ATTENTION,
    _BEFORE_MLP,
    Rule(
        "mlp.linear_fc1.weight",
        (HFTensor("mlp.gate_up_proj.weight", "ffn + ffn", "hidden"),),
        Fused(GatedColumn(), ("ffn", "ffn")),
    ),
    _DOWN,
    *(Rule(name, (HFTensor(name, "hidden"),), Replicated()) for name in _NORM),
)


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    return dense_features(values) | {"normed_outputs"} | ({"qkv_bias"} if values["attention_bias"] else set())


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    return dense_transformer(values, dims) | {"rotary_interleaved": True}


GLM4 = Family(
    architectures=("Glm4ForCausalLM",),
    model_type="glm4",
    keys=_KEYS,
    rope=RopeKind(partial=0.5),
    dims=dense_dims,
    contradictions=dense_contradictions,
    features=_features,
    transformer=_transformer,
    stacks=decoder_stacks(layer_stack(_LAYER)),
)
