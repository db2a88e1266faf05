"""Low-rank adapters on paper: which HF projections have one, and how its two factors lie in Megatron parameters.

Coordinates are PEFT's: every adapted HF projection (out, in) has ``lora_A`` (r, in) and ``lora_B`` (out, r), and adds
``scaling * lora_B @ lora_A``. A Megatron parameter that packs several projections has one parameter of each kind: their A one below the
other, their B packed as the weight is. A factor is cut where its base is cut: columns of A by a row-parallel base, rows of B by a
column-parallel one.

An embedding (vocabulary, hidden) has ``lora_embedding_A`` (r, vocabulary) and ``lora_embedding_B`` (hidden, r), and adds the transpose of
``scaling * B @ A``: it is a row-parallel layer whose inputs are tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlsync.errors import ConfigError
from rlsync.layout.geometry import Box, TensorSpec
from rlsync.models.layouts import (
    Column,
    Fused,
    GatedColumn,
    GroupedQKV,
    HeadColumn,
    Layout,
    LocalLayout,
    Padding,
    Replicated,
    Row,
    Shape,
    VocabPadded,
)
from rlsync.models.layouts import Part as LayoutPart
from rlsync.models.stacks import Bound, Model, Part, Rule
from rlsync.models.stored import stacked_tensor

ALL_LINEAR = "all-linear"
Init = Literal["kaiming", "gaussian"]
# How a base splits its work over the ranks of its tensor axis; "whole": every rank has all of it, as in a vision tower and of the
# projections that compress in latent attention. An adapter's output is in the same state as its base's.
Split = Literal["column", "row", "whole"]
_SPLITS: Mapping[type, Split] = {
    Column: "column",
    HeadColumn: "column",
    GatedColumn: "column",
    GroupedQKV: "column",
    Row: "row",
    Replicated: "whole",
    VocabPadded: "column",
}
# Matrices of the table that have no adapter, by the names of their rules.
_NO_ADAPTER: Mapping[str, str] = {
    "pos_embed.weight": "an embedding of places",
    "mlp.shared_experts.gate_weight": "the gate of a shared expert",
}
# Those that have one where they are named, and not as a part of "all-linear".
EMBEDDING, _HEAD, _ROUTER = "embedding.word_embeddings.weight", "output_layer.weight", "mlp.router.weight"
_WHERE_NAMED = frozenset({EMBEDDING, _HEAD, _ROUTER})
_TIED = (
    "tied: head and embedding are one weight, and an adapter of one of them, merged, would change both; untie them (tie_word_embeddings "
    "false in config.json, and both weights in the files), or leave both out"
)
# Rules of matrices of which engines compute with products that they made of the weight alone.
_ABSORBED = frozenset({"self_attention.linear_kv_up_proj.weight"})
# By architecture: a projection of Hugging Face's that vLLM's class knows as two, whose adapter it does not load.
_DIVIDED: Mapping[str, str] = {"Glm4ForCausalLM": "gate_up_proj"}
# What names in PEFT's files begin with: its wrapper around the model. None of the names below has it.
PREFIX = "base_model.model."
# What follows the name of a module in that of its factors.
A, B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What PEFT's ``LoraConfig`` says of an adapter; names of fields are its own.

    Attributes:
        r: rank, of every adapted projection.
        lora_alpha: the adapter is multiplied by ``lora_alpha / r``, or by ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability with which an element of an adapter's input is dropped in training.
        target_modules: "all-linear", which is all linear layers of the language model's attention, MLPs and experts; a regular expression
            that a whole HF module name has to match; or names that it has to end with. The last two reach layers of a vision tower and its
            mergers, routers, and embedding and head of a model in which they are two weights.
        exclude_modules: the same, of modules that have no adapter; () for none.
        init: of A: "kaiming" (uniform, as PEFT's True) or "gaussian" (deviation 1 / r). B begins at zero. Of an embedding A begins at
            zero, and B with deviation 1.
        seed: of what does not begin at zero. Values depend on it and on the HF name alone, not on the parallel layout.
        target_parameters: names that parameters of transformers have to end with: those with a weight of each expert, such as
            "mlp.experts.gate_up_proj", of which every projection of every expert has an adapter, and routers, "mlp.gate.weight".
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude_modules: str | tuple[str, ...] = ()
    use_rslora: bool = False
    init: Init = "kaiming"
    seed: int = 0
    target_parameters: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class StackedFactors:
    """``lora_A`` of several projections one below the other: whole, or with the columns of a row-parallel base."""

    is_cut: bool

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        cut: Layout = Row() if self.is_cut else Replicated()
        each = [cut.local((shape,), rank, size, dims) for shape in shapes]
        rows, columns = [one.shape[0] for one in each], each[0].shape[1]
        strides = (columns, 1)
        parts = tuple(LayoutPart(source, one.parts[0].box, sum(rows[:source]) * columns, strides) for source, one in enumerate(each))
        return LocalLayout((sum(rows), columns), parts)


@dataclass(frozen=True, slots=True)
class EmbeddingFactor:
    """``lora_embedding_A`` (r, vocabulary): the columns of this rank's rows of the embedding, padded as these are."""

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        ((r, vocabulary),) = shapes
        rows = VocabPadded().local(((vocabulary, 1),), rank, size, dims)
        strides = (rows.shape[0], 1)
        parts = tuple(LayoutPart(0, Box((0, p.box.start[0]), (r, p.box.stop[0])), p.offset, strides) for p in rows.parts)
        return LocalLayout((r, rows.shape[0]), parts, tuple(Padding(p.offset, (r, p.shape[0]), strides) for p in rows.padding))


