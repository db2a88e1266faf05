"""Placement of a Megatron rank, on paper: model + topology + rank -> buffers, pieces and padding.

A buffer is a parameter under its global name. Nothing here looks at a live module; the bridge compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlsync.layout.geometry import BufferSpec, Fill, Piece, Placement
from rlsync.layout.topology import Topology
from rlsync.models.rules import Bound, Flavour, Model


def owned_parameters(model: Model, topology: Topology, rank: int) -> Iterator[Bound]:
    """Rules of one rank bound to the layers it owns, in the order of the table, stage by stage."""
    pp_rank = topology.coordinates(rank).pp_rank
    is_first, is_last = pp_rank == 0, pp_rank == topology.pp_size - 1
    layers = [layer for vpp_rank in range(topology.vpp_size) for layer in topology.layers_of(model.num_layers, pp_rank, vpp_rank)]
    for rule in model.rules():
        if rule.pipelined_only and topology.pp_size == 1:
            continue
        if rule.stage == "layer":
            yield from (model.bind(rule, layer) for layer in layers)
        elif (rule.stage == "first" and is_first) or (rule.stage == "last" and is_last):
            yield model.bind(rule, None)


def megatron_placement(
    model: Model,
    topology: Topology,
    rank: int,
    *,
    flavour: Flavour = "local",
    dtype: str | None = None,
    make_vocab_size_divisible_by: int = 1,
) -> Placement:
    """What ``rank`` of a Megatron run holds of ``model``.

    Buffers are parameters by global name with their local shape; ``dtype`` is that of the parameters (default: the model's).
    Raises PlacementError or ConfigError where a tensor or the layers cannot be divided by the topology.
    """
    padded = model.padded_vocab(topology.tp_size, make_vocab_size_divisible_by)
    model = replace(model, dims={**model.dims, "padded_vocab": padded})
    tp_rank = topology.coordinates(rank).tp_rank
    buffers: list[BufferSpec] = []
    pieces: list[Piece] = []
    fills: list[Fill] = []
    for bound in owned_parameters(model, topology, rank):
        name = bound.rule.name(flavour, bound.layer)
        local = model.local_layout(bound, tp_rank, topology.tp_size)
        buffers.append(BufferSpec(name, dtype or model.dtype, local.shape))
        pieces.extend(Piece(bound.hf[p.source][0], p.box, name, p.offset, p.strides) for p in local.parts)
        fills.extend(Fill(name, p.offset, p.shape, p.strides) for p in local.padding)
    return Placement(f"actor {rank}", tuple(buffers), tuple(pieces), tuple(fills))


def megatron_placements(model: Model, topology: Topology, **options: Any) -> tuple[Placement, ...]:
    """Placements of all ranks of a run. Options as in :func:`megatron_placement`."""
    return tuple(megatron_placement(model, topology, rank, **options) for rank in range(topology.world_size))
