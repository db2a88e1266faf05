"""Low-rank adapters beside linear layers of Megatron and of TransformerEngine.

An adapter is a submodule of the layer that it adds to, so that names of the base stay what they are; those of grouped experts stand
where they would beside experts one by one, so that names of adapters are the same under both specs. An adapter's output is in the same
parallel state as the output of its base (one rank's columns, or one rank's summand), and its input's gradient in that of its base. Knows
which ranks hold what from ``rlsync.models.lora``; must not know files.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from rlsync.copy import merge
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.parallel import compute_device
from rlsync.megatron.scores import ScoringHead
from rlsync.megatron.versions import whole_linear
from rlsync.models.layouts import LocalLayout
from rlsync.models.lora import AdaptedRule, Adapters, LoraSpec, Split, module_of
from rlsync.models.placement import held_parameters
from rlsync.models.stacks import ExpertModule, Flavour, Model

# Name of an adapter in the module of its base.
ADAPTER = "adapter"
# Bytes at a multiple of which a row begins, for torch's grouped product.
_ALIGNMENT = 16
# The weight of one of several experts in TransformerEngine's grouped layer.
_GROUPED = re.compile(r"(.*\.experts)\.(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True, slots=True)
class _Axis:
    """The tensor axis of a base, and who sums over it.

    Attributes:
        split: of the base over the axis.
        group: ranks of the axis; None where the base is whole and nothing is summed.
        is_explicit: the layers before and after the base exchange tokens over the axis themselves (experts): the base takes whole inputs,
            returns summands, and returns summands of its input's gradient.
        sequence_parallel: activations outside the base are cut along the sequence over the axis.
    """

    split: Split
    group: Any
    is_explicit: bool
    sequence_parallel: bool


class Adapter(torch.nn.Module):
    """``scaling * B(A(x))`` of the projections in one parameter.

    Parameters:
        lora_A: (projections * r, in), or the columns of this rank under a row-parallel base.
        lora_B: (out, r), rows as in the base's weight on this rank; each row takes the r results of its own projection's A.
    """

    def __init__(self, spec: LoraSpec, rule: AdaptedRule, a: LocalLayout, b: LocalLayout, axis: _Axis, dtype: torch.dtype) -> None:
        super().__init__()
        self._spec, self._axis = spec, axis
        device = compute_device()
        self.lora_A = torch.nn.Parameter(torch.zeros(a.shape, dtype=dtype, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(b.shape, dtype=dtype, device=device))
        self._draw(rule, a)
        owners = _owners(b, len(rule.sources), spec.r, dtype)
        # Equal for adapters that are computed in the same way.
        self._likeness = a.shape, b.shape, tuple((part.offset, part.box.shape[0], part.source) for part in b.parts)
        self._is_whole = owners.size(1) == 1 and bool(owners.all())
        self.register_buffer("_owners", owners.to(device), persistent=False)

    @torch.no_grad()
    def _draw(self, rule: AdaptedRule, a: LocalLayout) -> None:
        """First values; all are zero so far."""
        for part in a.parts:
            name, shape = rule.a.hf[part.source]
            drawn = initial_factor(self._spec, name, shape)[tuple(map(slice, part.box.start, part.box.stop))]
            self.lora_A[part.source * self._spec.r : (part.source + 1) * self._spec.r].copy_(drawn)

    @property
    def scaling(self) -> float:
        return self._spec.scaling

    def factors(self) -> merge.Factors:
        """The factors whose scaled product is added to the weight when the adapter is merged."""
        owners: Any = None if self._is_whole else self._owners
        return merge.Factors(self.lora_B, self.lora_A, owners, self._likeness)

    def forward(self, x: Tensor | None) -> Any:
        """What is added to the base's output; ``x`` is the base's input, (..., in) in the dtype of the parameters.

        For None ``(lora_A, lora_B)``, which whoever computes several adapters at once asks for by a call: what runs before a call has
        waited for them, as data-parallel ranks gather parameters while the forward pass is under way.
        """
        return (self.lora_A, self.lora_B) if x is None else self.added(x, self.lora_A, self.lora_B, F.linear)

    def added(self, x: Tensor, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``forward`` with other factors of these shapes, such as those of several experts; ``product(x, factor)`` applies one."""
        return product(*self.factored(x, a, b, product))

    def factored(self, x: Tensor, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What is added is the product of these: A's results (..., projections * r), in the state in which B is applied, and B."""
        axis = self._axis
        if self._spec.lora_dropout and self.training:
            with self._random_state():
                x = F.dropout(x, self._spec.lora_dropout)
        # A factor that is whole on ranks which each see a summand of its gradient is summed over them.
        if axis.is_explicit and axis.split == "column":
            a = copy_to_tensor_model_parallel_region(a, group=axis.group)
        if axis.is_explicit and axis.split == "row":
            b = copy_to_tensor_model_parallel_region(b, group=axis.group)
        hidden = product(x, a) * self._spec.scaling
        if not axis.is_explicit:
            hidden = _exchange(axis)(hidden)
        return hidden, self._spread(b)

    def _spread(self, b: Tensor) -> Tensor:
        """B (..., out, r) as A's results of all projections are multiplied by it."""
        owners: Any = self._owners
        return b if self._is_whole else merge.spread(b, owners)

    def _random_state(self) -> AbstractContextManager[None]:
        """Ranks that hold the same activations drop the same elements; those with others draw their own."""
        axis = self._axis
        if axis.is_explicit and axis.split == "row":
            return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
        is_own = axis.split == "row" or axis.sequence_parallel
        return get_cuda_rng_tracker().fork() if is_own and not axis.is_explicit else nullcontext()


class HeadAdapter(Adapter):
    """The adapter of the output layer, which adds to logits where it makes them, some positions at a time: B has rows of the vocabulary."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # the output layer multiplies them
        """``x`` (S, B, H), under sequence parallelism this rank's part -> A's results (S, B, r) of all positions, and B (vocabulary of
        this rank, r). Collective over the TP group."""
        return self.factored(x, self.lora_A, self.lora_B, F.linear)


class EmbeddingAdapter(Adapter):
    """The adapter of an embedding that is cut over the vocabulary: a token takes its column of A, which one tensor rank has, times B.

    Parameters:
        lora_A: (r, rows of the vocabulary on this rank).
        lora_B: (hidden, r).
    """

    def _draw(self, rule: AdaptedRule, a: LocalLayout) -> None:
        """B, and A stays at zero: as PEFT has it, whatever ``init`` says."""
        ((name, shape),) = rule.b.hf
        with torch.no_grad():
            self.lora_B.copy_(torch.empty(shape).normal_(generator=_generator(self._spec, name)))

    def factors(self) -> merge.Factors:
        return merge.Factors(self.lora_A, self.lora_B, None, self._likeness, transposed=True)

    def forward(self, column: Tensor, here: Tensor) -> Tensor:  # type: ignore[override]  # of tokens, and not of activations
        """What is added to the embeddings (B, S, H) of tokens, or to this rank's part (S / tp_size, B, H) of them under sequence
        parallelism. Collective over the TP group.

        Args:
            column: (B, S) int64, of each token in this rank's part of the vocabulary.
            here: (B, S) bool, whether it is in it.
        """
        # As an index, whose gradient does not depend on the order in which a GPU adds.
        hidden = self.lora_A.t()[column] * here[..., None] * self._spec.scaling
        return F.linear(_exchange(self._axis)(hidden.transpose(0, 1).contiguous() if self._axis.sequence_parallel else hidden), self.lora_B)


class RouterAdapter(Adapter):
    """The adapter of a router; it computes in the dtype of the router's logits."""

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        """What is added to the logits (..., experts) of ``x`` (..., hidden). Not collective."""
        return self.added(x.to(dtype), self.lora_A.to(dtype), self.lora_B.to(dtype), F.linear)


class AdaptedRouter(TopKRouter):
    """A router with an adapter: what it chooses from is no output of its own, to which a hook could add."""

    def gating(self, input: Tensor) -> Tensor:
        logits: Tensor = super().gating(input)
        return logits + self.adapter(input, logits.dtype)


def merged(adapters: Sequence[Adapter], weights: Sequence[Tensor]) -> list[Tensor]:
    """Each weight of a base on this rank plus its adapter, as ``MergeProgram`` has it. Adapters are of one model. Not collective."""
    return merge_program(adapters, weights).run() if adapters else []


def merge_program(adapters: Sequence[Adapter], weights: Sequence[Tensor]) -> merge.MergeProgram:
    """A program that merges these adapters into these weights whenever it is run, as after each optimizer step."""
    return merge.MergeProgram(weights, [adapter.factors() for adapter in adapters], adapters[0].scaling)


def compile_merging(adapters: Sequence[Adapter], weights: Sequence[Tensor]) -> None:
    """Begin to compile what merges these. Returns at once. Not collective."""
    merge.compile_ahead(weights, [adapter.factors() for adapter in adapters])


def _exchange(axis: _Axis) -> Callable[[Tensor], Tensor]:
    """What brings A's result into the state in which B is applied."""
    if axis.group is None or axis.group.size() == 1:
        return lambda hidden: hidden
    if axis.split == "column":
        if axis.sequence_parallel:
            return lambda hidden: gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=axis.group)
        return lambda hidden: copy_to_tensor_model_parallel_region(hidden, group=axis.group)
    if axis.sequence_parallel:
        return lambda hidden: reduce_scatter_to_sequence_parallel_region(hidden, group=axis.group)
    return lambda hidden: reduce_from_tensor_model_parallel_region(hidden, group=axis.group)


