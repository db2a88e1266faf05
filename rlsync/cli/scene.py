"""Who takes part in a sync on paper, and where: actor ranks and engine workers on GPUs and hosts, and what carries bytes to whom.

Places both sides and chooses transports as a sync would. Integers and names; plans nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import Location, Placement, TensorSpec
from rlsync.layout.topology import Topology
from rlsync.models import check_config, model_of
from rlsync.models.base_keys import DTYPES
from rlsync.models.paper import paper_workers, seats
from rlsync.models.placement import megatron_placements

# Sizes of axes as arguments say them: the actor's, as fields of Topology, and the engines', as fields of Scene.
AXES = {"tp": "tp_size", "pp": "pp_size", "vpp": "vpp_size", "cp": "cp_size", "dp": "dp_size", "ep": "ep_size", "etp": "etp_size"}
STAGES = {"first": "first_stage_layers", "last": "last_stage_layers"}
ENGINES = {"tp": "tp_size", "dp": "dp_size", "ep": "ep_size", "engines": "num_engines"}
# Transports that carry messages between members of a group.
GROUPS = ("nccl", "gloo")


@dataclass(frozen=True, slots=True)
class Scene:
    """Who takes part and where. GPUs are numbered through all hosts; actor ranks take them from 0 on.

    Attributes:
        axes: sizes of the actor's axes, as arguments of Topology.
        tp_size, dp_size, ep_size: of an engine: vLLM's tensor_parallel_size and data_parallel_size, and the ranks that share experts, which
            are 1 (every expert is cut) or all of them (enable_expert_parallel).
        colocated: engines take the actor's GPUs from 0 on; else those after the actor's.
        actor_hosts: hosts that the actor has for itself, or None where engines may share its last one.
    """

    axes: Mapping[str, int]
    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    num_engines: int = 1
    gpus_per_host: int = 8
    colocated: bool = False
    actor_hosts: int | None = None

    @property
    def engine_size(self) -> int:
        """Workers of an engine."""
        return self.tp_size * self.dp_size


def sizes(text: str, names: Mapping[str, str], option: str) -> dict[str, int]:
    """``tp=2,pp=1`` by full names. Raises ConfigError for what it cannot read."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or not (value.isascii() and value.isdigit()) or int(value) < 1:
            raise ConfigError(f"{option} {text!r}: cannot read {part!r}; write {', '.join(f'{n}=N' for n in names)}")
        if names[name] in found:
            raise ConfigError(f"{option} {text!r}: {name} is given twice")
        found[names[name]] = int(value)
    return found


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides on their GPUs, and what is wrong with them."""

    tensors: tuple[TensorSpec, ...]
    actors: tuple[Placement, ...] = ()
    workers: tuple[Placement, ...] = ()
    refusals: list[str] = field(default_factory=list)
    num_engines: int = 1


def set_out(
    config: Mapping[str, Any], scene: Scene, *, dtype: str | None, engine_dtype: str | None, make_vocab_size_divisible_by: int
) -> Sides:
    """Placements of both sides; each side is tried, so that what is wrong with one does not hide the other.

    Refuses what an actor would, by the same check. Raises ConfigError where that leaves no model.
    """
    model = model_of(config)
    refusals: list[str] = []
    actors: tuple[Placement, ...] = ()
    workers: tuple[Placement, ...] = ()
    try:
        topology = Topology(**scene.axes)
        refusals += check_config(config, topology)
        if dtype is not None and dtype not in DTYPES:
            refusals.append(f"dtype {dtype} is not supported of an actor; use one of {', '.join(DTYPES)}")
        placements = (
            () if refusals else megatron_placements(model, topology, dtype=dtype, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
        )
        actors = tuple(replace(p, location=_gpu(i, scene)) for i, p in enumerate(placements))
    except (ConfigError, PlacementError) as error:
        refusals.append(str(error))
    try:
        held_in = seats(model, tp_size=scene.tp_size, dp_size=scene.dp_size, ep_size=scene.ep_size)
        shapes = paper_workers(model, held_in, dtype=engine_dtype or dtype)
        first = _first_engine_gpu(scene, len(actors))
        workers = tuple(
            replace(p, holder=f"engine {engine} worker {rank}", location=_gpu(first + engine * scene.engine_size + rank, scene))
            for engine in range(scene.num_engines)
            for rank, p in enumerate(shapes)
        )
    except PlacementError as error:
        refusals.append(str(error))
    if scene.colocated and actors and len(workers) > len(actors):
        refusals.append(f"{len(workers)} engine workers cannot share the GPUs of {len(actors)} actor ranks; take fewer engines")
    if scene.actor_hosts is not None and len(actors) > scene.actor_hosts * scene.gpus_per_host:
        refusals.append(f"{len(actors)} actor ranks do not fit on {scene.actor_hosts} hosts of {scene.gpus_per_host} GPUs")
    return Sides(model.tensors(dtype), actors, workers, refusals, scene.num_engines)


def _first_engine_gpu(scene: Scene, num_actors: int) -> int:
    if scene.colocated:
        return 0
    return num_actors if scene.actor_hosts is None else scene.actor_hosts * scene.gpus_per_host


def _gpu(index: int, scene: Scene) -> Location:
    return Location(f"host {index // scene.gpus_per_host}", f"GPU {index}")


def transports_of(sides: Sides, requested: str) -> list[str]:
    """The transport of each worker. Those within a host reach a worker only where every actor rank is on its host. All have GPUs here."""
    if requested in GROUPS:
        return [requested] * len(sides.workers)
    places = [p.location for p in (*sides.actors, *sides.workers)]
    apart = "nccl" if len(set(places)) == len(places) else "gloo"
    hosts = set(map(host_of, sides.actors))
    return [apart if hosts != {host_of(w)} else "shm" if requested == "shm" else "ipc" for w in sides.workers]


def host_of(placement: Placement) -> str:
    assert placement.location is not None
    return placement.location.host
