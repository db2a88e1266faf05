"""Qwen3-VL, dense: the decoder of Qwen3 with interleaved three-dimensional positions, and a tower that also feeds its first layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import dense_contradictions, dense_dims, dense_stacks, dense_transformer
from rlsync.models.keys import HFConfig, Key, only, shown, size
from rlsync.models.qwen3 import QWEN3_KEYS, qwen3_features
from rlsync.models.rope import RopeKind
from rlsync.models.stacks import Index
from rlsync.models.vision import (
    BLOCKS,
    indexes,
    layer_norm,
    linear,
    outside_the_tower,
    tower_contradictions,
    tower_dims,
    tower_stack,
    vision_family,
    whole,
)

QWEN3_TOWER_KEYS: Mapping[str, Key] = {
    "hidden_act": only("gelu_pytorch_tanh", default="gelu_pytorch_tanh"),
    "patch_size": size(default=16),
    "num_position_embeddings": size(default=2304),
    "deepstack_visual_indexes": indexes((8, 16, 24)),
}
QWEN3_VL_ROPE = RopeKind(theta=5e5, mrope="interleaved")
_DEEPSTACK = Index("merger", "num_deepstack")


def qwen3_tower_dims(values: Mapping[str, Any]) -> dict[str, int]:
    """Named sizes of a tower that also feeds the first language layers."""
    return {
        **tower_dims(values),
        "positions": values["vision_num_position_embeddings"],
        "num_deepstack": len(values["vision_deepstack_visual_indexes"]),
    }


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return {**dense_dims(values), **qwen3_tower_dims(values)}


def qwen3_tower_contradictions(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between keys of such a tower and of its language model."""
    findings = list(tower_contradictions(values))
    taken, layers = values["vision_deepstack_visual_indexes"], values["num_hidden_layers"]
    findings += outside_the_tower("deepstack_visual_indexes", taken, values["vision_depth"])
    if len(taken) > layers:
        findings.append(f"vision_config.deepstack_visual_indexes {list(taken)} go into a language layer each, and there are {layers}")
    positions = values["vision_num_position_embeddings"]
    if math.isqrt(positions) ** 2 != positions:
        findings.append(f"vision_config.num_position_embeddings {positions} is not the number of places in a square")
    return findings


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    findings = dense_contradictions(values, config) + qwen3_tower_contradictions(values)
    inner, outer = values["text_config.tie_word_embeddings"], values["tie_word_embeddings"]
    if inner is not None and inner is not outer:
        findings.append(f"tie_word_embeddings is {shown(outer)}, which counts, and {shown(inner)} in text_config; make them equal")
    return findings


QWEN3_TOWER_STACKS = (
    tower_stack(
        whole("patch_embed.proj.weight", "vision", "3", "frames", "patch", "patch"),
        whole("patch_embed.proj.bias", "vision"),
        whole("pos_embed.weight", "positions", "vision"),
    ),
    tower_stack(
        *layer_norm("norm1", "vision"),
        *layer_norm("norm2", "vision"),
        *linear("attn.qkv", "vision_qkv", "vision"),
        *linear("attn.proj", "vision", "vision"),
        *linear("mlp.linear_fc1", "vision_ffn", "vision"),
        *linear("mlp.linear_fc2", "vision", "vision_ffn"),
        within="blocks.{block}.",
        index=BLOCKS,
    ),
    tower_stack(
        *layer_norm("norm", "vision"),
        *linear("linear_fc1", "merged", "merged"),
        *linear("linear_fc2", "hidden", "merged"),
        within="merger.",
        part="vision_projection",
    ),
    tower_stack(
        *layer_norm("norm", "merged"),
        *linear("linear_fc1", "merged", "merged"),
        *linear("linear_fc2", "hidden", "merged"),
        within="deepstack_merger_list.{merger}.",
        index=_DEEPSTACK,
        part="vision_projection",
    ),
)

QWEN3_VL = vision_family(
    "Qwen3VLForConditionalGeneration",
    "qwen3_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLVisionModel",
    decoder=QWEN3_KEYS,
    text={"max_position_embeddings": size(default=128000)},
    tower=QWEN3_TOWER_KEYS,
    rope=QWEN3_VL_ROPE,
    dims=_dims,
    contradictions=_contradictions,
    features=qwen3_features,
    transformer=dense_transformer,
    stacks=(*QWEN3_TOWER_STACKS, *dense_stacks("model.language_model.")),
)
