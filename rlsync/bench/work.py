"""What there is to do, on paper: the bytes that each engine worker must receive, from how near, and the floor that follows.

Independent of what a sync plans. Knows no process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlsync.bench.spec import Spec
from rlsync.layout.geometry import DTYPE_BYTES, Location, Placement, TensorSpec
from rlsync.models import model_of
from rlsync.models.paper import paper_workers, seats
from rlsync.models.placement import megatron_placements
from rlsync.plan.outline import outline

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
    shapes = paper_workers(model, seats(model, tp_size=spec.engine_tp, ep_size=spec.engine_ep), dtype="bfloat16")
    held = [
        replace(shape, holder=f"engine {engine} worker {worker}", location=_at(gpu))
        for engine, gpus in enumerate(spec.engine_gpus)
        for worker, (shape, gpu) in enumerate(zip(shapes, gpus, strict=True))
    ]
    located = [replace(p, location=_at(gpu)) for p, gpu in zip(actors, spec.actor_gpus, strict=True)]
    return Sides(tuple(model.tensors("bfloat16")), tuple(located), tuple(held))


def workers(spec: Spec, floors: Mapping[str, Any]) -> tuple[Worker, ...]:
    """Every engine worker, engines in order."""
    sides = lay_out(spec)
    places = [(engine, worker, gpu) for engine, gpus in enumerate(spec.engine_gpus) for worker, gpu in enumerate(gpus)]
    _, taken = outline(sides.tensors, sides.actors, sides.workers).by_link()
    # Of all that is received the nearest copy is taken, so that the others do not matter to a worker.
    amounts = zip(map(_held_bytes, sides.workers), taken[:, 0].tolist(), taken.sum(axis=1).tolist(), strict=True)
    return tuple(_worker(spec, floors, *place, *own) for place, own in zip(places, amounts, strict=True))


def _held_bytes(worker: Placement) -> int:
    items = {b.name: DTYPE_BYTES[b.dtype] for b in worker.buffers}
    return sum(piece.box.size * items[piece.buffer] for piece in worker.pieces)


def _worker(spec: Spec, floors: Mapping[str, Any], engine: int, worker: int, gpu: int, held_bytes: int, near: int, total: int) -> Worker:
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