@dataclass(frozen=True, slots=True)
class PackedFactors:
    """``lora_B`` of the ``sources`` among the projections of a parameter, rows where the weight has theirs.

    Attributes:
        base: layout of the weight.
        rows: of each projection in the weight, adapted or not. Rows of those that are not are padding.
    """

    base: Layout
    rows: tuple[int, ...]
    sources: tuple[int, ...]

    def local(self, shapes: Sequence[Shape], rank: int, size: int, dims: Mapping[str, int]) -> LocalLayout:
        r = shapes[0][1]
        packed = self.base.local([(rows, r) for rows in self.rows], rank, size, dims)
        parts, padding = [], list(packed.padding)
        for part in packed.parts:
            if part.source in self.sources:
                parts.append(LayoutPart(self.sources.index(part.source), part.box, part.offset, part.strides))
            else:
                padding.append(Padding(part.offset, part.box.shape, part.strides))
        return LocalLayout(packed.shape, tuple(parts), tuple(padding))


@dataclass(frozen=True, slots=True)
class AdaptedRule:
    """The two factors that a parameter of one layer has.

    Attributes:
        base: the parameter.
        a, b: its factors, named ``adapter.lora_A`` and ``adapter.lora_B`` of its module.
        split: of the base over its tensor axis.
        sources: which of the base's projections are adapted, in the order of ``a`` and ``b``.
    """

    base: Bound
    a: Bound
    b: Bound
    split: Split
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Adapters:
    """A :class:`LoraSpec` bound to a model. Made by :func:`adapters_of`.

    Attributes:
        modules: HF names of the modules that have an adapter.
        are_all_of_their_names: whether no other matrix of the model has the last name of one of them, but for ``routers``.
        routers: of routers among the modules, the parameter of transformers that PEFT adapts in their place.
    """

    spec: LoraSpec
    modules: frozenset[str]
    are_all_of_their_names: bool
    routers: Mapping[str, str]

    def rules(self, parameters: Iterable[Bound]) -> Iterator[AdaptedRule]:
        """The factors of those parameters that have some, in their order."""
        for bound in parameters:
            sources = tuple(index for index, (name, _) in enumerate(bound.hf) if module_of(name) in self.modules)
            if sources:
                yield self._rule(bound, sources)

    def parameters(self, parameters: Iterable[Bound]) -> Iterator[Bound]:
        """The factors one by one."""
        for rule in self.rules(parameters):
            yield rule.a
            yield rule.b

    def tensors(self, model: Model, dtype: str) -> tuple[TensorSpec, ...]:
        """Every factor as a tensor by its HF name, in layer order."""
        seen: dict[str, TensorSpec] = {}
        for bound in self.parameters(model.parameters()):
            for name, shape in bound.hf:
                seen.setdefault(name, TensorSpec(name, dtype, shape))
        return tuple(seen.values())

    def _rule(self, bound: Bound, sources: tuple[int, ...]) -> AdaptedRule:
        if bound.rule.megatron == EMBEDDING:
            return self._rule_of_embedding(bound)
        split, r = _split(bound.rule.layout), self.spec.r
        modules = [module_of(bound.hf[index][0]) for index in sources]
        shapes = [bound.hf[index][1] for index in sources]
        packed = PackedFactors(bound.rule.layout if split == "column" else Replicated(), tuple(shape[0] for _, shape in bound.hf), sources)
        a = tuple((f"{module}{A}", (r, shape[1])) for module, shape in zip(modules, shapes, strict=True))
        b = tuple((f"{module}{B}", (shape[0], r)) for module, shape in zip(modules, shapes, strict=True))
        return AdaptedRule(
            bound, _factor(bound, "lora_A", StackedFactors(split == "row"), a), _factor(bound, "lora_B", packed, b), split, sources
        )

    def _rule_of_embedding(self, bound: Bound) -> AdaptedRule:
        ((name, (vocabulary, hidden)),) = bound.hf
        module, r = module_of(name), self.spec.r
        a = _factor(bound, "lora_A", EmbeddingFactor(), ((f"{module}{EMBEDDING_A}", (r, vocabulary)),))
        b = _factor(bound, "lora_B", PackedFactors(Replicated(), (hidden,), (0,)), ((f"{module}{EMBEDDING_B}", (hidden, r)),))
        return AdaptedRule(bound, a, b, "row", (0,))


