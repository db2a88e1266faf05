"""From who is there to who does what: the plan of a connection, its streams and everybody's share. Runs on actor rank 0.

Owns the choice of streams and transports; moves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from rlsync.control.messages import ActorHello, Recorded, Surveyed, WorkerHello
from rlsync.control.shares import ActorPart, ActorShare, RingInfo, WorkerPart, WorkerShare
from rlsync.errors import ConfigError
from rlsync.geometry import Location, Placement, TensorSpec
from rlsync.links import Traffic, traffic
from rlsync.plan import Plan, build_plan
from rlsync.staging import Part, lay_out, part_offsets
from rlsync.sync.config import SyncConfig


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A plan between actor ranks and streams, and how its buckets lie in slots.

    ``stream_of[i]`` is the stream of worker ``i`` of the survey; ``workers_of[s]`` counts the workers of stream ``s``.
    """

    plan: Plan
    parts: tuple[tuple[Part, ...], ...]
    stream_of: tuple[int, ...]
    traffic: Traffic

    @property
    def num_streams(self) -> int:
        return len(self.plan.destinations)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest bucket with all its streams."""
        return max(part_offsets(row)[-1] for row in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes that all streams take in, once each."""
        return sum(self.traffic.bytes_by_destination.values())

    def shares(self, num_actors: int, ring: RingInfo, verify: str) -> tuple[tuple[ActorShare, ...], tuple[WorkerShare, ...]]:
        """What each actor rank and each worker of the survey has to do."""
        offsets = [part_offsets(row) for row in self.parts]
        actors = tuple(
            ActorShare(
                self.plan.digest, ring, verify, tuple(_actor_parts(row, at, rank) for row, at in zip(self.parts, offsets, strict=True))
            )
            for rank in range(num_actors)
        )
        by_stream = [
            tuple(WorkerPart(at[s], row[s].nbytes, row[s].segments, row[s].regions) for row, at in zip(self.parts, offsets, strict=True))
            for s in range(self.num_streams)
        ]
        workers = tuple(WorkerShare(self.plan.digest, ring, s, verify, by_stream[s]) for s in self.stream_of)
        return actors, workers


def draw_up(tensors: Sequence[TensorSpec], placements: Sequence[Placement], survey: Surveyed, config: SyncConfig) -> Blueprint:
    """Plan a connection. Raises PlacementError where the two sides do not fit, ConfigError where no transport reaches a worker."""
    _check_transport(survey)
    located = [replace(p, location=_location(hello)) for p, hello in zip(placements, survey.actors, strict=True)]
    streams, stream_of = _streams(survey.workers, survey.records)
    plan = build_plan(tensors, located, streams, bucket_bytes=config.bucket_bytes, allow_cast=True)
    used = tuple(bucket for bucket in plan.buckets if bucket.copies)
    plan = replace(plan, buckets=used)
    return Blueprint(plan, lay_out(plan), stream_of, traffic(plan))


def _streams(workers: Sequence[WorkerHello], records: Sequence[Recorded]) -> tuple[list[Placement], tuple[int, ...]]:
    """Workers of one host that hold the same share a stream: their bytes are written once and read by each."""
    groups: dict[tuple[str, bytes], list[int]] = defaultdict(list)
    for index, (hello, record) in enumerate(zip(workers, records, strict=True)):
        held = record.placement
        groups[hello.shm_domain, msgspec.msgpack.encode((held.buffers, held.pieces, held.fills))].append(index)
    placements, stream_of = [], [0] * len(workers)
    for stream, members in enumerate(groups.values()):
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        first = records[members[0]].placement
        placements.append(replace(first, holder=f"{first.holder}{more}", location=_location(workers[members[0]])))
        for index in members:
            stream_of[index] = stream
    return placements, tuple(stream_of)


def _check_transport(survey: Surveyed) -> None:
    """Every actor rank must share /dev/shm with every worker."""
    home = survey.actors[0]
    peers: tuple[ActorHello | WorkerHello, ...] = (*survey.actors, *survey.workers)
    for peer in peers:
        if peer.shm_domain != home.shm_domain:
            who = f"actor rank {peer.actor_rank}" if isinstance(peer, ActorHello) else f"engine {peer.engine_id} worker {peer.worker_rank}"
            raise ConfigError(
                f"{who} (pid {peer.pid} on {peer.host}) does not share /dev/shm with actor rank 0 on {home.host}; the shm transport "
                "needs actor and engine on one host (and one /dev/shm where they run in containers)"
            )


def _location(hello: ActorHello | WorkerHello) -> Location:
    return Location(hello.host, hello.gpu_uuid)


def _actor_parts(row: Sequence[Part], offsets: Sequence[int], rank: int) -> tuple[ActorPart, ...]:
    parts = []
    for stream, part in enumerate(row):
        mine = tuple(r for r in part.regions if r.source == rank)
        if mine:
            parts.append(ActorPart(stream, offsets[stream], mine))
    return tuple(parts)
