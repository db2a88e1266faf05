"""The price of a sync on paper: what it moves, over which links, and what it needs. Integers; needs no torch, vLLM or GPU.

Plans as a sync would, between the two sides of ``scene``, and counts. What a sync would refuse is
collected instead of raised.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlsync.cli.memory import layerwise_bytes, message_bytes, ring_bytes, staging_bytes, step_bytes
from rlsync.cli.scene import GROUPS, Scene, Sides, host_of, set_out, transports_of
from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import DTYPE_BYTES, Placement
from rlsync.plan.links import num_steps, traffic
from rlsync.plan.packing import lay_out
from rlsync.plan.planner import Plan, build_plan
from rlsync.plan.transports import Memory, fills_buckets, is_staged


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the sync, as in ``rlsync.sync.SyncConfig``; dtypes are the config's where None. Sinks are direct.

    ``offload_weight``: whether the actor's parameters leave its GPUs between syncs.
    ``shm_bytes``: size of /dev/shm on the actor's host, or None where nobody asks whether the ring fits.
    """

    dtype: str | None = None
    engine_dtype: str | None = None
    bucket_bytes: int = 256 * 2**20
    num_slots: int = 2
    transport: str = "auto"
    staging: str = "auto"
    offload_weight: bool = False
    shm_bytes: int | None = None
    make_vocab_size_divisible_by: int = 1


Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Price:
    """One sync on paper; byte counts are exact. Ranges are least and most.

    Attributes:
        slot_bytes, ring_bytes: of the ring in host shared memory; 0 where no worker is served through it.
        staging_bytes_per_actor_rank: of the rings in GPU memory that ``ipc`` reads; 0 where it reads parameters.
        outbox_bytes_per_actor_rank, inbox_bytes_per_worker: for messages of gloo (in the host) or NCCL (on GPUs), or 0.
        layerwise_extra_bytes: most that a worker takes where every module goes through vLLM's post-processing; the direct sink
            takes none.
    """

    architecture: str
    dtype: str
    engine_dtype: str
    num_tensors: int
    tensor_bytes: int
    actor_ranks: int
    actor_hosts: int
    held_bytes_per_actor_rank: Range
    given_bytes_per_actor_rank: Range
    engine_workers: int
    engine_hosts: int
    shared_gpus: int
    received_bytes_per_worker: Range
    redundancy_per_worker: tuple[float, float]
    workers_by_transport: Mapping[str, int]
    num_streams: int
    bytes_same_gpu: int
    bytes_same_host: int
    bytes_other_host: int
    num_buckets: int
    num_copies: int
    slot_bytes: int
    ring_bytes: int
    staging_bytes_per_actor_rank: Range
    outbox_bytes_per_actor_rank: Range
    inbox_bytes_per_worker: Range
    layerwise_extra_bytes: int
    planning_s: float
    plan_digest: str


@dataclass(frozen=True, slots=True)
class Quote:
    """``price`` is None where the refusals leave nothing to plan."""

    refusals: tuple[str, ...]
    price: Price | None = None


def quote(config: Mapping[str, Any], scene: Scene, settings: Settings) -> Quote:
    """Price a sync of the model of a config.json, or say why it cannot be. Raises nothing for what a sync would refuse."""
    try:
        sides = set_out(
            config,
            scene,
            dtype=settings.dtype,
            engine_dtype=settings.engine_dtype,
            make_vocab_size_divisible_by=settings.make_vocab_size_divisible_by,
        )
    except (ConfigError, PlacementError) as error:
        return Quote((str(error),))
    if not sides.actors or not sides.workers:
        return Quote(tuple(sides.refusals))
    began_s = time.perf_counter()
    try:
        plan, members = _plan(sides, settings)
    except PlacementError as error:
        return Quote((*sides.refusals, str(error)))
    price = _count(str(config["architectures"][0]), sides, settings, plan, members, began_s)
    refusals = [*sides.refusals, *_transport_refusals(settings, price)]
    return Quote(tuple(refusals), price)


def _plan(sides: Sides, settings: Settings) -> tuple[Plan, list[list[Placement]]]:
    """The plan, and the workers of each stream: those on one host that hold the same, where shared memory serves them."""
    groups: dict[object, list[Placement]] = defaultdict(list)
    transports = transports_of(sides, settings.transport)
    # Tensor-parallel ranks differ and engines are alike, so that the pieces themselves need no comparison.
    for index, (worker, transport) in enumerate(zip(sides.workers, transports, strict=True)):
        located = _located(worker, transport == "ipc")
        groups[(host_of(worker), worker.pieces) if transport == "shm" else index].append(located)
    members = list(groups.values())
    staged = _staged(sides, settings, members)

    def takes_room(stream: int, source: int) -> bool:
        return fills_buckets(transports, is_direct=True, staged=source in staged[stream])

    plan = build_plan(
        sides.model.tensors(settings.dtype),
        [_located(actor, "ipc" in transports) for actor in sides.actors],
        [row[0] for row in members],
        bucket_bytes=settings.bucket_bytes,
        takes_room=takes_room,
        transforms=("cast",),
    )
    return replace(plan, buckets=tuple(b for b in plan.buckets if b.copies)), members


