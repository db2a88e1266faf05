"""Rules, stacks and families: tables that say which HF tensors make up which Megatron parameter, and which ranks hold it.

A rule is one parameter and the HF tensors in it. A stack is rules that repeat over the same numbers (layers, experts) and are cut by the
same parallel axes; dense layers before layers of experts, experts, a vision tower and layers that predict further tokens are stacks of
one model. Megatron names are *global*: numbers count over the whole model, as in HF names. A persistent buffer of a module is a rule
like a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from typing import Any, Literal, get_args

from rlsync.errors import PlacementError
from rlsync.layout.geometry import TensorSpec
from rlsync.models.keys import HFConfig, Key, Section
from rlsync.models.layouts import Layout, LocalLayout
from rlsync.models.rope import Rope, RopeKind

# How a parameter is called: by Megatron's local spec, or by TransformerEngine's, which fuses norms into the linear that follows.
Flavour = Literal["local", "te"]
# Megatron's modules that hold the experts of a layer on a rank: a module for each, a parameter for each, and two parameters for all.
ExpertModule = Literal["SequentialMLP", "TEGroupedMLP", "GroupedMLP"]


# What of a model is trained or left as it is, with a learning rate of its own: the language model, the vision tower without its mergers,
# and the mergers, which project its features into the language model.
Part = Literal["language_model", "vision_model", "vision_projection"]
PARTS: tuple[Part, ...] = get_args(Part)

# Features of a family that Megatron is told by a field of its TransformerConfig, too.
FEATURE_FIELDS: Mapping[str, str] = {"qkv_bias": "add_qkv_bias", "qk_norm": "qk_layernorm"}

# HF names that old checkpoints carry, and that neither transformers nor vLLM loads.
NEVER_LOADED = (r".*\.rotary(_pos)?_emb\.inv_freq", r".*\.rotary_emb\.(cos|sin)_cached")


@dataclass(frozen=True, slots=True)
class HFTensor:
    """HF name template and its shape as names of dims, numbers or sums of such, as ``HFTensor("lm_head.weight", "vocab", "hidden")``."""

    template: str
    dims: tuple[str, ...]

    def __init__(self, template: str, *dims: str) -> None:
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "dims", dims)


@dataclass(frozen=True, slots=True)
class Rule:
    """One Megatron parameter, the HF tensors in it, and the layout that packs them.

    Attributes:
        megatron: name under the local spec, after the prefix of its stack.
        hf: HF tensors in the order the layout expects, by names after the HF prefix of its stack.
        te: name under the TransformerEngine spec, where it differs; of an expert's matrix in TEGroupedMLP, under whichever spec.
        joined: name of the parameter of GroupedMLP that has an expert's matrix beside those of the rank's other experts, or "".
        when: feature of the model that must be present (see ``Family.features``), or "" for always.
        pipelined_only: the parameter exists only with more than one pipeline stage (the head of a tied model).
    """

    megatron: str
    hf: tuple[HFTensor, ...]
    layout: Layout
    te: str | None = None
    joined: str = ""
    when: str = ""
    pipelined_only: bool = False


@dataclass(frozen=True, slots=True)
class Index:
    """A number that stands in names and counts copies of a stack.

    Attributes:
        name: its placeholder, as ``layer`` for ``{layer}``.
        count: the dim of the model that says how many there are.
        axis: the parallel axis whose ranks share them: "pp" (layers over stages and their virtual chunks), "ep" (equal consecutive
            blocks), or "" where every rank that has the stack has all of them.
    """

    name: str
    count: str
    axis: Literal["pp", "ep", ""] = ""


def in_every_layer(model: Model, layer: int) -> bool:
    """The predicate of a stack without exceptions."""
    return True


# How a matrix of an expert lies in a tensor of all experts: (experts, rows, columns) or (experts, columns, rows).
Orientation = Literal["rows", "columns"]


@dataclass(frozen=True, slots=True)
class Stacked:
    """The other form of a stack of experts in files: one tensor for each of its rules, with that matrix of all experts of a layer.

    A rule's HF tensors follow one another in the rows of its matrix.

    Attributes:
        tensors: HF names in the order of the rules.
        orientations: those that files of the family exist in. With several the shapes have to tell.
        released: how released checkpoints have it, or None where they have tensors for each expert.
        renamed: parts of the names of other tensors that are different in such files: (in the table, there).
    """

    tensors: tuple[str, ...]
    orientations: tuple[Orientation, ...] = ("rows",)
    released: Orientation | None = None
    renamed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """Parameters that repeat over the same numbers and are cut by the same axes.

    Attributes:
        rules: the parameters of one copy.
        megatron: global Megatron names begin with it; the names of ``indices`` in braces.
        hf: HF names begin with it.
        indices: outermost first, layers before what lies in a layer; () for parameters that a model has once.
        stage: the pipeline stage that has all of it, or "" where an index says which stages do.
        tensor_axis: the axis of the layouts: "tp", or "etp" for experts.
        has_layer: model and first number -> whether the copy exists. Not asked where there is no index.
        dtype: of parameters that are in this dtype whatever the model is in, or "".
        part: of the model that it belongs to.
        stacked: how files may hold it otherwise, or None.
    """

    rules: tuple[Rule, ...]
    megatron: str = ""
    hf: str = ""
    indices: tuple[Index, ...] = ()
    stage: Literal["first", "last", ""] = ""
    tensor_axis: Literal["tp", "etp"] = "tp"
    has_layer: Callable[[Model, int], bool] = in_every_layer
    dtype: str = ""
    part: Part = "language_model"
    stacked: Stacked | None = None

    def names(self, rule: Rule, numbers: Mapping[str, int]) -> tuple[str, str, str]:
        """Megatron names of a parameter under the local and the TransformerEngine spec and in GroupedMLP ("" where it is none of its),
        with these numbers for the indices."""
        names = (rule.megatron, rule.te or rule.megatron, rule.joined)
        local, te, joined = ((self.megatron + name).format(**numbers) if name else "" for name in names)
        return local, te, joined


def renamed(stacks: Iterable[Stack], names: Mapping[str, str]) -> tuple[Stack, ...]:
    """Stacks whose HF names are called otherwise: parts of names (whole words between dots) -> what stands in their place.

    The longest part that begins at a word is the one that counts: ``{"model.layers": "transformer.blocks", "model": "transformer"}``.
    Raises ValueError for a part that no name has, and for a name that two tensors would have.
    """
    pattern = re.compile(rf"(?<![^.])({'|'.join(re.escape(part) for part in sorted(names, key=len, reverse=True))})(?![^.])")
    found: set[str] = set()
    before: dict[str, str] = {}

    def name(template: str) -> str:
        found.update(pattern.findall(template))
        made = pattern.sub(lambda part: names[part[0]], template)
        if before.setdefault(made, template) != template:
            raise ValueError(f"renamed: {before[made]} and {template} would both be called {made}")
        return made

    def rule_of(rule: Rule, hf: str) -> Rule:
        return replace(rule, hf=tuple(HFTensor(name(hf + tensor.template), *tensor.dims) for tensor in rule.hf))

    def stack_of(stack: Stack) -> Stack:
        stacked = stack.stacked and replace(stack.stacked, tensors=tuple(map(name, stack.stacked.tensors)))
        return replace(stack, rules=tuple(rule_of(rule, stack.hf) for rule in stack.rules), hf="", stacked=stacked)

    made = tuple(map(stack_of, stacks))
    if names.keys() - found:
        raise ValueError(f"renamed: no HF name of the stacks has {', '.join(sorted(names.keys() - found))} between dots")
    return made


# The numbers of every index of a stack that somebody holds, or None where the stack is not theirs.
Shares = Callable[[Stack], Sequence[Sequence[int]] | None]


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the files of one checkpoint begin its HF names: (prefix in the table, prefix in the files), the longest in the files first."""

    prefixes: tuple[tuple[str, str], ...] = ()

    def stored(self, name: str) -> str:
        """The name in the files of a tensor of the table."""
        return _respelled(name, self.prefixes)

    def canonical(self, name: str) -> str:
        """The name in the table of a tensor of the files."""
        return _respelled(name, tuple((stored, canonical) for canonical, stored in self.prefixes))


