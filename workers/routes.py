"""Experts that the tokens of samples went to: from engines' arrays to what an actor replays, and what two routings say of each other.

Pure torch and integers; knows no Ray and no Megatron.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlsync.errors import RlsyncError
from rlsync.models.moe import NO_ROUTE, sparse_layers


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """Counts of the experts that samples of one replica went to, in the layers of one pipeline stage.

    Attributes:
        loads: (layers with experts of the model, experts) int64, choices of each expert; zero in layers of other stages.
        num_different, num_compared: (token, layer) pairs that actor and engine sent to other experts, of those that both know.
    """

    loads: Tensor
    num_different: int
    num_compared: int


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """How a model with experts routes: its layers, the numbers (from 0) of those with experts, and how many experts a token goes to."""

    num_layers: int
    sparse_layers: tuple[int, ...]
    topk: int


def routing_shape(transformer: Mapping[str, Any]) -> RoutingShape:
    """The shape of a model with these fields of Megatron's TransformerConfig, as ``Model.transformer`` has them."""
    num_layers = transformer["num_layers"]
    return RoutingShape(num_layers, sparse_layers(num_layers, transformer.get("moe_layer_freq", 1)), transformer["moe_router_topk"])


def engine_routes(routes: Any, *, length: int, shape: RoutingShape) -> Tensor:
    """An engine's routes of a sample as the actor takes them: (length, layers with experts, topk) int16.

    The engine never computed the last token, which is ``NO_ROUTE``.

    Args:
        routes: array (length - 1 or length, layers, topk) of integers; of all layers of the model, or of those with experts.

    Raises:
        RlsyncError: none, or of another shape.
    """
    if routes is None:
        raise RlsyncError("the engine returned no routes; start it with enable_return_routed_experts=True, on GPUs")
    found = torch.as_tensor(routes.astype("int32"))
    tokens, layers, width = found.shape
    num_layers, sparse_layers, topk = shape.num_layers, shape.sparse_layers, shape.topk
    if tokens not in (length - 1, length) or layers not in (num_layers, len(sparse_layers)) or width != topk:
        raise RlsyncError(
            f"an engine returned routes of {tokens} tokens, {layers} layers and {width} experts a token; the sample has {length} "
            f"tokens, the model {num_layers} layers, {len(sparse_layers)} of them with experts, and a token takes {topk}"
        )
    if layers == num_layers:
        found = found[:, list(sparse_layers)]
    whole = torch.full((length, len(sparse_layers), topk), NO_ROUTE, dtype=torch.int16)
    whole[: length - 1] = found[: length - 1].to(torch.int16)
    return whole


def padded_routes(rows: Sequence[Tensor], length: int) -> Tensor:
    """Routes (each (its length, layers, topk)) of a microbatch: (B, ``length``, layers, topk) int16, ``NO_ROUTE`` at padding."""
    whole = torch.full((len(rows), length, *rows[0].shape[1:]), NO_ROUTE, dtype=torch.int16)
    for row, routes in enumerate(rows):
        whole[row, : len(routes)] = routes
    return whole


def routing_counts(taken: Sequence[Tensor], engine: Sequence[Tensor] | None, num_experts: int) -> RoutingCounts:
    """Counts of samples: routes (its length, layers, topk) that the actor took, and the engine's where it returned them."""
    whole = torch.cat(list(taken))
    layers = whole.size(1)
    loads = torch.stack([_load(whole[:, layer], num_experts) for layer in range(layers)])
    if engine is None:
        return RoutingCounts(loads, 0, 0)
    other = torch.cat(list(engine))
    known = (whole != NO_ROUTE).all(-1) & (other != NO_ROUTE).all(-1)
    # Of experts the set counts: their order changes no choice.
    different = (whole.sort(-1).values != other.sort(-1).values).any(-1)
    return RoutingCounts(loads, int((different & known).sum()), int(known.sum()))


def _load(chosen: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(chosen[chosen != NO_ROUTE].long(), minlength=num_experts)


def routing_metrics(counts: Sequence[RoutingCounts | None]) -> dict[str, float]:
    """``moe/*`` metrics of a step, from all replicas and stages; empty without experts."""
    seen = [c for c in counts if c is not None]
    if not seen:
        return {}
    loads = torch.stack([c.loads for c in seen]).sum(0).double()
    found = {"moe/load_imbalance": (loads.max(dim=1).values / loads.mean(dim=1).clamp_min(1e-9)).mean().item()}
    compared = sum(c.num_compared for c in seen)
    if compared:
        found["moe/route_mismatch"] = sum(c.num_different for c in seen) / compared
    return found
