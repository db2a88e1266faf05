"""The price of a sync on paper: what it moves, over which links, and what it needs. Integers; needs no torch, vLLM or GPU.

Plans as a sync would, between the two sides of ``scene``, and counts. What a sync would refuse is
collected instead of raised.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlsync.cli.memory import layerwise_bytes, message_bytes, ring_bytes, staging_bytes, step_bytes
from rlsync.cli.prediction import Prediction, predicted, unpredictable
from rlsync.cli.scene import GROUPS, Scene, Sides, host_of, set_out, transports_of
from rlsync.errors import ConfigError, PlacementError
from rlsync.gc_pause import gc_paused
from rlsync.layout.geometry import DTYPE_BYTES, Placement
from rlsync.plan.links import LINK_NAMES, link_class, num_steps
from rlsync.plan.outline import Outline, outline, outlined
from rlsync.plan.packing import lay_out
from rlsync.plan.planner import build_plan
from rlsync.plan.transports import Memory, fills_buckets, is_staged


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the sync, as in ``rlsync.sync.SyncConfig``; dtypes are the config's where None. Sinks are direct.

    ``offload_weight``: whether the actor's parameters leave its GPUs between syncs.
    ``shm_bytes``: size of /dev/shm on the actor's host, or None where nobody asks whether the ring fits.
    ``links``: bytes per second that arrive at one GPU, by ``prediction.LINKS``; empty where nobody asks for seconds.
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
    links: Mapping[str, float] = field(default_factory=dict)


Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """Bytes between hosts: a row for each of the actor's, a column for each of the engines'."""

    actor_hosts: tuple[str, ...]
    engine_hosts: tuple[str, ...]
    nbytes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Price:
    """One sync on paper; byte counts are exact. Ranges are least and most.

    Attributes:
        slot_bytes, ring_bytes: of the ring in host shared memory; 0 where no worker is served through it.
        staging_bytes_per_actor_rank: of the rings in GPU memory that ``ipc`` reads; 0 where it reads parameters.
        outbox_bytes_per_actor_rank, inbox_bytes_per_worker: for messages of gloo (in the host) or NCCL (on GPUs), or 0.
        heaviest_actor_rank, heaviest_worker: who gives and who receives most; of equals the first.
        num_steps: of NCCL's messages, or 0.
        host_traffic: bytes between hosts.
        prediction: seconds; None where no speeds are known, or for the reason in ``unpredicted``.
        planning_s: of the processor, which other work on the machine does not lengthen; what is laid out first included.
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
    heaviest_actor_rank: str
    engine_workers: int
    engine_hosts: int
    shared_gpus: int
    received_bytes_per_worker: Range
    heaviest_worker: str
    redundancy_per_worker: tuple[float, float]
    workers_by_transport: Mapping[str, int]
    num_destinations: int
    bytes_same_gpu: int
    bytes_same_host: int
    bytes_other_host: int
    num_buckets: int
    num_copies: int
    num_steps: int
    slot_bytes: int
    ring_bytes: int
    staging_bytes_per_actor_rank: Range
    outbox_bytes_per_actor_rank: Range
    inbox_bytes_per_worker: Range
    layerwise_extra_bytes: int
    host_traffic: HostTraffic
    prediction: Prediction | None
    unpredicted: str
    planning_s: float


@dataclass(frozen=True, slots=True)
class Quote:
    """``price`` is None where the refusals leave nothing to plan."""

    refusals: tuple[str, ...]
    price: Price | None = None


@gc_paused()
def quote(config: Mapping[str, Any], scene: Scene, settings: Settings) -> Quote:
    """Price a sync of the model of a config.json, or say why it cannot be. Raises nothing for what a sync would refuse."""
    began_s = time.process_time()
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
    found = price_of(str(config["architectures"][0]), sides, settings)
    return found if found.price is None else replace(found, price=replace(found.price, planning_s=time.process_time() - began_s))


@gc_paused()
def price_of(architecture: str, sides: Sides, settings: Settings, *, by_kind: bool = True) -> Quote:
    """Price a sync between two sides. ``by_kind=False`` plans each destination by itself, which finds the same and takes longer."""
    began_s = time.process_time()
    try:
        drawn, workers, transports, is_read_staged = _draw(sides, settings, by_kind)
    except PlacementError as error:
        return Quote((*sides.refusals, str(error)))
    price = _count(architecture, sides, settings, drawn, workers, transports, is_read_staged, began_s)
    return Quote((*sides.refusals, *_transport_refusals(settings, price)), price)


_Drawn = tuple[Outline, list[Placement], list[str], Callable[[int, int], bool]]


