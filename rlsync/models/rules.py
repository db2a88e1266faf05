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

from rlsync.errors import PlacementError
from rlsync.layout.geometry import TensorSpec
from rlsync.models.keys import HFConfig, Key
from rlsync.models.layouts import Layout, LocalLayout
from rlsync.models.rope import Rope

Flavour = Literal["local", "te"]
Stage = Literal["first", "layer", "last"]


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
    """A model family: the architectures it serves, what their config.json may hold, and the rules of their weights.

    Attributes:
        architectures: values of ``architectures[0]`` in ``config.json``.
        model_type: the value that transformers knows these architectures by.
        keys: every key of config.json that transformers' class reads.
        dims: values of the honoured keys -> named sizes (``hidden``, ``vocab``, ``q``, ``kv``, ``num_heads`` ...).
        contradictions: values and config -> what is wrong between keys that are right by themselves.
        features: values of the honoured keys -> names that the ``when`` of a rule refers to.
        transformer: fields of Megatron's TransformerConfig that are the same for all models of the family.
        rules: the table.
        ignored: patterns of HF names that old checkpoints carry and nobody loads.
    """

    architectures: tuple[str, ...]
    model_type: str
    keys: Mapping[str, Key]
    dims: Callable[[Mapping[str, Any]], dict[str, int]]
    contradictions: Callable[[Mapping[str, Any], HFConfig], list[str]]
    features: Callable[[Mapping[str, Any]], frozenset[str]]
    transformer: Mapping[str, Any]
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
    """A family bound to one HF config: every name and size is known, no rank is. Made by :func:`rlsync.models.model_of`.

    Attributes:
        architecture: as config.json names it.
        dims: named sizes.
        features: names that the ``when`` of a rule refers to.
        num_layers: of the decoder.
        dtype: of the checkpoint by its config, as ``"bfloat16"``.
        max_positions: longest sequence that the model was made for, in tokens.
        rope: rotary embedding.
        transformer: fields of Megatron's TransformerConfig that the config decides, by name; an activation is a name too.
    """

    family: Family
    architecture: str
    dims: Mapping[str, int]
    features: frozenset[str]
    num_layers: int
    dtype: str
    max_positions: int
    rope: Rope
    transformer: Mapping[str, Any]

    @property
    def tied(self) -> bool:
        return "tied" in self.features

    def padded_vocab(self, tp_size: int, make_vocab_size_divisible_by: int = 1) -> int:
        """Rows of the vocabulary in Megatron, over all tp_ranks: a multiple of ``make_vocab_size_divisible_by * tp_size``."""
        multiple = make_vocab_size_divisible_by * tp_size
        return -(-self.dims["vocab"] // multiple) * multiple

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

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What keeps tensors of these shapes, by HF name, from being this model's: missing, unexpected and wrongly shaped ones."""
        wanted = {t.name: t.shape for t in self.tensors()}
        missing = sorted(name for name in wanted if name not in shapes)
        extra = sorted(name for name in shapes if name not in wanted and not self.is_ignored(name))
        wrong = [f"{name}: expected {shape}, stored {shapes[name]}" for name, shape in wanted.items() if shapes.get(name, shape) != shape]
        kinds = (("missing", missing), ("unexpected", extra), ("wrongly shaped", wrong))
        return [f"{kind} {len(names)} tensors: {', '.join(names)}" for kind, names in kinds if names]

    def is_ignored(self, hf_name: str) -> bool:
        return any(re.fullmatch(pattern, hf_name) for pattern in self.family.ignored)

    def local_layout(self, bound: Bound, rank: int, size: int) -> LocalLayout:
        """The share of one tensor rank; errors name the parameter and its HF tensors."""
        try:
            return bound.rule.layout.local([shape for _, shape in bound.hf], rank, size, self.dims)
        except PlacementError as error:
            names = ", ".join(f"{name} {shape}" for name, shape in bound.hf)
            raise PlacementError(f"{bound.rule.name('local', bound.layer)} <- {names}: {error}") from None
