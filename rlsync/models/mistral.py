"""Mistral: Llama without biases, and by default with attention within a window, which is refused."""

from __future__ import annotations

from collections.abc import Mapping

from rlsync.models.dense import DENSE_KEYS, DENSE_STACKS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import Key, harmless, size, unsupported
from rlsync.models.stacks import Family

_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    "num_key_value_heads": size(default=8, is_nullable=True),
    "max_position_embeddings": size(default=131072),
    # A file that is silent means a window of 4096 to transformers and to engines.
    "sliding_window": Key(
        lambda value: value is None,
        "null",
        "attention within a window is not supported; models from Mistral 0.2 on have null",
        is_required=True,
        is_honoured=False,
    ),
    "llama_4_scaling": unsupported("scores that depend on the position are not supported"),
    "ada_rms_norm_t_cond": unsupported("norms that depend on an input are not supported", default=False),
    **harmless("read with ada_rms_norm_t_cond only", "ada_rms_norm_t_cond_dim"),
}

MISTRAL = Family(
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    keys=_KEYS,
    dims=dense_dims,
    contradictions=dense_contradictions,
    features=dense_features,
    transformer=dense_transformer,
    stacks=DENSE_STACKS,
)