def _owners(b: LocalLayout, projections: int, r: int, dtype: torch.dtype) -> Tensor:
    """Which projection each row of a packed B is of: (rows, projections), one or zero."""
    owners = torch.zeros(b.shape[0], projections, dtype=dtype)
    for part in b.parts:
        first = part.offset // r
        owners[first : first + part.box.shape[0], part.source] = 1
    return owners


def initial_factor(spec: LoraSpec, name: str, shape: tuple[int, ...]) -> Tensor:
    """The whole ``lora_A`` of a projection by its HF name: fp32, the same under every parallel layout."""
    generator = _generator(spec, name)
    if spec.init == "gaussian":
        return torch.empty(shape).normal_(std=1 / spec.r, generator=generator)
    # torch's kaiming_uniform_ with a = sqrt(5), which PEFT calls.
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _generator(spec: LoraSpec, name: str) -> torch.Generator:
    seed = hashlib.sha256(f"{spec.seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)


def add_adapters(
    chunks: Sequence[GPTModel],
    weights: Mapping[str, tuple[GPTModel, str]],
    model: Model,
    adapters: Adapters,
    topology: Topology,
    rank: int,
    dtype: torch.dtype,
    *,
    flavour: Flavour,
    experts: ExpertModule | None,
) -> None:
    """Freeze all that is there and add this rank's adapters. Not collective.

    Args:
        chunks: of the model on this rank, not yet wrapped.
        weights: the chunk and the local name of each weight on this rank, by the weight's global name.
        dtype: of the factors.
        flavour, experts: how weights are called, see ``Bound.name``.

    Raises:
        ConfigError: a base is a layer that adapters were not made for, or runs in a way that they do not follow.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.config.moe_shared_expert_overlap:
            raise ConfigError(
                "moe_shared_expert_overlap takes the sum over tensor ranks out of shared experts, and adapters do not; unset it"
            )
    at, kinds = topology.coordinates(rank), _kinds(flavour)
    model = replace(model, dims={**model.dims, "padded_vocab": chunks[0].vocab_size})
    grouped: dict[torch.nn.Module, list[tuple[AdaptedRule, Adapter]]] = {}
    for rule in adapters.rules(held_parameters(model, topology, rank)):
        chunk, local = weights.get(rule.base.name(flavour, experts), (None, ""))
        base = None if chunk is None else chunk.get_submodule(local.rpartition(".")[0])
        kind = next((kind for kind in kinds if isinstance(base, kind.base) and kind.split == rule.split), None)
        if chunk is None or base is None or kind is None:
            found = "of another name" if base is None else f"a {type(base).__name__}"
            raise ConfigError(
                f"{rule.base.name(flavour, experts)} is {found} in this model, and adapters of a {rule.split} projection stand beside "
                f"{', '.join(kind.base.__name__ for kind in kinds if kind.split == rule.split)} only"
            )
        is_expert = rule.base.stack.tensor_axis == "etp"
        share = (at.etp_rank, topology.etp_size) if is_expert else (at.tp_rank, topology.tp_size)
        a, b = (model.local_layout(factor, *share) for factor in (rule.a, rule.b))
        in_tower = rule.base.stack.part != "language_model"
        # An embedding may leave it to others to cut the sequence.
        sequence_parallel = bool(getattr(base, "reduce_scatter_embeddings", chunk.config.sequence_parallel)) and not in_tower
        axis = _axis(rule.split, topology, is_expert=is_expert, sequence_parallel=sequence_parallel)
        adapter = kind.adapter(adapters.spec, rule, a, b, axis, dtype)
        has_own_group = is_expert and topology.experts_have_own_replicas
        _mark(adapter, axis, is_expert=is_expert, is_first=share[0] == 0, has_own_group=has_own_group, in_tower=in_tower)
        _place(chunk, adapter_path(local), adapter)
        if kind.add is _add_after_norm:
            base.return_layernorm_output = True
        if kind.add is _add_to_groups:
            grouped.setdefault(base, []).append((rule, adapter))
        elif kind.adapter is RouterAdapter:
            base.__class__ = AdaptedRouter
        elif kind.add is not None:
            base.register_forward_hook(partial(kind.add, adapter))
    for base, of_experts in grouped.items():
        _check_alike(base, [rule for rule, _ in of_experts])
        base.register_forward_hook(partial(_add_to_groups, [adapter for _, adapter in of_experts]))
    for chunk in chunks:
        if chunk.config.recompute_granularity == "full":
            # A recomputed layer has gradients only where its input has.
            chunk.decoder.register_forward_pre_hook(_require_gradient, with_kwargs=True)


def _check_alike(base: Any, rules: Sequence[AdaptedRule]) -> None:
    if len(rules) != base.num_gemms or len({rule.sources for rule in rules}) > 1:
        raise ConfigError(
            f"{len(rules)} of {base.num_gemms} experts beside {rules[0].base.te} have adapters, or on different projections of theirs: in "
            "TransformerEngine's grouped layers all have the same ones; choose experts alike in target_modules and exclude_modules, or "
            "take Megatron's own layers (spec local, actor.spec_name local_gpt)"
        )


def adapter_path(weight: str) -> str:
    """Where in a chunk the adapter of a weight is, by the weight's local name."""
    expert = _GROUPED.fullmatch(weight)
    owner = module_of(weight) if expert is None else f"{expert[1]}.local_experts.{expert[3]}.{expert[2]}"
    return f"{owner}.{ADAPTER}"


def _place(chunk: torch.nn.Module, path: str, adapter: Adapter) -> None:
    owner, (*names, last) = chunk, path.split(".")
    for name in names:
        if name not in owner._modules:
            owner.add_module(name, torch.nn.Module())
        owner = owner.get_submodule(name)
    owner.add_module(last, adapter)


def _axis(split: Split, topology: Topology, *, is_expert: bool, sequence_parallel: bool) -> _Axis:
    if is_expert:
        is_explicit = topology.etp_size > 1 or topology.ep_size > 1
        return _Axis(split, parallel_state.get_expert_tensor_parallel_group(), is_explicit, False)
    group = None if split == "whole" else parallel_state.get_tensor_model_parallel_group()
    return _Axis(split, group, False, sequence_parallel and topology.tp_size > 1)


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that can be a base.

    Attributes:
        base: their class.
        split: of what they compute.
        add: a hook of theirs that adds an adapter's output; None where the layer does so itself.
        adapter: class of their adapters.
    """

    base: type[torch.nn.Module]
    split: Split
    add: Callable[..., Any] | None
    adapter: type[Adapter] = Adapter


def _kinds(flavour: Flavour) -> tuple[_Kind, ...]:
    """Layers that can be a base under a spec, a class before those it is one of."""
    tower = _Kind(torch.nn.Linear, "whole", _add_to_plain)
    named = (
        _Kind(ScoringHead, "column", None, HeadAdapter),
        _Kind(VocabParallelEmbedding, "row", _add_to_embedding, EmbeddingAdapter),
        _Kind(TopKRouter, "whole", None, RouterAdapter),
    )
    if flavour == "local":
        return (
            *named,
            _Kind(ColumnParallelLinear, "column", _add),
            _Kind(RowParallelLinear, "row", _add),
            _Kind(whole_linear(), "whole", _add),
            tower,
        )
    # Without TransformerEngine the names of this module are not classes.
    te = import_module("megatron.core.extensions.transformer_engine")
    return (
        *named,
        _Kind(te.TELayerNormColumnParallelLinear, "column", _add_after_norm),
        _Kind(te.TEColumnParallelLinear, "column", _add),
        _Kind(te.TERowParallelLinear, "row", _add),
        _Kind(te.TEColumnParallelGroupedLinear, "column", _add_to_groups),
        _Kind(te.TERowParallelGroupedLinear, "row", _add_to_groups),
        _Kind(te.TELinear, "whole", _add),
        tower,
    )


# Hooks of a base: what it returns, and the adapter's output added to it.
Pair = tuple[Tensor, Tensor | None]


def _add(adapter: Adapter, base: torch.nn.Module, inputs: tuple[Tensor, ...], output: Pair) -> Pair:
    out, bias = output
    return out + adapter(inputs[0]), bias


def _add_to_plain(adapter: Adapter, base: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + adapter(inputs[0])


def _add_to_embedding(adapter: EmbeddingAdapter, base: VocabParallelEmbedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    column = inputs[0] - base.vocab_start_index
    here = (column >= 0) & (column < base.num_embeddings_per_partition)
    return output + adapter(torch.where(here, column, 0), here)


def _add_after_norm(adapter: Adapter, base: Any, inputs: tuple[Tensor, ...], output: Any) -> Pair:
    """Of a layer that norms its input first, and was told to return the normed one too: this rank's part of the sequence."""
    if base.te_return_bias:
        out, bias, normed = output
    else:
        (out, normed), bias = output
    return out + adapter(normed), bias


def _add_to_groups(adapters: Sequence[Adapter], base: torch.nn.Module, inputs: tuple[Tensor, list[int]], output: Pair) -> Pair:
    """Of experts whose tokens lie one group after the other."""
    (out, bias), (x, splits) = output, inputs
    a, b = map(torch.stack, zip(*(adapter(None) for adapter in adapters), strict=True))
    return out + adapters[0].added(x, a, b, partial(grouped_product, splits=splits)), bias


def grouped_product(x: Tensor, factors: Tensor, splits: Sequence[int]) -> Tensor:
    """Each expert's rows times its factor.

    Args:
        x: (rows, in), those of one expert after the other.
        factors: (experts, out, in).
        splits: rows of each expert; may be 0.
    """
    if any(size * x.element_size() % _ALIGNMENT for size in factors.shape[1:]):
        return torch.cat([F.linear(rows, factor) for rows, factor in zip(x.split(splits), factors, strict=True)])
    ends = torch.tensor(splits, device=x.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, factors.transpose(1, 2), offs=ends)


def _require_gradient(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_(True)


def _mark(adapter: Adapter, axis: _Axis, *, is_expert: bool, is_first: bool, has_own_group: bool, in_tower: bool) -> None:
    """Tell Megatron over which ranks gradients are summed, and which ranks count a parameter in the gradients' norm."""
    a, b = adapter.lora_A, adapter.lora_B
    cut, whole = {"column": ([b], [a]), "row": ([a], [b]), "whole": ([], [a, b])}[axis.split]
    for parameter in (a, b):
        parameter.allreduce = not has_own_group
        # Of a vision tower, each of whose replicas has the whole gradient: as its own parameters.
        parameter.average_gradients_across_tp_domain = in_tower
    for parameter in cut:
        parameter.tensor_model_parallel = True
    for parameter in whole:
        if is_expert:
            # Megatron counts duplicates by the tensor rank, which is not the rank among those that share an expert.
            parameter.tensor_model_parallel, parameter.shared = True, not is_first
        elif axis.sequence_parallel:
            # A rank sees a part of the sequence, and finalize_model_grads sums.
            parameter.sequence_parallel = True


def adapters_of_chunk(chunk: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Every adapter of a chunk by its path there."""
    return ((path, module) for path, module in chunk.named_modules() if isinstance(module, Adapter))