def _draw(sides: Sides, settings: Settings, by_kind: bool) -> _Drawn:
    """The plan in outline, the worker that each destination is, and by kind the transport and whether it reads rings over a link."""
    chosen = transports_of(sides, settings.transport)
    first_of: dict[object, int] = {}
    # Workers of one host that hold the same are one destination, where shared memory serves them.
    for index, (worker, transport) in enumerate(zip(sides.workers, chosen, strict=True)):
        first_of.setdefault((host_of(worker), worker.pieces) if transport == "shm" else index, index)
    firsts = list(first_of.values())
    used = set(chosen)
    memory: Memory = "unstable" if settings.offload_weight else "stable"

    def is_read_staged(worker: int, link: int) -> bool:
        return chosen[worker] == "ipc" and is_staged(memory, settings.staging, is_near=LINK_NAMES[link] == "same device")

    def takes_room(destination: int, link: int) -> bool:
        return fills_buckets(used, is_direct=True, staged=is_read_staged(firsts[destination], link))

    tensors = sides.tensors
    actors = [_located(actor, "ipc" in chosen) for actor in sides.actors]
    destinations = [_located(sides.workers[worker], chosen[worker] == "ipc") for worker in firsts]
    rules: dict[str, Any] = {"bucket_bytes": settings.bucket_bytes, "transforms": ("cast",)}
    if by_kind:
        drawn = outline(
            tensors, actors, destinations, kind_of=lambda destination: chosen[firsts[destination]], takes_room=takes_room, **rules
        )
    else:
        drawn = outlined(
            build_plan(
                tensors, actors, destinations,
                takes_room=lambda destination, rank: takes_room(
                    destination, link_class(actors[rank].location, destinations[destination].location)
                ),
                **rules,
            )
        )  # fmt: skip
    workers = [firsts[kind.members[0]] for kind in drawn.kinds]
    return (
        drawn,
        [sides.workers[worker] for worker in firsts],
        [chosen[worker] for worker in workers],
        lambda number, link: is_read_staged(workers[number], link),
    )


def _located(placement: Placement, by_device: bool) -> Placement:
    """Transports that go through host memory find one GPU as near as another."""
    assert placement.location is not None
    return placement if by_device else replace(placement, location=replace(placement.location, device=None))


def _count(
    architecture: str,
    sides: Sides,
    settings: Settings,
    drawn: Outline,
    workers: Sequence[Placement],
    transports: Sequence[str],
    is_read_staged: Callable[[int, int], bool],
    began_s: float,
) -> Price:
    moved, parts = drawn.traffic(), [[part for (part,) in lay_out(kind.plan(drawn.buckets))] for kind in drawn.kinds]
    planning_s = time.process_time() - began_s
    tensors = sides.tensors
    slot_size, ring_size = ring_bytes(drawn, parts, transports, settings.num_slots)
    stages = staging_bytes(drawn, parts, is_read_staged, settings.num_slots)
    outboxes, inboxes = message_bytes(drawn, parts, transports, settings.num_slots)
    steps = 0
    if "nccl" in transports:
        steps = num_steps(moved, settings.bucket_bytes) if set(transports) == {"nccl"} else 1
        outboxes, inboxes = step_bytes(drawn, parts, transports, settings.num_slots, steps)
    given, taken = drawn.by_link()
    by_link = same_gpu, same_host, other_host = tuple(taken.sum(axis=0).tolist())
    names = tuple(a.holder for a in sides.actors), tuple(w.holder for w in workers)
    unpredicted = unpredictable(settings.links, by_link, transports, any(stages)) if settings.links else ""
    return Price(
        architecture=architecture,
        dtype=tensors[0].dtype,
        engine_dtype=sides.workers[0].buffers[0].dtype,
        num_tensors=len(tensors),
        tensor_bytes=sum(t.nbytes for t in tensors),
        actor_ranks=len(sides.actors),
        actor_hosts=len(set(map(host_of, sides.actors))),
        held_bytes_per_actor_rank=_range(map(_held_bytes, {id(a.buffers): a for a in sides.actors}.values())),
        given_bytes_per_actor_rank=_range(moved.bytes_by_source.values()),
        heaviest_actor_rank=names[0][int(given.sum(axis=1).argmax())],
        engine_workers=len(sides.workers),
        engine_hosts=len(set(map(host_of, sides.workers))),
        shared_gpus=len({a.location for a in sides.actors} & {w.location for w in sides.workers}),
        received_bytes_per_worker=_range(moved.bytes_by_destination.values()),
        heaviest_worker=names[1][int(taken.sum(axis=1).argmax())],
        redundancy_per_worker=(min(moved.redundancy.values()), max(moved.redundancy.values())),
        workers_by_transport=dict(Counter(transports_of(sides, settings.transport))),
        num_destinations=sum(len(kind.members) for kind in drawn.kinds),
        bytes_same_gpu=same_gpu,
        bytes_same_host=same_host,
        bytes_other_host=other_host,
        num_buckets=len(drawn.buckets),
        num_copies=drawn.num_copies,
        num_steps=steps,
        slot_bytes=slot_size,
        ring_bytes=ring_size,
        staging_bytes_per_actor_rank=_range(stages),
        outbox_bytes_per_actor_rank=_range(outboxes),
        inbox_bytes_per_worker=_range(inboxes),
        layerwise_extra_bytes=layerwise_bytes(drawn, settings.bucket_bytes),
        host_traffic=_between_hosts(sides, drawn, workers),
        prediction=None
        if unpredicted or not settings.links
        else predicted(settings.links, given, taken, names, num_steps=steps, num_engines=sides.num_engines),
        unpredicted=unpredicted,
        planning_s=planning_s,
    )


def _between_hosts(sides: Sides, drawn: Outline, workers: Sequence[Placement]) -> HostTraffic:
    numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
    groups = [
        [known.setdefault(host_of(p), len(known)) for p in placements]
        for known, placements in zip(numbers, (sides.actors, workers), strict=True)
    ]
    moved = drawn.between(*groups)
    return HostTraffic(tuple(numbers[0]), tuple(numbers[1]), tuple(map(tuple, moved.tolist())))


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
