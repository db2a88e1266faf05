"""Low-rank adapters beside Megatron's linear layers.

An adapter is a submodule of the layer that it adds to, so that names of the base stay what they are. Its output is in the same parallel
state as the output of its base (one rank's columns, or one rank's summand), and its input's gradient in that of its base. Knows
which ranks hold what from ``rlsync.models.lora``; must not know files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from torch import Tensor

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.parallel import compute_device
from rlsync.models.layouts import LocalLayout
from rlsync.models.lora import AdaptedRule, Adapters, LoraSpec, Split
from rlsync.models.placement import held_parameters
from rlsync.models.stacks import Model

# Name of an adapter in the module of its base.
ADAPTER = "adapter"
_BASES: Mapping[Split, type[torch.nn.Module]] = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "whole": torch.nn.Linear,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Axis:
    """The tensor axis of a base, and who sums over it.

    Attributes:
        split: of the base over the axis.
        group: ranks of the axis; None where the base is whole and nothing is summed.
        is_explicit: the layer before and after the base exchanges tokens over the axis itself (experts): the base takes whole inputs,
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
        with torch.no_grad():
            for part in a.parts:
                name, shape = rule.a.hf[part.source]
                drawn = initial_factor(spec, name, shape)[tuple(map(slice, part.box.start, part.box.stop))]
                self.lora_A[part.source * spec.r : (part.source + 1) * spec.r].copy_(drawn)
        owners = _owners(b, len(rule.sources), spec.r, dtype)
        self._is_whole = owners.size(1) == 1 and bool(owners.all())
        self.register_buffer("_owners", owners.to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the base's output; ``x`` is the base's input, (..., in) in the dtype of the parameters."""
        axis, a, b = self._axis, self.lora_A, self.spread_b()
        if self._spec.lora_dropout and self.training:
            with self._random_state():
                x = F.dropout(x, self._spec.lora_dropout)
        # A factor that is whole on ranks which each see a summand of its gradient is summed over them.
        if axis.is_explicit and axis.split == "column":
            a = copy_to_tensor_model_parallel_region(a, group=axis.group)
        if axis.is_explicit and axis.split == "row":
            b = copy_to_tensor_model_parallel_region(b, group=axis.group)
        hidden = F.linear(x, a) * self._spec.scaling
        if not axis.is_explicit:
            hidden = _exchange(axis)(hidden)
        return F.linear(hidden, b)

    def spread_b(self) -> Tensor:
        """B with a block of columns for each projection, zero outside its own rows: (out, projections * r)."""
        if self._is_whole:
            return self.lora_B
        owners: Any = self._owners
        return (self.lora_B.unsqueeze(1) * owners.unsqueeze(2)).flatten(1)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """``weight`` of the base on this rank plus the adapter: computed in fp32, rounded once to the dtype of ``weight``."""
        delta = self.spread_b().float() @ self.lora_A.float()
        return delta.mul_(self._spec.scaling).add_(weight.float()).to(weight.dtype)

    def _random_state(self) -> AbstractContextManager[None]:
        """Ranks that hold the same activations drop the same elements; those with others draw their own."""
        axis = self._axis
        if axis.is_explicit and axis.split == "row":
            return get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
        is_own = axis.split == "row" or axis.sequence_parallel
        return get_cuda_rng_tracker().fork() if is_own and not axis.is_explicit else nullcontext()


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
    seed = hashlib.sha256(f"{spec.seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
    if spec.init == "gaussian":
        return torch.empty(shape).normal_(std=1 / spec.r, generator=generator)
    # torch's kaiming_uniform_ with a = sqrt(5), which PEFT calls.
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def add_adapters(
    chunks: Sequence[torch.nn.Module],
    modules: Mapping[str, torch.nn.Module],
    model: Model,
    adapters: Adapters,
    topology: Topology,
    rank: int,
    dtype: torch.dtype,
) -> None:
    """Freeze all that is there and add this rank's adapters. Not collective.

    Args:
        chunks: of the model on this rank, not yet wrapped.
        modules: module of each weight on this rank, by the weight's global name.
        dtype: of the factors.

    Raises:
        ConfigError: a base is a layer that adapters were not made for, or runs in a way that they do not follow.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.config.moe_shared_expert_overlap:
            raise ConfigError(
                "moe_shared_expert_overlap takes the sum over tensor ranks out of shared experts, and adapters do not; unset it"
            )
    at = topology.coordinates(rank)
    for rule in adapters.rules(held_parameters(model, topology, rank)):
        base = modules.get(rule.base.local)
        if not isinstance(base, _BASES[rule.split]):
            found = "of another name" if base is None else f"a {type(base).__name__}"
            raise ConfigError(
                f"{rule.base.local} is {found} in this model, and adapters stand beside {_BASES[rule.split].__name__} only; build it with "
                "spec local (actor.spec_name local_gpt)"
            )
        is_expert = rule.base.stack.tensor_axis == "etp"
        share = (at.etp_rank, topology.etp_size) if is_expert else (at.tp_rank, topology.tp_size)
        a, b = (model.local_layout(factor, *share) for factor in (rule.a, rule.b))
        axis = _Axis("whole", None, False, False)
        if isinstance(base, ColumnParallelLinear | RowParallelLinear):
            axis = _Axis(rule.split, base.tp_group, base.explicit_expert_comm, base.sequence_parallel and not is_expert)
        adapter = Adapter(adapters.spec, rule, a, b, axis, dtype)
        # Not what Megatron tells of its own experts' weights, which under EP 1 are reduced over too few ranks where ETP is not TP.
        has_own_group = is_expert and (topology.ep_size > 1 or topology.etp_size != topology.tp_size)
        _mark(adapter, axis, is_expert=is_expert, is_first=share[0] == 0, has_own_group=has_own_group)
        base.add_module(ADAPTER, adapter)
        base.register_forward_hook(_add_whole if rule.split == "whole" else _add)
    for chunk in chunks:
        if chunk.config.recompute_granularity == "full":
            # A recomputed layer has gradients only where its input has.
            chunk.decoder.register_forward_pre_hook(_require_gradient, with_kwargs=True)


def _add(base: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    out, bias = output
    return out + base.get_submodule(ADAPTER)(inputs[0]), bias


def _add_whole(base: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + base.get_submodule(ADAPTER)(inputs[0])


def _require_gradient(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_(True)


def _mark(adapter: Adapter, axis: _Axis, *, is_expert: bool, is_first: bool, has_own_group: bool) -> None:
    """Tell Megatron over which ranks gradients are summed, and which ranks count a parameter in the gradients' norm."""
    a, b = adapter.lora_A, adapter.lora_B
    cut, whole = {"column": ([b], [a]), "row": ([a], [b]), "whole": ([], [a, b])}[axis.split]
    for parameter in (a, b):
        parameter.allreduce = not has_own_group
        # Of a vision tower, each of whose replicas has the whole gradient: as its own parameters.
        parameter.average_gradients_across_tp_domain = axis.split == "whole"
    for parameter in cut:
        parameter.tensor_model_parallel = True
    for parameter in whole:
        if is_expert:
            # Megatron counts duplicates by the tensor rank, which is not the rank among those that share an expert.
            parameter.tensor_model_parallel, parameter.shared = True, not is_first
        elif axis.sequence_parallel:
            # A rank sees a part of the sequence, and finalize_model_grads sums.
            parameter.sequence_parallel = True


def adapter_modules(chunks: Sequence[torch.nn.Module]) -> Mapping[int, Adapter]:
    """Adapters by the identity of the weight that they add to."""
    return {
        id(module.weight): module.get_submodule(ADAPTER)
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(getattr(module, ADAPTER, None), Adapter)
    }