def _split(layout: Layout) -> Split:
    return _split(layout.layout) if isinstance(layout, Fused) else _SPLITS[type(layout)]


def _factor(bound: Bound, name: str, layout: Layout, hf: tuple[tuple[str, Shape], ...]) -> Bound:
    # The rule is what layouts are remembered by; its name tells experts and towers from the rest.
    rule = Rule(f"{bound.stack.megatron}{bound.rule.megatron}.{name}", (), layout, when=bound.rule.when)
    local = f"{module_of(bound.local)}.adapter.{name}"
    return replace(bound, rule=rule, local=local, te=local, joined="", hf=hf)


def module_of(name: str) -> str:
    """The module of a weight, by the weight's name."""
    return name.removesuffix(".weight")


def adapters_of(model: Model, spec: LoraSpec) -> Adapters:
    """The adapters of a model. Raises ConfigError with everything that :func:`check_adapters` finds."""
    findings = check_adapters(model, spec)
    if findings:
        raise ConfigError("; ".join(findings))
    linear, other = _matrices(model)
    chosen = frozenset(_chosen(model, spec, linear))
    rest = _last_names(module for module in (*linear, *other) if module not in chosen)
    routers = {module: name for module, name in router_parameters(model).items() if module in chosen}
    last = set(_last_names(chosen - routers.keys()))
    # A number is the name of blocks too.
    return Adapters(spec, chosen, not last & set(rest) and not any(name.isdigit() for name in last), routers)