def _staged(sides: Sides, settings: Settings, members: list[list[Placement]]) -> list[frozenset[int]]:
    """By stream, the actor ranks whose staging rings it reads."""
    of_worker = dict(zip((w.holder for w in sides.workers), transports_of(sides, settings.transport), strict=True))
    memory: Memory = "unstable" if settings.offload_weight else "stable"
    return [
        frozenset(
            rank
            for rank, actor in enumerate(sides.actors)
            if of_worker[row[0].holder] == "ipc" and is_staged(memory, settings.staging, is_near=actor.location == row[0].location)
        )
        for row in members
    ]


def _located(placement: Placement, by_device: bool) -> Placement:
    """Transports that go through host memory find one GPU as near as another."""
    assert placement.location is not None
    return placement if by_device else replace(placement, location=replace(placement.location, device=None))


def _count(architecture: str, sides: Sides, settings: Settings, plan: Plan, members: list[list[Placement]], began_s: float) -> Price:
    moved, parts = traffic(plan), lay_out(plan)
    planning_s = time.perf_counter() - began_s
    of_worker = dict(zip((w.holder for w in sides.workers), transports_of(sides, settings.transport), strict=True))
    transports = [of_worker[row[0].holder] for row in members]
    by_transport: dict[str, int] = defaultdict(int)
    for name, row in zip(transports, members, strict=True):
        by_transport[name] += len(row)
    tensors = sides.model.tensors(settings.dtype)
    slot_size, ring_size = ring_bytes(parts, transports, settings.num_slots)
    stages = staging_bytes(parts, _staged(sides, settings, members), len(sides.actors), settings.num_slots)
    outboxes, inboxes = message_bytes(parts, transports, len(sides.actors), settings.num_slots)
    if "nccl" in transports:
        steps = num_steps(moved, settings.bucket_bytes) if set(transports) == {"nccl"} else 1
        outboxes, inboxes = step_bytes(parts, transports, len(sides.actors), settings.num_slots, steps)
    same_gpu, same_host, other_host = moved.bytes_by_link.values()
    return Price(
        architecture=architecture,
        dtype=tensors[0].dtype,
        engine_dtype=sides.workers[0].buffers[0].dtype,
        num_tensors=len(tensors),
        tensor_bytes=sum(t.nbytes for t in tensors),
        actor_ranks=len(sides.actors),
        actor_hosts=len(set(map(host_of, sides.actors))),
        held_bytes_per_actor_rank=_range(map(_held_bytes, sides.actors)),
        given_bytes_per_actor_rank=_range(moved.bytes_by_source.values()),
        engine_workers=len(sides.workers),
        engine_hosts=len(set(map(host_of, sides.workers))),
        shared_gpus=len({a.location for a in sides.actors} & {w.location for w in sides.workers}),
        received_bytes_per_worker=_range(moved.bytes_by_destination[row[0].holder] for row in members),
        redundancy_per_worker=(min(moved.redundancy.values()), max(moved.redundancy.values())),
        workers_by_transport=dict(by_transport),
        num_streams=len(members),
        bytes_same_gpu=same_gpu,
        bytes_same_host=same_host,
        bytes_other_host=other_host,
        num_buckets=len(plan.buckets),
        num_copies=sum(len(bucket.copies) for bucket in plan.buckets),
        slot_bytes=slot_size,
        ring_bytes=ring_size,
        staging_bytes_per_actor_rank=_range(stages),
        outbox_bytes_per_actor_rank=_range(outboxes),
        inbox_bytes_per_worker=_range(inboxes),
        layerwise_extra_bytes=layerwise_bytes(plan, settings.bucket_bytes),
        planning_s=planning_s,
        plan_digest=plan.digest,
    )


def _transport_refusals(settings: Settings, price: Price) -> Iterable[str]:
    apart = sum(price.workers_by_transport.get(name, 0) for name in GROUPS)
    if settings.transport == "nccl" and price.shared_gpus:
        yield f"weight_sync.transport is nccl, but {price.shared_gpus} GPUs are shared, and NCCL takes one member on each"
    if settings.transport in ("ipc", "shm") and apart:
        where = f"{apart} of {price.engine_workers} workers do not share a host with every actor rank"
        yield f"weight_sync.transport is {settings.transport}, but {where}"
    if settings.shm_bytes is not None and settings.shm_bytes < price.ring_bytes:
        yield (
            f"shared memory: /dev/shm has {settings.shm_bytes} bytes, the ring needs {price.ring_bytes}; "
            "give it more room (docker: --shm-size), or lower weight_sync.bucket_bytes or weight_sync.num_slots"
        )


def _held_bytes(placement: Placement) -> int:
    return sum(b.size * DTYPE_BYTES[b.dtype] for b in placement.buffers)


def _range(values: Iterable[int]) -> Range:
    found = list(values)
    return min(found), max(found)