def _respelled(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    return next((after + name[len(before) :] for before, after in prefixes if name.startswith(before)), name)


@dataclass(frozen=True, slots=True)
class Vision:
    """The vision tower of a model, and how pictures stand among its tokens.

    Attributes:
        image_token_id: stands once for each merged patch of a picture.
        video_token_id: the same for videos.
        vision_start_token_id: comes before the tokens of a picture or video.
        vision_end_token_id: comes after them.
        patch_size: height and width of a patch, in pixels.
        temporal_patch_size: frames in a patch; a picture is repeated to fill them.
        spatial_merge_size: so many patches in height and in width become one token.
        in_channels: of a picture.
        deepstack_visual_indexes: blocks whose output goes, through mergers of their own, into the language layers 0, 1, ...; ascending.
        config: content of ``vision_config``, from which transformers makes the tower.
        tower: transformers' class of it, as module:class.
    """

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    deepstack_visual_indexes: tuple[int, ...]
    config: Mapping[str, Any]
    tower: str

    @property
    def placeholders(self) -> tuple[int, int]:
        """Ids of the tokens that stand for pictures and for videos. No policy may draw them: there would be none to score them by."""
        return self.image_token_id, self.video_token_id

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch: columns of ``pixel_values``."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True, slots=True)
class Family:
    """A model family: the architectures it serves, what their config.json may hold, and the rules of their weights.

    Attributes:
        architectures: values of ``architectures[0]`` in ``config.json``.
        model_type: the value that transformers knows these architectures by.
        keys: every key at the top level of config.json that transformers' class reads.
        dims: values of the honoured keys -> named sizes (``hidden``, ``vocab``, ``q``, ``kv``, ``num_heads`` ...).
        contradictions: values and config -> what is wrong between keys that are right by themselves.
        features: values of the honoured keys -> names that the ``when`` of a rule refers to.
        transformer: values and sizes -> fields of Megatron's TransformerConfig beside those that take a key as it is (``Key.field``) and
            those of the features (``FEATURE_FIELDS``).
        stacks: the table. Stacks that follow one another and have the same stage and first index are walked layer by layer.
        ignored: patterns of HF names that old checkpoints carry and nobody loads.
        kept: values -> what HF names begin with of tensors that are neither trained nor synced, and lie in every saved folder as they
            were in the first, whatever they are.
        spellings: prefix of HF names in the table -> prefixes that checkpoints have in its place, for the same tensors.
        sections: configs of parts of the model inside config.json, the language model's first; () where the top level is that.
        rope: what transformers' class makes of rotary embeddings.
        vision: values and content of ``vision_config`` -> the tower, or None for a model of text.
    """

    architectures: tuple[str, ...]
    model_type: str
    keys: Mapping[str, Key]
    dims: Callable[[Mapping[str, Any]], dict[str, int]]
    contradictions: Callable[[Mapping[str, Any], HFConfig], list[str]]
    features: Callable[[Mapping[str, Any]], frozenset[str]]
    transformer: Callable[[Mapping[str, Any], Mapping[str, int]], Mapping[str, Any]]
    stacks: tuple[Stack, ...]
    ignored: tuple[str, ...] = NEVER_LOADED
    kept: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda values: ()
    spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sections: tuple[Section, ...] = ()
    rope: RopeKind = RopeKind()
    vision: Callable[[Mapping[str, Any], HFConfig], Vision] | None = None

    @property
    def known_keys(self) -> Mapping[str, Key]:
        """Keys that may stand at the top level: its own, and those of a section that may be flat."""
        flat = {name: key for section in self.sections if section.may_be_flat for name, key in section.keys.items()}
        return {**flat, **self.keys}


@dataclass(frozen=True, slots=True)
class Bound:
    """A rule of a stack for one layer, one expert: names and HF shapes without placeholders.

    ``local`` and ``te`` are the global Megatron names under the two specs, ``joined`` that of GroupedMLP's parameter or "", ``numbers``
    those of the indices of the stack, and ``copies`` how many there are of the innermost one in the whole model.
    """

    rule: Rule
    stack: Stack
    local: str
    te: str
    joined: str
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    numbers: tuple[int, ...] = ()
    copies: int = 1

    def name(self, flavour: Flavour, experts: ExpertModule | None = None) -> str:
        """The Megatron name. ``experts`` None means the module that the spec has where nobody asks for another."""
        if self.joined and experts is not None:
            return {"SequentialMLP": self.local, "TEGroupedMLP": self.te, "GroupedMLP": self.joined}[experts]
        return self.te if flavour == "te" else self.local


@dataclass(frozen=True)
class Model:
    """A family bound to one HF config: every name and size is known, no rank is. Made by :func:`rlsync.models.model_of`.

    Attributes:
        architecture: as config.json names it.
        values: of the keys of config.json that the family honours.
        dims: named sizes.
        features: names that the ``when`` of a rule refers to.
        dtype: of the checkpoint by its config, as ``"bfloat16"``.
        max_positions: longest sequence that the model was made for, in tokens.
        rope: rotary embedding.
        transformer: fields of Megatron's TransformerConfig that the config decides, by name; an activation is a name too.
        vision: the vision tower; None for a model of text.
    """

    family: Family
    architecture: str
    values: Mapping[str, Any]
    dims: Mapping[str, int]
    features: frozenset[str]
    dtype: str
    max_positions: int
    rope: Rope
    transformer: Mapping[str, Any]
    vision: Vision | None = None

    @property
    def tied(self) -> bool:
        return "tied" in self.features

    def padded_vocab(self, tp_size: int, make_vocab_size_divisible_by: int = 1) -> int:
        """Rows of the vocabulary in Megatron, over all tp_ranks: a multiple of ``make_vocab_size_divisible_by * tp_size``."""
        multiple = make_vocab_size_divisible_by * tp_size
        return -(-self.dims["vocab"] // multiple) * multiple

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.dims["num_layers"]

    def parameters(self, shares: Shares | None = None) -> Iterator[Bound]:
        """Rules bound to the numbers in ``shares`` (None: all of them), in the order of the table and layer by layer."""
        shares = shares or (lambda stack: [range(self.dims[index.count]) for index in stack.indices])
        for _, stacks in groupby(self.family.stacks, key=lambda stack: (stack.stage, stack.indices[:1])):
            found = [
                (numbers, rule, stack)
                for stack in stacks
                if (held := shares(stack)) is not None
                for rule in stack.rules
                if not rule.when or rule.when in self.features
                for numbers in product(*held)
                if not numbers or stack.has_layer(self, numbers[0])
            ]
            found.sort(key=lambda entry: entry[0][:1])
            yield from (self._bind(rule, stack, numbers) for numbers, rule, stack in found)

    def _bind(self, rule: Rule, stack: Stack, numbers: tuple[int, ...]) -> Bound:
        placed = dict(zip((index.name for index in stack.indices), numbers, strict=True))
        local, te, joined = stack.names(rule, placed)
        hf = tuple(((stack.hf + tensor.template).format(**placed), tuple(map(self._size, tensor.dims))) for tensor in rule.hf)
        copies = self.dims[stack.indices[-1].count] if stack.indices else 1
        return Bound(rule, stack, local, te, joined, hf, numbers, copies)

    def _size(self, dim: str) -> int:
        return sum(int(name) if name.isdigit() else self.dims[name] for name in dim.split(" + "))

    def tower_parts(self) -> dict[str, Part]:
        """Parameters outside the language model, by Megatron name: which part they belong to. Empty for a model of text."""
        return {bound.local: bound.stack.part for bound in self.parameters() if bound.stack.part != "language_model"}

    def tensors(self, dtype: str | None = None) -> tuple[TensorSpec, ...]:
        """Every HF tensor once, in layer order: embedding, layers ascending, final norm, head. ``dtype`` is the parameters'."""
        seen: dict[str, TensorSpec] = {}
        for bound in self.parameters():
            for name, shape in bound.hf:
                seen.setdefault(name, TensorSpec(name, bound.stack.dtype or dtype or self.dtype, shape))
        return tuple(seen.values())

    def spelling(self, names: Iterable[str]) -> Spelling:
        """How a checkpoint with tensors of these names spells them. Raises PlacementError where it does so in two ways."""
        known = {prefix: canonical for canonical, others in self.family.spellings.items() for prefix in (canonical, *others)}
        longest = sorted(known, key=len, reverse=True)
        found: dict[str, dict[str, str]] = {}  # canonical prefix -> prefix -> a name that begins with it
        for name in names:
            prefix = next((prefix for prefix in longest if name.startswith(prefix)), None)
            if prefix is not None:
                found.setdefault(known[prefix], {}).setdefault(prefix, name)
        for canonical, prefixes in found.items():
            if len(prefixes) > 1:
                raise PlacementError(
                    f"tensors of {canonical}* are spelled in {len(prefixes)} ways: {', '.join(prefixes.values())}; rename them to one"
                )
        pairs = [(canonical, prefix) for canonical, (prefix,) in found.items()]
        return Spelling(tuple(sorted(pairs, key=lambda pair: -len(pair[1]))))

    def is_ignored(self, hf_name: str) -> bool:
        return any(re.fullmatch(pattern, hf_name) for pattern in self.family.ignored)

    def is_kept(self, hf_name: str) -> bool:
        return hf_name.startswith(self.family.kept(self.values))

    def local_layout(self, bound: Bound, rank: int, size: int) -> LocalLayout:
        """The share of one tensor rank; errors name the parameter and its HF tensors."""
        try:
            return bound.rule.layout.local([shape for _, shape in bound.hf], rank, size, self.dims)
        except PlacementError as error:
            names = ", ".join(f"{name} {shape}" for name, shape in bound.hf)
            raise PlacementError(f"{bound.local} <- {names}: {error}") from None
