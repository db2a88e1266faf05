"""Rotary position embeddings as a Hugging Face config describes them, and the inverse frequencies they mean.

Owns the reading of ``rope_parameters`` (transformers 5) and ``rope_theta`` / ``rope_scaling`` (transformers 4) and the
llama3 frequencies, which Megatron-Core 0.16 computes only for its own constants. Must not know Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rlsync.errors import ConfigError

_SUPPORTED = ("default", "linear", "llama3")
_DEFAULT_THETA = 10000.0  # what transformers assumes for these families where an old config.json names none
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Wavelengths above original/low are stretched by ``factor``, those below original/high kept, between them blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one model.

    Attributes:
        theta: base of the frequencies.
        percent: share of each head's dimensions that rotates, 0 to 1.
        interpolation: positions are divided by it (type "linear"); None otherwise.
        llama3: frequencies are rescaled (type "llama3"); None otherwise.
    """

    theta: float
    percent: float = 1.0
    interpolation: float | None = None
    llama3: Llama3Scaling | None = None


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read the rotary embedding out of the content of a config.json.

    Raises:
        ConfigError: the type is not supported, or a parameter of the type is missing.
    """
    nested = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    per_layer_type = sorted(key for key, value in nested.items() if isinstance(value, Mapping))
    if per_layer_type:
        raise ConfigError(
            f"config.json gives rope_parameters per layer type ({', '.join(per_layer_type)}); only one set for all layers is supported"
        )
    theta = nested.get("rope_theta", config.get("rope_theta", _DEFAULT_THETA))
    percent = nested.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    kind = nested.get("rope_type", nested.get("type", "default"))
    rope = Rope(theta=float(theta), percent=1.0 if percent is None else float(percent))
    if kind == "default":
        return rope
    if kind == "linear":
        return Rope(rope.theta, rope.percent, interpolation=float(_required(nested, kind, "factor")))
    if kind == "llama3":
        low, high, original = (_required(nested, kind, key) for key in _LLAMA3_KEYS)
        scaling = Llama3Scaling(float(_required(nested, kind, "factor")), float(low), float(high), int(original))
        return Rope(rope.theta, rope.percent, llama3=scaling)
    raise ConfigError(f"config.json asks for rope type {kind!r}; supported are {', '.join(_SUPPORTED)}")


def llama3_inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Inverse frequencies of a llama3-scaled rotary embedding: (head_dim * percent / 2,) float32 on the CPU.

    The share of the unscaled frequency rises linearly in 1 / wavelength, from 0 at ``original / low_freq_factor`` to 1 at
    ``original / high_freq_factor``; the rest is the frequency divided by ``factor``.
    """
    assert rope.llama3 is not None, "llama3_inverse_frequencies needs a llama3-scaled rope"
    scaling, dim = rope.llama3, int(head_dim * rope.percent)
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    rotations = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    share = ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain


def _required(nested: Mapping[str, Any], kind: str, key: str) -> Any:
    if nested.get(key) is None:
        raise ConfigError(f"config.json asks for rope type {kind!r} but gives no {key}")
    return nested[key]
