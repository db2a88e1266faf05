"""Rules and families: tables that say which HF tensors make up which Megatron parameter.

A rule's Megatron name is *global*: layer numbers count over the whole model. ``{layer}`` is the only placeholder of a
dense family. Under TransformerEngine some parameters have another name (norms fused into the following linear);
such a rule carries both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlsync.errors import ConfigError, PlacementError
from rlsync.families.layouts import Layout, LocalLayout
from rlsync.layout.geometry import TensorSpec

Flavour = Literal["local", "te"]
Stage = Literal["first", "layer", "last"]
HFConfig = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class HFTensor:
    """HF name template and its shape as names of dims, as ``HFTensor("lm_head.weight", "vocab", "hidden")``."""

    template: str
    dims: tuple[str, ...]

    def __init__(self, template: str, *dims: str) -> None:
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "dims", dims)


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter pattern, the HF tensors in it, and the layout that packs them.

    Attributes:
        megatron: global name under the local spec.
        hf: HF tensors in the order the layout expects.
        te: name under the TransformerEngine spec, where it differs.
        stage: the pipeline stage that owns it.
        when: feature of the model that must be present (see ``Family.features``), or "" for always.
        pipelined_only: the parameter exists only with more than one pipeline stage (the head of a tied model).
    """

    megatron: str
    hf: tuple[HFTensor, ...]
    layout: Layout
    te: str | None = None
    stage: Stage = "layer"
    when: str = ""
    pipelined_only: bool = False

    def name(self, flavour: Flavour, layer: int | None = None) -> str:
        pattern = self.te if flavour == "te" and self.te is not None else self.megatron
        return pattern.format(layer=layer)


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: the architectures it serves, how to read sizes and features from their config, and its rules.

    Attributes:
        architectures: values of ``architectures[0]`` in ``config.json``.
        dims: HF config -> named sizes (``hidden``, ``vocab``, ``q``, ``kv``, ``num_heads`` ...).
        features: HF config -> names that the ``when`` of a rule refers to.
        rules: the table.
        ignored: patterns of HF names that old checkpoints carry and nobody loads.
    """

    architectures: tuple[str, ...]
    dims: Callable[[HFConfig], dict[str, int]]
    features: Callable[[HFConfig], frozenset[str]]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)


@dataclass(frozen=True, slots=True)
class Bound:
    """A rule for one layer: concrete names and HF shapes."""

    rule: Rule
    layer: int | None
    hf: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Model:
    """A family bound to one HF config: every name and size is known, no rank is."""

    family: Family
    dims: Mapping[str, int]
    features: frozenset[str]
    num_layers: int
    dtype: str

    @classmethod
    def from_config(cls, family: Family, config: HFConfig) -> Model:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        return cls(family, family.dims(config), family.features(config), int(config["num_hidden_layers"]), dtype)

    @property
    def tied(self) -> bool:
        return "tied" in self.features

    def rules(self) -> Iterator[Rule]:
        """The rules that apply to this model."""
        return (rule for rule in self.family.rules if not rule.when or rule.when in self.features)

    def bind(self, rule: Rule, layer: int | None) -> Bound:
        shapes = tuple(
            (hf.template.format(layer=layer), tuple(self.dims[d] if not d.isdigit() else int(d) for d in hf.dims)) for hf in rule.hf
        )
        return Bound(rule, layer, shapes)

    def tensors(self, dtype: str | None = None) -> tuple[TensorSpec, ...]:
        """Every HF tensor once, in layer order: embedding, layers ascending, final norm, head."""
        seen: dict[str, tuple[int, ...]] = {}
        stages: tuple[tuple[Stage, tuple[int | None, ...]], ...] = (
            ("first", (None,)),
            ("layer", tuple(range(self.num_layers))),
            ("last", (None,)),
        )
        for stage, layers in stages:
            for layer in layers:
                for rule in self.rules():
                    if rule.stage == stage:
                        seen.update((name, shape) for name, shape in self.bind(rule, layer).hf if name not in seen)
        return tuple(TensorSpec(name, dtype or self.dtype, shape) for name, shape in seen.items())

    def is_ignored(self, hf_name: str) -> bool:
        return any(re.fullmatch(pattern, hf_name) for pattern in self.family.ignored)

    def local_layout(self, bound: Bound, rank: int, size: int) -> LocalLayout:
        """The share of one tensor rank; errors name the parameter and its HF tensors."""
        try:
            return bound.rule.layout.local([shape for _, shape in bound.hf], rank, size, self.dims)
        except PlacementError as error:
            names = ", ".join(f"{name} {shape}" for name, shape in bound.hf)
            raise PlacementError(f"{bound.rule.name('local', bound.layer)} <- {names}: {error}") from None


def required(config: HFConfig, key: str) -> int:
    """An integer of the HF config; ConfigError names the key where it is missing."""
    value = config.get(key)
    if value is None:
        raise ConfigError(f"config.json has no {key!r}, which architecture {config.get('architectures')} needs")
    return int(value)