def check_adapters(model: Model, spec: LoraSpec) -> list[str]:
    """What is wrong with a spec by itself and for a model, in words; empty where nothing is."""
    findings = []
    if spec.r < 1:
        findings.append(f"LoRA's r is {spec.r}; the rank must be at least 1")
    if not math.isfinite(spec.lora_alpha):
        findings.append(f"lora_alpha is {spec.lora_alpha}; it must be a finite number")
    if not 0 <= spec.lora_dropout < 1:
        findings.append(f"lora_dropout is {spec.lora_dropout}; it is a probability below 1")
    for name in ("target_modules", "exclude_modules"):
        pattern = getattr(spec, name)
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            return [*findings, f"{name} {pattern!r} is not a regular expression: {error}"]
    linear, other = _matrices(model)
    if spec.target_modules != ALL_LINEAR:
        for module, what in other.items():
            if _is_chosen(spec, module, "language_model"):
                findings.append(
                    f"target_modules {_shown(spec)} match {module}, which is {what}; it has no adapter: leave it out, by exclude_modules "
                    "where a name is that of others too"
                )
                break
    chosen = frozenset(_chosen(model, spec, linear))
    if not chosen:
        names: dict[bool, dict[str, None]] = {True: {}, False: {}}
        for module, part in linear.items():
            names[part is None].setdefault(re.sub(r".*\.(?=[^.]*[^.\d][^.]*(\.\d+)?$)", "", module))
        also = f", and where they are named {', '.join(names[True])}" if names[True] else ""
        findings.append(
            f"target_modules {_shown(spec)} match no linear layer of {model.architecture}; it has {', '.join(names[False])}{also}"
        )
    elif not isinstance(spec.target_modules, str):
        # PEFT passes over a name that matches nothing beside others that do.
        idle = [name for name in spec.target_modules if not any(_ends_with(module, name) for module in (*linear, *other))]
        findings += [f"target_modules name {name}, which no linear layer of {model.architecture} is called" for name in idle]
    named = set(_parameters(model).values()) if spec.target_parameters else set()
    idle = [name for name in spec.target_parameters if not any(_ends_with(parameter, name) for parameter in named)]
    findings += [f"target_parameters name {name}, which no experts or routers of {model.architecture} are called" for name in idle]
    if spec.lora_dropout and (routers := [module for module in router_parameters(model) if module in chosen]):
        findings.append(f"lora_dropout is {spec.lora_dropout}, and {routers[0]} is a router, whose adapter has none in PEFT: set it to 0")
    return findings


def without_idle_targets(model: Model, spec: LoraSpec) -> LoraSpec:
    """The spec of an adapter folder without the names in ``target_modules`` that no matrix of a model is called: PEFT passes over them, and
    writes some itself. Unlike in a run's spec nothing is left out by that, because the folder's tensors say what has adapters."""
    if isinstance(spec.target_modules, str):
        return spec
    linear, other = _matrices(model)
    found = tuple(name for name in spec.target_modules if any(_ends_with(module, name) for module in (*linear, *other)))
    return replace(spec, target_modules=found) if found or spec.target_parameters else spec


def idle_exclusions(model: Model, spec: LoraSpec) -> list[str]:
    """What ``exclude_modules`` say that no matrix of a model is called, in words: layers that somebody meant to leave out would be trained.

    Of a spec that :func:`check_adapters` finds nothing wrong with, and not of an adapter folder's, whose tensors say what has adapters.
    """
    linear, other = _matrices(model)
    names = (spec.exclude_modules,) if isinstance(spec.exclude_modules, str) else spec.exclude_modules
    tried = {name: name if isinstance(spec.exclude_modules, str) else (name,) for name in names}
    idle = [name for name, wanted in tried.items() if not any(_matches(wanted, module) for module in (*linear, *other))]
    return [f"exclude_modules name {name}, which no layer of {model.architecture} is called" for name in idle]


def check_beside_base(model: Model, adapters: Adapters) -> list[str]:
    """What engines would leave out of adapters that are sent beside their base, or not take, in words; empty where nothing is."""
    findings = [
        _of_named(model, adapters),
        _of_towers(model, adapters),
        _of_parts_of_experts(model, adapters),
        _of_absorbed(model, adapters),
        _of_divided(model, adapters),
    ]
    return [f"{finding}, or set weight_sync.lora to merged" for finding in findings if finding is not None]


def _of_named(model: Model, adapters: Adapters) -> str | None:
    found = [module for module, part in _matrices(model)[0].items() if part is None and module in adapters.modules]
    return f"{found[0]} has an adapter, for which engines have no slot; leave it out" if found else None


def _of_towers(model: Model, adapters: Adapters) -> str | None:
    linear, _ = _matrices(model)
    found = [module for module, part in linear.items() if part not in ("language_model", None) and module in adapters.modules]
    return f"{found[0]} has an adapter: slots of engines are for the language model; name it in exclude_modules" if found else None


def _of_parts_of_experts(model: Model, adapters: Adapters) -> str | None:
    experts: dict[tuple[int, ...], list[str]] = {}
    for bound in model.parameters():
        if bound.joined:
            experts.setdefault(bound.numbers, []).extend(module_of(name) for name, _ in bound.hf)
    for modules in experts.values():
        chosen = [module for module in modules if module in adapters.modules]
        if chosen and len(chosen) < len(modules):
            without = ", ".join(_last_names(module for module in modules if module not in chosen))
            return f"{chosen[0]} has an adapter: engines take those of all projections of an expert or none; add {without}"
    return None


