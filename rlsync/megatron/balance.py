"""Whose tokens count where routers balance their experts: those of sequences, and not what fills up a microbatch.

Megatron counts all positions that pass a router, for the bias that it moves after a step and for balancing losses. Padding, which all goes
to the same few experts, would move both, and differently for every way to cut a batch. Must not know routes, nor losses of a caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from rlsync.megatron.model import unwrap


@dataclass(frozen=True, slots=True)
class _Pass:
    """What a microbatch has at this rank's routers: (num_tokens,) whether a position is padding, None where all count alike; and whether
    it counts for the bias."""

    padding: Tensor | None
    counts: bool


class Balance:
    """The routers of this rank's chunks during one step. See ``balanced``."""

    def __init__(self, config: TransformerConfig, routers: Sequence[TopKRouter]) -> None:
        self._splits_sequence: bool = config.sequence_parallel
        # TransformerEngine's kernel takes the number of all positions.
        self._masks_losses: bool = not config.moe_router_fusion
        self._current: _Pass | None = None
        for router in routers:
            self._bind(router)

    @contextmanager
    def microbatch(self, valid: Tensor | None, *, counts: bool) -> Iterator[None]:
        """Around the forward pass of a microbatch through a chunk.

        Args:
            valid: (B, S) bool as the model gets tokens on this rank, which of them are of a sequence; None where that is not known.
            counts: False for a pass that only fills up the schedule.
        """
        self._current = _Pass(None if valid is None else self._own(~valid), counts)
        try:
            yield
        finally:
            self._current = None

    def _own(self, padding: Tensor) -> Tensor:
        """(B, S) -> (num_tokens,) in the order of this rank's routers: along the sequence, then over rows."""
        along = padding.transpose(0, 1)
        if self._splits_sequence:
            along = along.chunk(parallel_state.get_tensor_model_parallel_world_size())[parallel_state.get_tensor_model_parallel_rank()]
        return along.reshape(-1)

    def _bind(self, router: TopKRouter) -> None:
        """Have a router ask which of its tokens count, until ``balanced`` gives its methods back."""
        original, again, now = router.routing, deque[_Pass](), deque[_Pass](maxlen=1)

        def routing(logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
            passed = self._current
            if passed is None:
                # A backward pass computes activations again.
                passed = again.popleft() if again else _Pass(None, counts=True)
            elif not torch.is_grad_enabled():
                again.append(passed)
            now.append(passed)
            return original(logits, padding_mask=passed.padding if self._masks_losses else padding_mask)

        def count(routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
            (passed,) = now
            if router.enable_expert_bias and torch.is_grad_enabled() and passed.counts:
                taken = routing_map if passed.padding is None else routing_map & ~passed.padding[:, None]
                router.local_tokens_per_expert += taken.sum(dim=0)

        bound: Any = router
        bound.routing, bound._apply_expert_bias = routing, count


@contextmanager
def balanced(models: Sequence[torch.nn.Module]) -> Iterator[Balance | None]:
    """Around all passes of a step with gradients; None where no router balances anything."""
    config = unwrap(models[0]).config
    routers = [module for model in models for module in unwrap(model).modules() if isinstance(module, TopKRouter)]
    if not routers or not _balances(config):
        yield None
        return
    try:
        yield Balance(config, routers)
    finally:
        for router in routers:
            # Its class has them.
            del router.routing, router._apply_expert_bias


def _balances(config: TransformerConfig) -> bool:
    weights = config.moe_aux_loss_coeff
    moves_bias = config.moe_router_enable_expert_bias and bool(config.moe_router_bias_update_rate)
    return moves_bias or any(weights if isinstance(weights, (list, tuple)) else [weights])
