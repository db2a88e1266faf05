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
from rlsync.models.paper import paper_worker
from rlsync.models.placement import megatron_placements

# Transports that carry messages between members of a group.
GROUPS = ("nccl", "gloo")


@dataclass(frozen=True, slots=True)
class Scene:
    """Who takes part and where. GPUs are numbered through all hosts; actor ranks take them from 0 on.

    Attributes:
        axes: sizes of the actor's axes, as arguments of Topology.
        tp_size, num_engines: of the engines.
        colocated: engines take the actor's GPUs from 0 on; else those after the actor's.
        actor_hosts: hosts that the actor has for itself, or None where engines may share its last one.
    """

    axes: Mapping[str, int]
    tp_size: int = 1
    num_engines: int = 1
    gpus_per_host: int = 8
    colocated: bool = False
    actor_hosts: int | None = None


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides on their GPUs, and what is wrong with them."""

    tensors: tuple[TensorSpec, ...]
    actors: tuple[Placement, ...] = ()
    workers: tuple[Placement, ...] = ()
    refusals: list[str] = field(default_factory=list)


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
        shapes = [paper_worker(model, rank, scene.tp_size, holder="", dtype=engine_dtype or dtype) for rank in range(scene.tp_size)]
        first = _first_engine_gpu(scene, len(actors))
        workers = tuple(
            replace(p, holder=f"engine {engine} worker {rank}", location=_gpu(first + engine * scene.tp_size + rank, scene))
            for engine in range(scene.num_engines)
            for rank, p in enumerate(shapes)
        )
    except PlacementError as error:
        refusals.append(str(error))
    if scene.colocated and actors and len(workers) > len(actors):
        refusals.append(f"{len(workers)} engine workers cannot share the GPUs of {len(actors)} actor ranks; take fewer engines")
    if scene.actor_hosts is not None and len(actors) > scene.actor_hosts * scene.gpus_per_host:
        refusals.append(f"{len(actors)} actor ranks do not fit on {scene.actor_hosts} hosts of {scene.gpus_per_host} GPUs")
    return Sides(model.tensors(dtype), actors, workers, refusals)


def _first_engine_gpu(scene: Scene, num_actors: int) -> int:
    if scene.colocated:
        return 0
    return num_actors if scene.actor_hosts is None else scene.actor_hosts * scene.gpus_per_host


def _gpu(index: int, scene: Scene) -> Location:
    return Location(f"host {index // scene.gpus_per_host}", f"GPU {index}")


def transports_of(sides: Sides, requested: str) -> list[str]:
    """By worker. What one host has, reaches a worker only where every actor rank is on its host. All have GPUs here."""
    if requested in GROUPS:
        return [requested] * len(sides.workers)
    places = [p.location for p in (*sides.actors, *sides.workers)]
    apart = "nccl" if len(set(places)) == len(places) else "gloo"
    hosts = set(map(host_of, sides.actors))
    return [apart if hosts != {host_of(w)} else "shm" if requested == "shm" else "ipc" for w in sides.workers]


def host_of(placement: Placement) -> str:
    assert placement.location is not None
    return placement.location.host
