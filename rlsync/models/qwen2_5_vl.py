"""Qwen2.5-VL: the decoder of Qwen2.5 with three-dimensional positions, and a tower whose blocks attend within windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import dense_contradictions, dense_dims, dense_features, dense_stacks, dense_transformer
from rlsync.models.keys import HFConfig, Key, harmless, number, only, size
from rlsync.models.qwen2 import QWEN2_KEYS
from rlsync.models.rope import RopeKind
from rlsync.models.vision import (
    BLOCKS,
    indexes,
    linear,
    outside_the_tower,
    tower_contradictions,
    tower_dims,
    tower_stack,
    vision_family,
    whole,
)

_TEXT: Mapping[str, Key] = {
    "model_type": only("qwen2_5_vl_text", "qwen2_5_vl", default="qwen2_5_vl_text"),
    "num_key_value_heads": size(default=8, is_nullable=True),
    "rms_norm_eps": number("layernorm_epsilon", default=1e-5),
}
QWEN2_5_TOWER_KEYS: Mapping[str, Key] = {
    # Released files of 32B and 72B leave it out.
    "depth": size(default=32, most=10_000),
    "hidden_act": only("silu", default="silu"),
    "patch_size": size(default=14),
    "window_size": size(default=112),
    "fullatt_block_indexes": indexes((7, 15, 23, 31)),
    **harmless("of videos, which are not trained on", "tokens_per_second"),
}


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    return {**dense_dims(values), **tower_dims(values)}


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    hidden, heads, dims = values["hidden_size"], values["num_attention_heads"], _dims(values)
    findings = dense_contradictions(values, config)
    if hidden != heads * dims["head_dim"]:
        findings.append(
            f"hidden_size {hidden} is not num_attention_heads {heads} x head_dim {dims['head_dim']}, which transformers asks for"
        )
    findings += tower_contradictions(values)
    window, square = values["vision_window_size"], values["vision_patch_size"] * values["vision_spatial_merge_size"]
    if window % square:
        findings.append(f"vision_config.window_size {window} is not a multiple of patch_size x spatial_merge_size {square}")
    findings += outside_the_tower("fullatt_block_indexes", values["vision_fullatt_block_indexes"], values["vision_depth"])
    return findings


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    # As transformers reads files that it wrote before its version 5.
    tied = values["tie_word_embeddings"] or bool(values.get("text_config.tie_word_embeddings"))
    return dense_features({**values, "tie_word_embeddings": tied}) | {"qkv_bias"}


QWEN2_5_TOWER_STACKS = (
    tower_stack(whole("patch_embed.proj.weight", "vision", "3", "frames", "patch", "patch")),
    tower_stack(
        whole("norm1.weight", "vision"),
        whole("norm2.weight", "vision"),
        *linear("attn.qkv", "vision_qkv", "vision"),
        *linear("attn.proj", "vision", "vision"),
        *linear("mlp.gate_proj", "vision_ffn", "vision"),
        *linear("mlp.up_proj", "vision_ffn", "vision"),
        *linear("mlp.down_proj", "vision", "vision_ffn"),
        within="blocks.{block}.",
        index=BLOCKS,
    ),
    tower_stack(
        whole("ln_q.weight", "vision"),
        *linear("mlp.0", "merged", "merged"),
        *linear("mlp.2", "hidden", "merged"),
        within="merger.",
        part="vision_projection",
    ),
)

QWEN2_5_VL = vision_family(
    "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VisionTransformerPretrainedModel",
    decoder=QWEN2_KEYS,
    text=_TEXT,
    tower=QWEN2_5_TOWER_KEYS,
    may_be_flat=True,
    rope=RopeKind(theta=1e6, mrope="blocks"),
    dims=_dims,
    contradictions=_contradictions,
    features=_features,
    transformer=dense_transformer,
    stacks=(*QWEN2_5_TOWER_STACKS, *dense_stacks("model.language_model.")),
)
