"""From who is there to who does what: the plan of a connection, its streams and everybody's share. Runs on actor rank 0.

Owns the choice of streams and transports; moves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from rlsync.control.messages import ActorHello, Recorded, Surveyed, WorkerHello
from rlsync.control.roster import Member, some
from rlsync.control.shares import ActorParcel, ActorPart, ActorShare, GroupInfo, RingInfo, WorkerPart, WorkerShare
from rlsync.errors import ConfigError
from rlsync.geometry import Location, Placement, TensorSpec
from rlsync.links import Traffic, traffic
from rlsync.plan import Plan, build_plan
from rlsync.staging import Part, Region, lay_out, part_offsets
from rlsync.sync.config import SyncConfig


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A plan between actor ranks and streams, and how its buckets lie in slots.

    Attributes:
        stream_of: by worker of the survey, its stream.
        remote: streams that come through the group, each of one worker; all others come through the ring.
        members: of the group, in words: actor ranks, then the workers of ``remote``. None where there is no group.
    """

    plan: Plan
    parts: tuple[tuple[Part, ...], ...]
    stream_of: tuple[int, ...]
    traffic: Traffic
    remote: tuple[int, ...] = ()
    members: tuple[str, ...] = ()

    @property
    def num_streams(self) -> int:
        return len(self.plan.destinations)

    @property
    def transport(self) -> str:
        """What the bytes go through: ``shm``, ``gloo`` or ``gloo+shm``."""
        return "+".join(name for name, used in (("gloo", self.remote), ("shm", len(self.remote) < self.num_streams)) if used)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest bucket with all its streams in the ring; 0 where there are none."""
        return max(self._ring_offsets(row)[-1] for row in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes that all streams take in, once each."""
        return sum(self.traffic.bytes_by_destination.values())

    def shares(
        self, num_actors: int, num_slots: int, verify: str, *, ring: RingInfo | None, group: GroupInfo | None
    ) -> tuple[tuple[ActorShare, ...], tuple[WorkerShare, ...]]:
        """What each actor rank and each worker of the survey has to do. ``group`` is actor rank 0's."""
        offsets = [self._ring_offsets(row) for row in self.parts]
        takers = {stream: num_actors + index for index, stream in enumerate(self.remote)}
        common = self.plan.digest, num_slots
        actors = tuple(
            ActorShare(
                *common,
                verify,
                tuple(_actor_parts(row, at, rank, takers) for row, at in zip(self.parts, offsets, strict=True)),
                tuple(_parcels(row, rank, takers) for row in self.parts),
                ring=ring,
                group=_as_member(group, rank),
            )
            for rank in range(num_actors)
        )
        by_stream = [
            tuple(WorkerPart(at[s], row[s].nbytes, row[s].segments, row[s].regions) for row, at in zip(self.parts, offsets, strict=True))
            for s in range(self.num_streams)
        ]
        workers = tuple(
            WorkerShare(*common, s, verify, by_stream[s], group=_as_member(group, takers[s]))
            if s in takers
            else WorkerShare(*common, s, verify, by_stream[s], ring=ring)
            for s in self.stream_of
        )
        return actors, workers

    def _ring_offsets(self, row: Sequence[Part]) -> tuple[int, ...]:
        """Byte at which each stream's part begins in the ring's slot; parts that do not go there take no room."""
        return part_offsets([Part(0, (), ()) if stream in self.remote else part for stream, part in enumerate(row)])