def _of_absorbed(model: Model, adapters: Adapters) -> str | None:
    absorbed = [
        module
        for bound in model.parameters()
        if bound.rule.megatron in _ABSORBED
        for module in (module_of(name) for name, _ in bound.hf)
        if module in adapters.modules
    ]
    if not absorbed:
        return None
    return (
        f"{len(absorbed)} layers have adapters of {_last_names(absorbed)[0]}, as {absorbed[0]}: engines of latent attention answer from "
        "products of its weight alone, and would leave them out; name it in exclude_modules"
    )


def _of_divided(model: Model, adapters: Adapters) -> str | None:
    divided = _DIVIDED.get(model.architecture)
    found = [module for module in adapters.modules if module.rpartition(".")[2] == divided]
    if not found:
        return None
    return (
        f"{len(found)} layers have adapters of {divided}, as {found[0]}: vLLM has slots for those of two projections in its place; name "
        "it in exclude_modules"
    )


def _shown(spec: LoraSpec) -> str:
    return spec.target_modules if isinstance(spec.target_modules, str) else ", ".join((*spec.target_modules, *spec.target_parameters))


def _matrices(model: Model) -> tuple[dict[str, Part | None], dict[str, str]]:
    """HF modules with a matrix of weights: those that can have an adapter with the part of the model that "all-linear" reaches them in,
    None where it does not; and others with what they are."""
    chosen: dict[str, Part | None] = {}
    other: dict[str, str] = {}
    for bound in model.parameters():
        for name, shape in bound.hf:
            if len(shape) < 2 or not name.endswith(".weight"):
                continue
            module, what = module_of(name), _NO_ADAPTER.get(bound.rule.megatron, "a convolution" if len(shape) > 2 else None)
            if model.tied and bound.rule.megatron in (EMBEDDING, _HEAD):
                what = _TIED
            if what is None:
                chosen[module] = None if bound.rule.megatron in _WHERE_NAMED else bound.stack.part
            else:
                other[module] = what
    return chosen, {**other, **dict.fromkeys(_tied_heads(model), _TIED)}


def _tied_heads(model: Model) -> Iterator[str]:
    """The module that transformers has for the head of a model in which it is no weight of its own."""
    if model.tied:
        for stack in model.family.stacks:
            yield from (
                module_of(stack.hf + rule.hf[0].template) for rule in stack.rules if rule.megatron == _HEAD and rule.when == "untied"
            )


def _last_names(modules: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def _chosen(model: Model, spec: LoraSpec, linear: Mapping[str, Part | None]) -> list[str]:
    """The modules that have an adapter, among those that can have one."""
    parameters = _parameters(model) if spec.target_parameters else {}
    return [
        module
        for module, part in linear.items()
        if _is_chosen(spec, module, part) or _matches(spec.target_parameters, parameters.get(module, ""))
    ]


def _parameters(model: Model) -> dict[str, str]:
    """Module of a router, or of a projection of an expert -> the parameter of transformers that is it, or that has it beside those of all
    other experts."""
    experts = (bound for bound in model.parameters() if bound.stack.stacked is not None)
    return router_parameters(model) | {module_of(name): stacked_tensor(bound, None)[0] for bound in experts for name, _ in bound.hf}


def router_parameters(model: Model) -> dict[str, str]:
    """Module of a router in files -> the parameter that transformers has for it, whose routers are no linear layers."""
    renamed = [pair for stack in model.family.stacks if stack.stacked is not None for pair in stack.stacked.renamed]
    found = {}
    for bound in model.parameters():
        if bound.rule.megatron == _ROUTER:
            ((name, _),) = bound.hf
            parameter = name
            for before, after in renamed:
                parameter = parameter.replace(before, after)
            found[module_of(name)] = parameter
    return found


def _is_chosen(spec: LoraSpec, module: str, part: Part | None) -> bool:
    is_target = part == "language_model" if spec.target_modules == ALL_LINEAR else _matches(spec.target_modules, module)
    return is_target and not (spec.exclude_modules and _matches(spec.exclude_modules, module))


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a module is among names, as PEFT reads ``target_modules`` and ``exclude_modules``."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(_ends_with(module, name) for name in names)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
