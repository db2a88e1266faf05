"""Qwen3-VL-MoE: the tower of Qwen3-VL on the decoder of Qwen3-MoE, and experts that released files hold stacked and transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import dense_contradictions
from rlsync.models.keys import HFConfig, Key, harmless, only, size
from rlsync.models.moe import expert_dims, expert_stacks, expert_transformer, impossible_choice, without_experts
from rlsync.models.qwen3 import qwen3_features
from rlsync.models.qwen3_moe import QWEN3_MOE_KEYS, num_experts
from rlsync.models.qwen3_vl import QWEN3_TOWER_KEYS, QWEN3_TOWER_STACKS, QWEN3_VL_ROPE, qwen3_tower_contradictions, qwen3_tower_dims
from rlsync.models.vision import vision_family

_TEXT: Mapping[str, Key] = {
    "num_key_value_heads": size(default=16, is_nullable=True),
    "max_position_embeddings": size(default=128000),
    "num_experts": size(default=60),
    # transformers' class says true here whatever the model is.
    **harmless("engines and transformers go by that of the top level", "tie_word_embeddings"),
    "norm_topk_prob": only(
        True, default=True, why="transformers divides the weights of the chosen experts by their sum in any case", engines_need=True
    ),
}


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return {**expert_dims(values, num_experts(values), values["moe_intermediate_size"]), **qwen3_tower_dims(values)}


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    experts = without_experts(values) + impossible_choice(values, num_experts(values))
    return dense_contradictions(values, config) + experts + qwen3_tower_contradictions(values)


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    return expert_transformer({**values, "norm_topk_prob": True}, dims)


QWEN3_VL_MOE = vision_family(
    "Qwen3VLMoeForConditionalGeneration",
    "qwen3_vl_moe",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe:Qwen3VLMoeVisionModel",
    decoder=QWEN3_MOE_KEYS,
    text=_TEXT,
    tower=QWEN3_TOWER_KEYS,
    rope=QWEN3_VL_ROPE,
    dims=_dims,
    contradictions=_contradictions,
    features=qwen3_features,
    transformer=_transformer,
    stacks=(
        *QWEN3_TOWER_STACKS,
        *expert_stacks(hf="model.language_model.", stacked={"orientations": ("columns", "rows"), "released": "columns"}),
    ),
)