def draw_up(tensors: Sequence[TensorSpec], placements: Sequence[Placement], survey: Surveyed, config: SyncConfig) -> Blueprint:
    """Plan a connection. Raises PlacementError where the two sides do not fit, ConfigError where no transport reaches a worker."""
    remote = _remote_workers(survey, config.transport)
    located = [replace(p, location=_location(hello)) for p, hello in zip(placements, survey.actors, strict=True)]
    streams, stream_of = _streams(survey.workers, survey.records, remote)
    plan = build_plan(tensors, located, streams, bucket_bytes=config.bucket_bytes, allow_cast=True)
    used = tuple(bucket for bucket in plan.buckets if bucket.copies)
    plan = replace(plan, buckets=used)
    hellos: list[ActorHello | WorkerHello] = [*survey.actors, *(survey.workers[index] for index in remote)]
    return Blueprint(
        plan,
        lay_out(plan),
        stream_of,
        traffic(plan),
        tuple(stream_of[index] for index in remote),
        tuple(str(Member(b"", hello)) for hello in hellos) if remote else (),
    )


def _streams(workers: Sequence[WorkerHello], records: Sequence[Recorded], remote: Sequence[int]) -> tuple[list[Placement], tuple[int, ...]]:
    """Workers of one host that hold the same share a stream: their bytes are written once and read by each.

    A remote worker is a stream of its own: nothing is saved by sharing, and its sources are chosen for it alone.
    """
    groups: dict[tuple[int | str, bytes], list[int]] = defaultdict(list)
    for index, (hello, record) in enumerate(zip(workers, records, strict=True)):
        held = record.placement
        reader = index if index in remote else hello.shm_domain
        groups[reader, msgspec.msgpack.encode((held.buffers, held.pieces, held.fills))].append(index)
    placements, stream_of = [], [0] * len(workers)
    for stream, members in enumerate(groups.values()):
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        first = records[members[0]].placement
        placements.append(replace(first, holder=f"{first.holder}{more}", location=_location(workers[members[0]])))
        for index in members:
            stream_of[index] = stream
    return placements, tuple(stream_of)


def _remote_workers(survey: Surveyed, transport: str) -> tuple[int, ...]:
    """Workers that are served through the group: all, or those that do not share /dev/shm with every actor rank.

    Raises ConfigError where there are such and the transport is ``shm``.
    """
    if transport == "gloo":
        return tuple(range(len(survey.workers)))
    home = survey.actors[0]
    peers: tuple[ActorHello | WorkerHello, ...] = (*survey.actors, *survey.workers)
    strangers = [peer for peer in peers if peer.shm_domain != home.shm_domain]
    if strangers and transport == "shm":
        raise ConfigError(
            f"{some([str(Member(b'', peer)) for peer in strangers])} does not share /dev/shm with actor rank 0 on {home.host}; the shm "
            "transport needs actor and engine on one host (and one /dev/shm where they run in containers); "
            "weight_sync.transport: auto serves such workers by gloo"
        )
    if any(isinstance(peer, ActorHello) for peer in strangers):
        return tuple(range(len(survey.workers)))
    return tuple(index for index, hello in enumerate(survey.workers) if hello in strangers)


def _as_member(group: GroupInfo | None, rank: int) -> GroupInfo | None:
    return None if group is None else msgspec.structs.replace(group, rank=rank)


def _location(hello: ActorHello | WorkerHello) -> Location:
    """Every transport goes through host memory, so that one GPU is as near as another."""
    return Location(hello.host)


def _actor_parts(row: Sequence[Part], offsets: Sequence[int], rank: int, takers: Mapping[int, int]) -> tuple[ActorPart, ...]:
    """What an actor rank puts into the ring."""
    given = ((stream, _given(part, rank)) for stream, part in enumerate(row) if stream not in takers)
    return tuple(ActorPart(stream, offsets[stream], mine) for stream, mine in given if mine)


def _parcels(row: Sequence[Part], rank: int, takers: Mapping[int, int]) -> tuple[ActorParcel, ...]:
    """What an actor rank sends."""
    given = ((stream, taker, _given(row[stream], rank)) for stream, taker in takers.items())
    return tuple(
        ActorParcel(stream, taker, row[stream].nbytes if len(mine) == len(row[stream].regions) else 0, mine)
        for stream, taker, mine in given
        if mine
    )


def _given(part: Part, rank: int) -> tuple[Region, ...]:
    return tuple(r for r in part.regions if r.source == rank)
