"""SmolLM3: Llama in which some layers know no positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, DENSE_STACKS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import HFConfig, Key, flag, harmless, is_whole, size, unsupported
from rlsync.models.rope import RopeKind
from rlsync.models.stacks import Family

_BIAS = "no released SmolLM3 has biases, and the table of the family lacks them"

_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    "num_key_value_heads": size(default=4, is_nullable=True),
    "max_position_embeddings": size(default=32768),
    "tie_word_embeddings": flag(default=True),
    "attention_bias": unsupported(_BIAS, default=False),
    "mlp_bias": unsupported(_BIAS, default=False),
    "use_sliding_window": unsupported("attention within a window is not supported; no released SmolLM3 uses it", default=False),
    **harmless("read with use_sliding_window only", "sliding_window", "max_window_layers"),
    "no_rope_layers": Key(
        lambda value: isinstance(value, list) and all(is_whole(entry) and entry in (0, 1) for entry in value),
        "a list of 0 and 1, one for each layer: 1 where it has rotary embeddings",
        is_nullable=True,
    ),
    "no_rope_layer_interval": size(default=4),
}


def _turning(values: Mapping[str, Any]) -> list[int]:
    """1 for each layer with rotary embeddings, 0 for the others."""
    layers, named, interval = (values[name] for name in ("num_hidden_layers", "no_rope_layers", "no_rope_layer_interval"))
    return list(named[:layers]) if named is not None else [int((layer + 1) % interval != 0) for layer in range(layers)]


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    named, layers = values["no_rope_layers"], values["num_hidden_layers"]
    findings = dense_contradictions(values, config)
    if named is not None and len(named) < layers:
        findings.append(f"no_rope_layers has {len(named)} entries for num_hidden_layers {layers}")
    return findings


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    return dense_transformer(values, dims) | {"no_rope_freq": [1 - turns for turns in _turning(values)]}


SMOLLM3 = Family(
    architectures=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    keys=_KEYS,
    rope=RopeKind(theta=2e6),
    dims=dense_dims,
    contradictions=_contradictions,
    features=dense_features,
    transformer=_transformer,
    stacks=DENSE_STACKS,
)
