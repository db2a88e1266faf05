"""Model families as tables: Megatron parameter <-> HF tensors. A new family is one file here and a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.errors import ConfigError
from rlsync.families.llama import LLAMA
from rlsync.families.qwen2 import QWEN2
from rlsync.families.qwen3 import QWEN3
from rlsync.families.rules import Family, Flavour, Model

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3)

__all__ = ["FAMILIES", "Family", "Flavour", "Model", "family_of", "model_of", "supported_architectures"]


def supported_architectures() -> tuple[str, ...]:
    """Values of ``architectures[0]`` that a family exists for, sorted."""
    return tuple(sorted(name for family in FAMILIES for name in family.architectures))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of an HF config. ConfigError lists the supported architectures."""
    architectures = config.get("architectures") or ()
    for family in FAMILIES:
        if architectures and architectures[0] in family.architectures:
            return family
    found = architectures[0] if architectures else f"none (model_type {config.get('model_type')!r})"
    raise ConfigError(f"config.json: unknown architecture {found}; supported are {', '.join(supported_architectures())}")


def model_of(config: Mapping[str, Any]) -> Model:
    """The family of an HF config, bound to its sizes."""
    return Model.from_config(family_of(config), config)
