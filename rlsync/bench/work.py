"""What there is to do, on paper: the bytes that each engine worker must receive, from how near, and the floor that follows.

Independent of what a sync plans. Knows no process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlsync.bench.spec import Spec
from rlsync.layout.geometry import Location, Placement, TensorSpec
from rlsync.models import model_of
from rlsync.models.paper import paper_worker
from rlsync.models.placement import megatron_placements
from rlsync.plan.links import LINK_NAMES, traffic
from rlsync.plan.planner import build_plan

FLOOR = (
    "of the engine worker with the highest: bytes that actor ranks on its GPU hold / speed of a copy on that GPU, plus all others / "
    "speed of the fastest copy from another GPU; on CPU all bytes / speed of a copy in host memory"
)
_HOST = "here"


@dataclass(frozen=True, slots=True)
class Worker:
    """One engine worker.

    Attributes:
        held_bytes: of HF elements that it holds.
        same_bytes, peer_bytes: what it receives from its own GPU, and from others; on CPU all are ``same``.
        floor_s: the two after one another. overlapped_floor_s: both at once.
    """

    engine: int
    worker: int
    gpu: int | None
    held_bytes: int
    same_bytes: int
    peer_bytes: int
    floor_s: float
    overlapped_floor_s: float


@dataclass(frozen=True, slots=True)
class Sides:
    """Actor ranks and engine workers on their GPUs."""

    tensors: tuple[TensorSpec, ...]
    actors: tuple[Placement, ...]
    workers: tuple[Placement, ...]


def lay_out(spec: Spec) -> Sides:
    """Both sides on paper. Raises PlacementError or ConfigError where one of them cannot be."""
    model = model_of(spec.config)
    actors = megatron_placements(model, spec.topology, dtype="bfloat16")
    held = [
        replace(paper_worker(model, worker, spec.engine_tp, holder=f"engine {engine} worker {worker}", dtype="bfloat16"), location=_at(gpu))
        for engine, gpus in enumerate(spec.engine_gpus)
        for worker, gpu in enumerate(gpus)
    ]
    located = [replace(p, location=_at(gpu)) for p, gpu in zip(actors, spec.actor_gpus, strict=True)]
    return Sides(tuple(model.tensors("bfloat16")), tuple(located), tuple(held))


def workers(spec: Spec, floors: Mapping[str, Any]) -> tuple[Worker, ...]:
    """Every engine worker, engines in order."""
    sides = lay_out(spec)
    places = [(engine, worker, gpu) for engine, gpus in enumerate(spec.engine_gpus) for worker, gpu in enumerate(gpus)]
    return tuple(_worker(spec, floors, sides, held, *place) for held, place in zip(sides.workers, places, strict=True))


def _worker(spec: Spec, floors: Mapping[str, Any], sides: Sides, held: Placement, engine: int, worker: int, gpu: int) -> Worker:
    found = traffic(build_plan(sides.tensors, sides.actors, [held]))
    near, total = found.bytes_by_link[LINK_NAMES[0]], sum(found.bytes_by_destination.values())
    held_bytes = round(total / found.redundancy[held.holder])
    if not spec.on_gpu:
        seconds = total / 1e9 / floors["same_gb_per_s"]["cpu"]
        return Worker(engine, worker, None, held_bytes, total, 0, seconds, seconds)
    same_s = near / 1e9 / floors["same_gb_per_s"][str(gpu)]
    peers = [speed for pair, speed in floors["peer_gb_per_s"].items() if pair.endswith(f"->{gpu}")]
    peer_s = (total - near) / 1e9 / max(peers) if total > near else 0.0
    return Worker(engine, worker, gpu, held_bytes, near, total - near, same_s + peer_s, max(same_s, peer_s))


def _at(gpu: int) -> Location:
    return Location(_HOST, str(gpu))


def floor_s(found: Sequence[Worker]) -> float:
    return max((w.floor_s for w in found), default=math.nan)
