"""Which experts each token goes to: routes recorded in one pass over the model, and replayed in another.

Sits where Megatron's ``RouterReplay`` does, which keeps the routers of a process in one list, in the order of their making. Here they
belong to the models that they are given with, so that two models of a process do not mix, and are told apart by layer, so that pipeline
stages need nobody else's. Must not know engines, nor where routes come from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from rlsync.errors import ConfigError
from rlsync.megatron.context import Share
from rlsync.megatron.model import unwrap
from rlsync.megatron.packing import Packing
from rlsync.models.moe import NO_ROUTE, sparse_layers

_MOST_EXPERTS = 2**15


@dataclass(slots=True)
class _Pass:
    """One microbatch: its shape as the model gets it, of all context-parallel ranks together, its routes (rows, length, layers, topk) in
    that shape, or None, its packing, and what this rank has of it."""

    rows: int
    length: int
    given: Tensor | None
    packing: Packing | None
    share: Share | None
    taken: dict[int, Tensor] = field(default_factory=dict)


class Routing:
    """The routers of this rank's chunks. One object for each model, made once.

    Attributes:
        num_layers: layers with experts of the whole model.
        topk: experts of a token.
        num_experts: of a layer.
        layers: of the model's layers with experts, counted from 0, those that this rank has.

    Raises:
        ConfigError: the model has no experts; its routers choose in a fused kernel or by Sinkhorn, where no route can be given.
    """

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        config = unwrap(models[0]).config
        if config.num_moe_experts is None:
            raise ConfigError("routes are of models with experts, and this one has none")
        if config.moe_router_fusion or config.moe_router_load_balancing_type == "sinkhorn":
            switch = "moe_router_fusion=True" if config.moe_router_fusion else "moe_router_load_balancing_type=sinkhorn"
            raise ConfigError(f"{switch} chooses experts where no route can be recorded or given; leave it out")
        if config.num_moe_experts > _MOST_EXPERTS:
            raise ConfigError(f"routes hold at most {_MOST_EXPERTS} experts, and the model has {config.num_moe_experts}")
        self.topk: int = config.moe_router_topk
        self.num_experts: int = config.num_moe_experts
        sparse = sparse_layers(config.num_layers, config.moe_layer_freq)
        self.num_layers = len(sparse)
        self._splits_sequence: bool = config.sequence_parallel
        self._current: _Pass | None = None
        self._passes: dict[int, _Pass] = {}
        self._recomputes = False
        # By layer: passes whose activations will be computed a second time, in the order of their backward passes.
        self._again: dict[int, deque[_Pass]] = {}
        self.layers: list[int] = []
        for model in models:
            for module in unwrap(model).modules():
                if isinstance(module, TopKRouter):
                    layer = sparse.index(module.layer_number - 1)
                    module.router_replay = _Router(self, layer)
                    self.layers.append(layer)

    @contextmanager
    def run(self, *, with_gradients: bool) -> Iterator[None]:
        """Around all passes of a step or of a scoring."""
        self._passes, self._again, self._recomputes = {}, {layer: deque() for layer in self.layers}, with_gradients
        try:
            yield
        finally:
            self._again, self._recomputes = {}, False

    @contextmanager
    def microbatch(
        self, index: int, tokens: Tensor, given: Tensor | None, packing: Packing | None = None, share: Share | None = None
    ) -> Iterator[None]:
        """Around the forward pass of a microbatch through a chunk.

        Args:
            index: of the microbatch among those of this run.
            tokens: (B, S) as the model gets them on this rank.
            given: (at most B, at most S, num_layers, topk) experts to take, of integers, that ``check`` let pass; ``NO_ROUTE``, and what is
                not there, is live.
            packing: of the tokens, where they are packed; ``given`` is padded all the same.
            share: which of all tokens ``tokens`` are, under context parallelism; ``given`` is of all.
        """
        rows, length = tokens.shape
        length = length if share is None else share.bounds[-1]
        if index not in self._passes:
            if given is not None and packing is not None:
                given = packing.pack(given, NO_ROUTE)
            self._passes[index] = _Pass(rows, length, given, packing, share)
        self._current = self._passes[index]
        try:
            yield
        finally:
            self._current = None

    def taken(self, index: int, rows: int, length: int) -> Tensor:
        """Experts that the tokens of a microbatch went to: (rows, length, num_layers, topk) int16 on the CPU.

        ``NO_ROUTE`` in layers of other pipeline stages. Collective over the CP group, and the TP group under sequence parallelism.
        """
        found, passed = torch.full((rows, length, self.num_layers, self.topk), NO_ROUTE, dtype=torch.int16), self._passes[index]
        for layer in self.layers:
            whole = self._whole(passed, passed.taken[layer]).cpu()
            if passed.packing is not None:
                whole = passed.packing.unpack(whole, NO_ROUTE)
            found[:, :, layer] = whole[:rows, :length]
        return found

    def check(self, given: Tensor) -> None:
        """Raise ConfigError where routes (B, S, layers with experts, topk) cannot be of this model. Waits for the GPU if they are there."""
        if given.shape[2:] != (self.num_layers, self.topk):
            raise ConfigError(
                f"routes are of {given.size(2)} layers and {given.size(3)} experts a token; the model has {self.num_layers} layers with "
                f"experts and takes {self.topk}"
            )
        if given.numel() and not NO_ROUTE <= int(given.min()) <= int(given.max()) < self.num_experts:
            raise ConfigError(f"routes name experts {int(given.min())} to {int(given.max())}; the model has 0 to {self.num_experts - 1}")

    def choose(self, layer: int, live: Tensor) -> Tensor:
        """The experts that this rank's tokens of a layer go to, (num_tokens, topk), given those that its router would choose."""
        if self._current is None:
            # A backward pass computes activations again, and has to take the same way.
            again = self._again.get(layer)
            return self._merged(again.popleft(), layer, live) if again else live
        if self._recomputes and not torch.is_grad_enabled():
            self._again[layer].append(self._current)
        chosen = self._merged(self._current, layer, live)
        self._current.taken[layer] = chosen.detach().to(torch.int16)
        return chosen

    def _merged(self, passed: _Pass, layer: int, live: Tensor) -> Tensor:
        if passed.given is None:
            return live
        wanted = self._own(passed, passed.given[:, :, layer]).to(live.device, live.dtype)
        return torch.where((wanted == NO_ROUTE).any(dim=1, keepdim=True), live, wanted)

    def _own(self, passed: _Pass, routes: Tensor) -> Tensor:
        """(B, S, topk) -> (num_tokens, topk) in the order of this rank's router: along the sequence, then over rows."""
        rows, length = routes.shape[:2]
        padded = F.pad(routes, (0, 0, 0, passed.length - length, 0, passed.rows - rows), value=NO_ROUTE).transpose(0, 1)
        if passed.share is not None:
            padded = passed.share.own(padded, 0)
        if self._splits_sequence:
            padded = padded.chunk(parallel_state.get_tensor_model_parallel_world_size())[parallel_state.get_tensor_model_parallel_rank()]
        return padded.reshape(-1, self.topk)

    def _whole(self, passed: _Pass, own: Tensor) -> Tensor:
        """The inverse of ``_own``, with padding."""
        if self._splits_sequence and (size := parallel_state.get_tensor_model_parallel_world_size()) > 1:
            own = own.int()  # gloo knows no int16
            parts = [torch.empty_like(own) for _ in range(size)]
            torch.distributed.all_gather(parts, own, group=parallel_state.get_tensor_model_parallel_group())
            own = torch.cat(parts)
        own = own.view(-1, passed.rows, self.topk)
        if passed.share is not None:
            own = passed.share.gather(own.int(), 0, sums_gradients=False)
        return own.transpose(0, 1)


class _Router:
    """What a router of Megatron asks for its choice; see ``RouterReplay`` of Megatron-Core."""

    def __init__(self, routing: Routing, layer: int) -> None:
        self._routing, self._layer = routing, layer

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores (num_tokens, num_experts) -> those of the experts taken, differentiable, and the experts: (num_tokens, topk) each."""
        _, live = default_compute_topk(scores, topk, num_groups, group_topk)
        chosen = self._routing.choose(self._layer, live)
        return scores.gather(1, chosen), chosen
