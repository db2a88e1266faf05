"""Context parallelism: which tokens of its sequences a rank has, and how it comes by those of the others.

Owns the cut of sequences, which is Megatron's (``get_batch_on_this_cp_rank``) and TransformerEngine's, and the gathers over the
context-parallel group. Must not know models, schedules or losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """What each context-parallel rank has of sequences that lie one after the other.

    A sequence is cut into twice as many equal chunks as there are ranks. Rank r has chunk r from its beginning and chunk r from its end, so
    that causal attention is as much work on each.

    Attributes:
        bounds: where sequences begin and end, from 0 to the tokens of all; multiples of ``sequence_multiple``.
        rank, size: of the context-parallel group.
    """

    bounds: tuple[int, ...]
    rank: int
    size: int

    def chunks(self) -> list[tuple[slice, slice]]:
        """This rank's two chunks of each sequence, the earlier one first."""
        return [self._chunks_of(start, end) for start, end in pairwise(self.bounds)]

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a tensor that has all of them along ``dim``."""
        return torch.cat([whole[(slice(None),) * dim + (chunk,)] for pair in self.chunks() for chunk in pair], dim)

    def gather(self, own: Tensor, dim: int, *, sums_gradients: bool) -> Tensor:
        """All tokens of a tensor of which each rank has its ``own`` along ``dim``; differentiable. Collective over the CP group.

        Args:
            sums_gradients: ranks go on with the whole in different ways, so the gradient of a token is the sum of all ranks'. Otherwise all
                of them compute the same of it, and each keeps the gradient of its own tokens.
        """
        if own.dtype is torch.bool:  # gloo does not gather it
            return self.gather(own.to(torch.uint8), dim, sums_gradients=sums_gradients).bool()
        group = parallel_state.get_context_parallel_group()
        first = own.movedim(dim, 0).contiguous()
        parts = tensor_parallel.gather_from_sequence_parallel_region(first, sums_gradients, group).chunk(self.size)
        ordered: list[Tensor] = []
        for start, end in pairwise(self.bounds):
            length = (end - start) // (2 * self.size)
            begin = start // self.size
            ordered += [part[begin : begin + length] for part in parts]
            ordered += [part[begin + length : begin + 2 * length] for part in reversed(parts)]
        return torch.cat(ordered).movedim(0, dim)

    def _chunks_of(self, start: int, end: int) -> tuple[slice, slice]:
        length = (end - start) // (2 * self.size)
        before = self.rank * length
        return slice(start + before, start + before + length), slice(end - before - length, end - before)


def share_of(bounds: Sequence[int]) -> Share:
    """The share of this rank in sequences with these bounds, under the running context parallelism."""
    return Share(tuple(bounds), parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def sequence_multiple(config: TransformerConfig) -> int:
    """The number of which the length of every sequence of a pass must be a multiple."""
    return 2 * config.context_parallel_size if config.context_parallel_size > 1 else 1


def total_multiple(config: TransformerConfig) -> int:
    """The number of which the tokens of a row of a pass must be a multiple: sequence parallelism cuts every rank's tokens once more."""
    tp_size = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return math.lcm(sequence_multiple(config), config.context_parallel_size * tp_size)
