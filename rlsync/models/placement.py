"""Placement of a Megatron rank, on paper: model + topology + rank -> buffers, pieces and padding.

A buffer is a parameter under its global name. Nothing here looks at a live module; the bridge compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import BufferSpec, Padding, Piece, Placement
from rlsync.layout.topology import Topology
from rlsync.models.layouts import LocalLayout, transposed_in_block
from rlsync.models.lora import Adapters
from rlsync.models.stacks import Bound, ExpertModule, Flavour, Index, Model, Rule, Stack


def held_parameters(model: Model, topology: Topology, rank: int) -> Iterator[Bound]:
    """The parameters of one rank, in the order of the table.

    Raises ConfigError where the stages cannot divide the layers, PlacementError where another axis cannot divide its numbers.
    """
    at = topology.coordinates(rank)
    stages = {"first": 0, "last": topology.pp_size - 1}

    def numbers(index: Index) -> Sequence[int]:
        count = model.dims[index.count]
        if index.axis == "pp":
            return [layer for chunk in range(topology.vpp_size) for layer in topology.layers_of(count, at.pp_rank, chunk)]
        if index.axis == "ep":
            if count % topology.ep_size:
                raise PlacementError(f"{index.count} {count} cannot be divided by ep_size {topology.ep_size}")
            block = count // topology.ep_size
            return range(at.ep_rank * block, (at.ep_rank + 1) * block)
        return range(count)

    def shares(stack: Stack) -> list[Sequence[int]] | None:
        return [numbers(index) for index in stack.indices] if stages.get(stack.stage, at.pp_rank) == at.pp_rank else None

    is_pipelined = topology.pp_size > 1
    return (bound for bound in model.parameters(shares) if is_pipelined or not bound.rule.pipelined_only)


def megatron_placement(
    model: Model,
    topology: Topology,
    rank: int,
    *,
    flavour: Flavour = "local",
    experts: ExpertModule | None = None,
    dtype: str | None = None,
    make_vocab_size_divisible_by: int = 1,
    adapters: Adapters | None = None,
) -> Placement:
    """What ``rank`` of a Megatron run holds of ``model``, or of its ``adapters`` alone where they are given.

    Buffers are parameters by global name with their local shape; those of GroupedMLP are (experts, rows, columns), as it views them.
    ``dtype`` is that of the parameters (default: the model's), ``experts`` the module that holds the experts of a layer (default: that of
    ``flavour``).
    Raises PlacementError or ConfigError where a tensor, the layers or the experts cannot be divided by the topology.
    """
    padded = model.padded_vocab(topology.tp_size, make_vocab_size_divisible_by)
    model = replace(model, dims={**model.dims, "padded_vocab": padded})
    at = topology.coordinates(rank)
    share = {"tp": (at.tp_rank, topology.tp_size), "etp": (at.etp_rank, topology.etp_size)}
    buffers: list[BufferSpec] = []
    pieces: list[Piece] = []
    padding: list[Padding] = []
    layouts: dict[Rule, LocalLayout] = {}  # of a rule they are the same in every layer
    held = held_parameters(model, topology, rank)
    for bound in held if adapters is None else adapters.parameters(held):
        name = bound.name(flavour, experts)
        local = layouts.get(bound.rule) or model.local_layout(bound, *share[bound.stack.tensor_axis])
        layouts[bound.rule] = local
        index = 0
        if bound.joined and experts == "GroupedMLP":
            count = bound.copies // topology.ep_size
            index = bound.numbers[-1] % count
            local = transposed_in_block(local, index, count)
        if index == 0:
            buffers.append(BufferSpec(name, bound.stack.dtype or dtype or model.dtype, local.shape))
        pieces.extend(Piece(bound.hf[p.source][0], p.box, name, p.offset, p.strides) for p in local.parts)
        padding.extend(Padding(name, p.offset, p.shape, p.strides) for p in local.padding)
    return Placement(f"actor {rank}", tuple(buffers), tuple(pieces), tuple(padding))


def megatron_placements(model: Model, topology: Topology, **options: Any) -> tuple[Placement, ...]:
    """Placements of all ranks of a run. Options as in :func:`megatron_placement`. Replicas share what they hold, as objects too."""
    held: dict[tuple[int, ...], Placement] = {}
    placements = []
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        key = at.tp_rank, at.pp_rank, at.ep_rank, at.etp_rank
        if key not in held:
            held[key] = megatron_placement(model, topology, rank, **options)
        placements.append(replace(held[key], holder=f"actor {rank}"))
    return tuple(placements)


def _deepstack_beyond_first_chunk(model: Model, topology: Topology) -> list[str]:
    """Features of a tower go into the first language layers, one block's into each, and are not sent to another stage."""
    taken = () if model.vision is None else model.vision.deepstack_visual_indexes
    try:
        layers = len(topology.layers_of(model.num_layers, 0))
    except ConfigError:
        return []
    if len(taken) <= layers:
        return []
    chunk = "first pipeline stage" if topology.vpp_size == 1 else "first virtual chunk of the first pipeline stage"
    return [
        f"deepstack_visual_indexes {list(taken)} go into language layers 0 to {len(taken) - 1}, and the {chunk} holds {layers} of "
        f"{model.num_layers} layers: use fewer stages (pipeline_model_parallel_size {topology.pp_size}, virtual {topology.vpp_size}), or a "
        "larger first stage by decoder_first_pipeline_num_layers"
    ]


def indivisible(model: Model, topology: Topology) -> list[str]:
    """What of a model a topology cannot divide, in words; the layouts and the stages say so themselves."""
    findings = []
    if topology.ep_size > 1 and not any(index.axis == "ep" for stack in model.family.stacks for index in stack.indices):
        findings.append(f"ep_size is {topology.ep_size}; {model.architecture} has no experts, so it must be 1")
    for index in sorted({index for stack in model.family.stacks for index in stack.indices}, key=lambda index: index.name):
        count = model.dims[index.count]
        try:
            if index.axis == "pp":
                topology.layers_of(count, 0)
            elif index.axis == "ep" and count % topology.ep_size:
                findings.append(f"{index.count} {count} cannot be divided by ep_size {topology.ep_size}")
        except ConfigError as error:
            findings.append(str(error))
    findings += _deepstack_beyond_first_chunk(model, topology)
    sizes = {"tp": topology.tp_size, "etp": topology.etp_size}
    model = replace(model, dims={**model.dims, "padded_vocab": model.padded_vocab(topology.tp_size)})
    reasons: dict[str, str] = {}
    # Experts of a layer are alike, layers are not.
    for bound in model.parameters(lambda stack: [range(model.dims[i.count] if i is stack.indices[0] else 1) for i in stack.indices]):
        axis = bound.stack.tensor_axis
        try:
            bound.rule.layout.local([shape for _, shape in bound.hf], 0, sizes[axis], model.dims)
        except PlacementError as error:
            reasons.setdefault(f"{axis}_size {sizes[axis]} does not fit {{}}: {error}", bound.hf[0][0])
    return findings + [reason.format(tensor) for reason, tensor in reasons.items()]
