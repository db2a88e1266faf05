"""How Megatron's files of one rank, in its ``torch`` format, hold a model: keys of its chunks, and names counted within a chunk.

Integers and names: opens no file. ``rlsync.megatron.state`` writes and reads such files on live models, ``rlsync.convert`` on paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlsync.layout.topology import Topology
from rlsync.models.lora import Adapters, module_of
from rlsync.models.placement import held_parameters
from rlsync.models.stacks import Bound, Model

RANK_STATE_FILE = "model_optim_rng.pt"
DISTRIBUTED_OPTIMIZER_FILE = "distrib_optim.pt"
CHECKPOINT_VERSION = 3.0  # of Megatron's format: parameter layouts that its tools assume
# State of Adam for each parameter of a distributed optimizer: itself in float32, and two moments.
PLANES = ("param", "exp_avg", "exp_avg_sq")
# Of an optimizer that is not distributed: names of the parameters whose state it keeps, by part and group, in the order of the state.
WHOLE_NAMES = "whole_parameter_names"
# Options of what a file holds: rows of the vocabulary over all tensor ranks, and what adapters are multiplied by, None without them.
PADDED_VOCABULARY = "padded vocabulary"
ADAPTERS_SCALING = "adapters' scaling"
# Of TransformerEngine's modules, beside their parameters: scales of FP8, which a model in other precisions has none of.
EXTRA_STATE = "_extra_state"


def chunk_keys(vpp_size: int) -> tuple[str, ...]:
    """Keys of the virtual chunks of a rank, in their order."""
    return ("model",) if vpp_size == 1 else tuple(f"model{chunk}" for chunk in range(vpp_size))


def weights_only_state(
    topology: Mapping[str, Any], step: int, padded_vocab: int, chunks: Mapping[str, Mapping[str, Any]], *, scaling: float | None = None
) -> dict[str, Any]:
    """Content of ``model_optim_rng.pt`` without optimizer, schedule and random state; ``chunks`` by key, tensors by name in the chunk.

    ``scaling`` is that of adapters, which then are all that the chunks hold.
    """
    options = {PADDED_VOCABULARY: padded_vocab, ADAPTERS_SCALING: scaling}
    head = {"checkpoint_version": CHECKPOINT_VERSION, "iteration": step, "topology": dict(topology), "rng_state": [], "options": options}
    return {**head, **chunks}


def both_names(whole: str, local: str) -> str:
    """What to call a parameter in a message: by its layer and expert of the whole model, and as the file of its rank has it."""
    return whole if whole == local else f"{whole} ({local} there)"


@dataclass(frozen=True, slots=True)
class LocalName:
    """A parameter of a rank: its chunk, and its names in there under the two specs."""

    bound: Bound
    chunk: int
    local: str
    te: str


def local_names(model: Model, topology: Topology, rank: int, adapters: Adapters | None = None) -> Iterator[LocalName]:
    """The parameters of one rank, in the order of the table, with layers counted in their chunk and experts on their rank, from 0; or the
    factors of its ``adapters`` where they are given."""
    named = _local_names(model, topology, rank)
    if adapters is None:
        yield from named
        return
    found = {name.bound.local: name for name in named}
    for rule in adapters.rules(name.bound for name in found.values()):
        base = found[rule.base.local]
        for factor in (rule.a, rule.b):
            local = f"{module_of(base.local)}{factor.local.removeprefix(module_of(rule.base.local))}"
            yield LocalName(factor, base.chunk, local, local)


def _local_names(model: Model, topology: Topology, rank: int) -> Iterator[LocalName]:
    at = topology.coordinates(rank)
    layers: dict[str, dict[int, tuple[int, int]]] = {}
    for bound in held_parameters(model, topology, rank):
        chunk = topology.vpp_size - 1 if bound.stack.stage == "last" else 0
        numbers = {}
        for index, number in zip(bound.stack.indices, bound.numbers, strict=True):
            count = model.dims[index.count]
            numbers[index.name] = number
            if index.axis == "pp":
                if index.count not in layers:
                    layers[index.count] = {
                        layer: (chunk, position)
                        for chunk in range(topology.vpp_size)
                        for position, layer in enumerate(topology.layers_of(count, at.pp_rank, chunk))
                    }
                chunk, numbers[index.name] = layers[index.count][number]
            elif index.axis == "ep":
                numbers[index.name] = number - at.ep_rank * (count // topology.ep_size)
        local, te, _ = bound.stack.names(bound.rule, numbers)
        yield LocalName(bound, chunk, local, te)
