"""Qwen2 and Qwen2.5: always a QKV bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, DENSE_STACKS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import Key, harmless, size, unsupported
from rlsync.models.stacks import Family

# Of Qwen2 and Qwen3 alike.
QWEN_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    "num_key_value_heads": size(default=32, is_nullable=True),
    "max_position_embeddings": size(default=32768),
    "use_sliding_window": unsupported("attention within a window is not supported; no released Qwen2 or Qwen3 uses it", default=False),
    **harmless("read with use_sliding_window only", "sliding_window", "max_window_layers"),
}
QWEN2_KEYS: Mapping[str, Key] = {
    **QWEN_KEYS,
    **harmless("not read: q, k and v of Qwen2 always have biases, o_proj and the MLP none", "attention_bias", "mlp_bias"),
}


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    return dense_features(values) | {"qkv_bias"}


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    keys=QWEN2_KEYS,
    dims=dense_dims,
    contradictions=dense_contradictions,
    features=_features,
    transformer=dense_transformer,
    stacks=DENSE_STACKS,
)
