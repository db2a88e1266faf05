"""Llama 2 and 3.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, DENSE_STACKS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import HFConfig, size, unsupported
from rlsync.models.stacks import Family

# transformers' bias covers o_proj too, which Megatron couples to biases in the MLP.
_BIAS = "no released Llama has biases, and the table of the family lacks them"


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    uneven = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, which transformers' Llama asks for"
    return dense_contradictions(values, config) + [uneven] * (hidden % heads != 0)


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    keys={
        **DENSE_KEYS,
        "num_key_value_heads": size(is_nullable=True),
        "max_position_embeddings": size(default=2048),
        "attention_bias": unsupported(_BIAS, default=False),
        "mlp_bias": unsupported(_BIAS, default=False),
        "sliding_window": unsupported(
            "transformers' Llama attends to all tokens whatever it says, and engines only to those in the window"
        ),
    },
    dims=dense_dims,
    contradictions=_contradictions,
    features=dense_features,
    transformer=dense_transformer,
    stacks=DENSE_STACKS,
)
