"""The plan of a connection: its destinations, their transports, and the assignment of every peer. Runs on actor rank 0.

Owns the choice of destinations and transports. Moves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from rlsync.coordinator.messages import ActorAssignment, ActorHello, Recorded, Reports, WorkerAssignment, WorkerHello
from rlsync.coordinator.roster import Member
from rlsync.errors import ConfigError, first_few
from rlsync.layout.geometry import Location, Placement, TensorSpec
from rlsync.plan.links import Traffic, num_steps, traffic
from rlsync.plan.packing import PackedPart, lay_out
from rlsync.plan.planner import Plan, build_plan
from rlsync.plan.transforms import TRANSFORMS
from rlsync.plan.transports import TRANSPORTS, fills_buckets, in_one_group, in_place, is_staged
from rlsync.sync.config import SyncConfig
from rlsync.transport.ends import EndArguments, Hosted, Routes, transport


@dataclass(frozen=True, slots=True)
class ConnectionPlan:
    """A plan between actor ranks and workers, and how its buckets are packed.

    Attributes:
        destination_of: by worker of the reports, its destination in the plan.
        transports: by destination. One that no others share is of one worker alone.
        actors, workers: names of the actor ranks, and of the first worker of each destination; engines: of these workers.
        staging: (destination, actor rank) pairs that go through a staging ring of the rank.
        num_steps: into how many steps the messages of a bucket are cut.
        staged_bytes: bytes that go through staging rings.
        is_read_in_place: whether all bytes are copied once, from parameter to parameter.
        num_frozen: buckets, the first ones, that hold what no actor rank trains; frozen_bytes: theirs, as ``nbytes``.
        trained_traffic, trained_staged_bytes: of the other buckets.
        inputs: all that ``plan``, ``parts`` and ``traffic`` were made of.
    """

    plan: Plan
    parts: tuple[tuple[PackedPart, ...], ...]
    destination_of: tuple[int, ...]
    traffic: Traffic
    transports: tuple[str, ...]
    actors: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    staging: frozenset[tuple[int, int]] = frozenset()
    num_steps: int = 1
    staged_bytes: int = 0
    is_read_in_place: bool = False
    num_frozen: int = 0
    trained_traffic: Traffic = Traffic({}, {}, {}, {})
    trained_staged_bytes: int = 0
    inputs: tuple[Any, ...] = ()

    @property
    def frozen_bytes(self) -> int:
        return self.nbytes - sum(self.trained_traffic.bytes_by_destination.values()) if self.num_frozen else 0

    @property
    def num_destinations(self) -> int:
        return len(self.plan.destinations)

    @property
    def transport(self) -> str:
        """Names of the transports in use, joined by ``+``."""
        return "+".join(sorted(set(self.transports)))

    @property
    def nbytes(self) -> int:
        """Bytes that all destinations take in, once each."""
        return sum(self.traffic.bytes_by_destination.values())

    def num_slots(self, wanted: int) -> int:
        """Slots of rings and messages. Parameters that are read in place wait for no slot."""
        return len(self.parts) if self.is_read_in_place else min(wanted, len(self.parts) * self.num_steps)

    def routes(self, num_slots: int) -> dict[str, Routes]:
        """What each transport in use has to carry, by its name. ``num_slots``: ``SyncConfig.num_slots``."""
        found: dict[str, Routes] = {}
        for name in dict.fromkeys(self.transports):
            own = tuple(d for d, each in enumerate(self.transports) if each == name)
            workers, engines = (tuple(names[d] for d in own) for names in (self.workers, self.engines))
            found[name] = Routes(self.parts, own, self.actors, workers, engines, self.num_slots(num_slots), self.num_steps, self.staging)
        return found

    def assignments(
        self, num_slots: int, verify: str, hosted: Mapping[str, Hosted]
    ) -> tuple[tuple[ActorAssignment, ...], tuple[WorkerAssignment, ...]]:
        """The assignment of each actor rank, and of each worker of the reports. ``hosted``: by transport, what its ``host`` has opened."""
        ends = {name: transport(name).assign(routes, hosted.get(name)) for name, routes in self.routes(num_slots).items()}
        common = self.plan.digest, self.num_slots(num_slots), verify
        actors = tuple(
            ActorAssignment(
                *common, len(self.parts), {name: end.actors[rank] for name, end in ends.items() if end.actors[rank]}, self.num_frozen
            )
            for rank in range(len(self.actors))
        )
        workers = tuple(
            WorkerAssignment(
                *common,
                d,
                tuple(row[d] for row in self.parts),
                self.transports[d],
                *_of_worker(ends[self.transports[d]], d),
                self.num_frozen,
            )
            for d in self.destination_of
        )
        return actors, workers


def _of_worker(ends: EndArguments, destination: int) -> tuple[bytes, tuple[int, ...]]:
    return ends.workers[destination], ends.imports.get(destination, ())


def plan_connection(
    tensors: Sequence[TensorSpec],
    placements: Sequence[Placement],
    reports: Reports,
    config: SyncConfig,
    declared: Mapping[str, str] | None = None,
    last: ConnectionPlan | None = None,
) -> ConnectionPlan:
    """Plan a connection.

    Args:
        tensors: every HF tensor of the actor, in the order in which buckets carry them.
        placements: what each actor rank holds, by rank.
        reports: hellos of all peers, and what each worker has recorded.
        declared: transforms by tensor that the sources declare, see ``rlsync.sync.source.Declared``.
        last: a former plan, whose copies are taken over where both sides hold what they held then, in the same places.

    Raises PlacementError where the two sides do not fit, ConfigError where no transport reaches a worker.
    """
    declared = declared or {}
    chosen = choose_transports(reports, config.transport)
    by_gpu = any(TRANSPORTS[name].is_by_gpu for name in chosen)
    located = [replace(p, location=_location(hello, by_gpu)) for p, hello in zip(placements, reports.actors, strict=True)]
    destinations, destination_of = _destinations(reports.workers, reports.records, chosen)
    # All workers of a destination have one transport.
    transports = tuple(chosen[destination_of.index(d)] for d in range(len(destinations)))
    first = [reports.workers[destination_of.index(d)] for d in range(len(destinations))]
    computing = [any(piece.tensor in declared for piece in p.pieces) for p in placements]
    staging = _staging(destinations, transports, reports.actors, computing, config.staging)
    is_direct, used = all(r.sink == "direct" for r in reports.records), set(transports)

    def takes_room(destination: int, rank: int) -> bool:
        return fills_buckets(used, is_direct=is_direct, staged=(destination, rank) in staging)

    frozen = frozen_tensors(tensors, placements, reports)
    inputs = (
        tuple(tensors), tuple(located), tuple(destinations), config.bucket_bytes, transports, staging, is_direct, frozen, dict(declared),
    )  # fmt: skip
    if last is not None and last.inputs == inputs:
        plan, moved, parts = last.plan, last.traffic, last.parts
    else:
        plan = build_plan(
            tensors, located, destinations,
            bucket_bytes=config.bucket_bytes, takes_room=takes_room, transforms=tuple(TRANSFORMS), frozen=frozen, declared=declared,
        )  # fmt: skip
        plan = replace(plan, buckets=tuple(bucket for bucket in plan.buckets if bucket.copies))
        moved, parts = traffic(plan), lay_out(plan)
    num_frozen = sum(bucket.tensors[0].name in frozen for bucket in plan.buckets)
    given = [_given(row) for row in parts]
    used_staging = staging & {way for row in given for way in row}
    _refuse_in_place(plan, transports, used_staging)
    return ConnectionPlan(
        plan=plan,
        parts=parts,
        destination_of=destination_of,
        traffic=moved,
        transports=transports,
        actors=tuple(str(Member(b"", hello)) for hello in reports.actors),
        workers=tuple(str(Member(b"", hello)) for hello in first),
        engines=tuple(hello.engine_id for hello in first),
        staging=used_staging,
        # One bucket, whose messages both ends cut into steps.
        num_steps=num_steps(moved, config.bucket_bytes) if in_place(transports, is_direct=is_direct) == "steps" else 1,
        staged_bytes=sum(row[way] for row in given for way in used_staging & row.keys()),
        # Also with other sinks than direct: nobody waits for a slot.
        is_read_in_place=in_place(transports, is_direct=True) == "read" and not used_staging,
        num_frozen=num_frozen,
        trained_traffic=traffic(replace(plan, buckets=plan.buckets[num_frozen:])) if num_frozen else moved,
        trained_staged_bytes=sum(row[way] for row in given[num_frozen:] for way in used_staging & row.keys()),
        inputs=inputs,
    )


def _given(row: Sequence[PackedPart]) -> dict[tuple[int, int], int]:
    """(destination, actor rank) -> bytes that one takes from the other in a bucket."""
    found: dict[tuple[int, int], int] = defaultdict(int)
    for destination, part in enumerate(row):
        for r in part.regions:
            found[destination, r.source] += r.nbytes
    return found


def frozen_tensors(tensors: Sequence[TensorSpec], placements: Sequence[Placement], reports: Reports) -> frozenset[str]:
    """HF tensors that no actor rank trains, and that a worker can keep while a sync renews the others.

    A worker renews a module as a whole, so that what is frozen in one that has trained tensors too is sent with these. Loaders are given
    whole checkpoints: an engine with that sink keeps nothing.
    """
    if any(record.sink not in ("direct", "layerwise", "direct+layerwise") for record in reports.records):
        return frozenset()
    found, trained = set[str](), set[str]()
    for hello, placement in zip(reports.actors, placements, strict=True):
        idle = {tensors[number].name for begin, end in hello.frozen for number in range(begin, end)}
        found |= idle
        trained |= {piece.tensor for piece in placement.pieces} - idle
    frozen = found - trained
    modules: dict[tuple[int, str], set[str]] = defaultdict(set)
    for worker, record in enumerate(reports.records) if frozen else ():
        for piece in record.placement.pieces:
            modules[worker, piece.buffer.rpartition(".")[0]].add(piece.tensor)
    while any(mixed := [held & frozen for held in modules.values() if held & frozen and not held <= frozen]):
        frozen -= set().union(*mixed)
    return frozenset(frozen)


def _refuse_in_place(plan: Plan, transports: Sequence[str], staging: frozenset[tuple[int, int]]) -> None:
    """Raises ConfigError for a transform that is not fused into copies, where the parameter would be read in place."""
    for copy in (copy for bucket in plan.buckets for copy in bucket.copies if copy.transform):
        is_read = TRANSPORTS[transports[copy.destination]].in_place == "read" and (copy.destination, copy.source) not in staging
        if is_read and not TRANSFORMS[copy.transform].is_fused:
            raise ConfigError(
                f"{copy.tensor} is sent through {copy.transform}, which its sender computes, while weight_sync.transport "
                f"{transports[copy.destination]} reads it where it lies; set weight_sync.staging to always"
            )


def choose_transports(reports: Reports, requested: str) -> tuple[str, ...]:
    """The transport of each worker of the reports. Raises ConfigError where the requested one does not reach a worker."""
    if requested == "auto":
        return in_one_group(next(name for name in TRANSPORTS if transport(name).finding(reports, w) is None) for w in reports.workers)
    findings = [found for worker in reports.workers if (found := transport(requested).finding(reports, worker)) is not None]
    if findings:
        raise ConfigError(f"weight_sync.transport is {requested}, but: {first_few(list(dict.fromkeys(findings)), separator='; ')}")
    return (requested,) * len(reports.workers)


def _staging(
    destinations: Sequence[Placement], transports: Sequence[str], actors: Sequence[ActorHello], computing: Sequence[bool], staging: str
) -> frozenset[tuple[int, int]]:
    """The (destination, actor rank) pairs that go through a staging ring of the rank. ``computing``: by rank, whether what it sends is
    computed in each sync, and lies nowhere else."""
    return frozenset(
        (destination, rank)
        for destination, reader in enumerate(destinations)
        if TRANSPORTS[transports[destination]].in_place == "read"
        for rank, hello in enumerate(actors)
        if computing[rank] or is_staged(hello.memory, staging, is_near=reader.location == _location(hello, by_gpu=True))
    )


def _destinations(
    workers: Sequence[WorkerHello], records: Sequence[Recorded], transports: Sequence[str]
) -> tuple[list[Placement], tuple[int, ...]]:
    """Workers of one host that hold the same are one destination of shared memory: their bytes are written once and read by each.

    Any other worker is a destination of its own: nothing is saved by sharing, and its sources are chosen for it alone.
    """
    groups: dict[tuple[int | str, bytes], list[int]] = defaultdict(list)
    for index, (hello, record) in enumerate(zip(workers, records, strict=True)):
        held = record.placement
        reader = hello.shm_domain if TRANSPORTS[transports[index]].is_shared else index
        groups[reader, msgspec.msgpack.encode((held.buffers, held.pieces, held.padding))].append(index)
    placements, destination_of = [], [0] * len(workers)
    for destination, members in enumerate(groups.values()):
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        first = records[members[0]].placement
        location = _location(workers[members[0]], TRANSPORTS[transports[members[0]]].is_by_gpu)
        placements.append(replace(first, holder=f"{workers[members[0]]}{more}", location=location))
        for index in members:
            destination_of[index] = destination
    return placements, tuple(destination_of)


def _location(hello: ActorHello | WorkerHello, by_gpu: bool) -> Location:
    """Transports that go through host memory find one GPU as near as another."""
    return Location(hello.host, hello.gpu_uuid if by_gpu else None)
