"""From who is there to who does what: the plan of a connection, its streams and everybody's share. Runs on actor rank 0.

Owns the choice of streams; transports are chosen in ``rlsync.sync.transports``. Moves nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from rlsync.coordinator.assignments import ActorParcel, ActorPart, ActorShare, GroupInfo, RingInfo, WorkerPart, WorkerShare
from rlsync.coordinator.messages import ActorHello, Recorded, Surveyed, WorkerHello
from rlsync.coordinator.roster import Member
from rlsync.layout.geometry import Location, Placement, TensorSpec
from rlsync.plan.links import Traffic, num_steps, traffic
from rlsync.plan.packing import Part, Region, fills_buckets, is_staged, lay_out, part_offsets
from rlsync.plan.planner import Plan, build_plan
from rlsync.sync.config import SyncConfig
from rlsync.sync.transports import GROUPS, choose_transports
from rlsync.transport.parcels import make_parcel


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A plan between actor ranks and streams, and how its buckets lie in slots.

    Attributes:
        stream_of: by worker of the survey, its stream.
        transports: by stream. One that comes through a group or out of lent memory is of one worker alone.
        members: of the group, in words: actor ranks, then the workers of its streams. None where there is no group.
        engines: of the members, None for actor ranks.
        num_steps: into how many steps the messages of a bucket are cut.
        staging: (stream, actor rank), where what an ``ipc`` stream reads of that rank is copied into a ring of the rank's first.
        staged_bytes: that take this way.
    """

    plan: Plan
    parts: tuple[tuple[Part, ...], ...]
    stream_of: tuple[int, ...]
    traffic: Traffic
    transports: tuple[str, ...]
    members: tuple[str, ...] = ()
    staging: frozenset[tuple[int, int]] = frozenset()
    num_steps: int = 1
    engines: tuple[str | None, ...] = ()
    staged_bytes: int = 0

    @property
    def num_streams(self) -> int:
        return len(self.plan.destinations)

    @property
    def transport(self) -> str:
        """What the bytes go through, in one word: several are joined by ``+``."""
        return "+".join(sorted(set(self.transports)))

    @property
    def remote(self) -> tuple[int, ...]:
        """Streams that come through the group."""
        return tuple(stream for stream, name in enumerate(self.transports) if name in GROUPS)

    @property
    def group_transport(self) -> Literal["gloo", "nccl"]:
        """What carries the messages of the group."""
        return "nccl" if "nccl" in self.transports else "gloo"

    @property
    def is_read_in_place(self) -> bool:
        """Whether nothing is copied but from where it lies to where it belongs."""
        return set(self.transports) == {"ipc"} and not self.staging

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
        # What is read where it lies has no slots to wait for.
        common = self.plan.digest, len(self.parts) if self.is_read_in_place else min(num_slots, len(self.parts) * self.num_steps)
        stages = [self._stages(row, num_actors) for row in self.parts]
        actors = tuple(
            ActorShare(
                *common,
                verify,
                tuple(self._ringed(row, at, rank) for row, at in zip(self.parts, offsets, strict=True)),
                tuple(_parcels(row, rank, takers) for row in self.parts),
                ring=ring,
                group=_as_member(group, rank),
                lent=self._lent(rank),
                staged=self._staged(stages, rank),
                stage_bytes=max(stage.sizes[rank] for stage in stages),
            )
            for rank in range(num_actors)
        )
        workers = tuple(
            self._worker_share(s, common, verify, offsets, stages, ring, _as_member(group, takers.get(s, 0))) for s in self.stream_of
        )
        return actors, workers

    def _worker_share(
        self,
        stream: int,
        common: tuple[str, int],
        verify: str,
        offsets: Sequence[Sequence[int]],
        stages: Sequence[_Stages],
        ring: RingInfo | None,
        group: GroupInfo | None,
    ) -> WorkerShare:
        rows = [row[stream] for row in self.parts]
        parts = tuple(WorkerPart(at[stream], part.nbytes, part.segments, part.regions) for part, at in zip(rows, offsets, strict=True))
        share = WorkerShare(*common, stream, verify, parts)
        if self.transports[stream] in GROUPS:
            return msgspec.structs.replace(share, group=group)
        if self.transports[stream] == "shm":
            return msgspec.structs.replace(share, ring=ring)
        return msgspec.structs.replace(
            share,
            lenders=tuple(sorted({r.source for part in rows for r in part.regions})),
            staged=tuple({rank: at for (s, rank), at in stage.offsets.items() if s == stream} for stage in stages),
        )

    def _ring_offsets(self, row: Sequence[Part]) -> tuple[int, ...]:
        """Byte at which each stream's part begins in the ring's slot; parts that do not go there take no room."""
        return part_offsets([part if self.transports[stream] == "shm" else Part(0, (), ()) for stream, part in enumerate(row)])

    def _ringed(self, row: Sequence[Part], offsets: Sequence[int], rank: int) -> tuple[ActorPart, ...]:
        """What an actor rank puts into the ring in host memory."""
        given = ((stream, _given(part, rank)) for stream, part in enumerate(row) if self.transports[stream] == "shm")
        return tuple(ActorPart(stream, offsets[stream], mine) for stream, mine in given if mine)

    def _borrowed(self, row: Sequence[Part], rank: int, *, staged: bool) -> Iterator[tuple[int, tuple[Region, ...]]]:
        """Streams that read an actor rank's memory where it lies, or its ring, and what of it."""
        for stream, part in enumerate(row):
            if self.transports[stream] == "ipc" and ((stream, rank) in self.staging) == staged and (mine := _given(part, rank)):
                yield stream, mine

    def _lent(self, rank: int) -> tuple[tuple[ActorPart, ...], ...]:
        rows = [tuple(ActorPart(stream, 0, mine) for stream, mine in self._borrowed(row, rank, staged=False)) for row in self.parts]
        return tuple(rows) if any(rows) else ()

    def _staged(self, stages: Sequence[_Stages], rank: int) -> tuple[tuple[ActorPart, ...], ...]:
        rows = [
            tuple(ActorPart(stream, stage.offsets[stream, rank], mine) for stream, mine in self._borrowed(row, rank, staged=True))
            for row, stage in zip(self.parts, stages, strict=True)
        ]
        return tuple(rows) if any(rows) else ()

    def _stages(self, row: Sequence[Part], num_actors: int) -> _Stages:
        offsets, sizes = {}, [0] * num_actors
        for rank in range(num_actors):
            for stream, mine in self._borrowed(row, rank, staged=True):
                offsets[stream, rank] = sizes[rank]
                sizes[rank] += make_parcel(stream, mine, 0).nbytes
        return _Stages(offsets, sizes)


@dataclass(frozen=True, slots=True)
class _Stages:
    """How a bucket lies in the slots of staging rings. ``offsets``: by stream and actor rank. ``sizes``: bytes by actor rank."""

    offsets: Mapping[tuple[int, int], int]
    sizes: Sequence[int]


def draw_up(tensors: Sequence[TensorSpec], placements: Sequence[Placement], survey: Surveyed, config: SyncConfig) -> Blueprint:
    """Plan a connection. Raises PlacementError where the two sides do not fit, ConfigError where no transport reaches a worker."""
    transports = choose_transports(survey, config.transport)
    located = [replace(p, location=_location(hello, "ipc" in transports)) for p, hello in zip(placements, survey.actors, strict=True)]
    streams, stream_of = _streams(survey.workers, survey.records, transports)
    # By stream; all workers of a stream have one transport.
    by_stream = dict(zip(stream_of, transports, strict=True))
    staging = _staging(streams, by_stream, survey.actors, config.staging)
    is_direct = all(r.sink == "direct" for r in survey.records)

    def takes_room(stream: int, rank: int) -> bool:
        return fills_buckets(transports, is_direct=is_direct, staged=(stream, rank) in staging)

    plan = build_plan(tensors, located, streams, bucket_bytes=config.bucket_bytes, takes_room=takes_room, allow_cast=True)
    used = tuple(bucket for bucket in plan.buckets if bucket.copies)
    plan = replace(plan, buckets=used)
    moved, parts = traffic(plan), lay_out(plan)
    given = [((stream, r.source), r.nbytes) for row in parts for stream, part in enumerate(row) for r in part.regions]
    remote = [index for index, name in enumerate(transports) if name in GROUPS]
    hellos: list[ActorHello | WorkerHello] = [*survey.actors, *(survey.workers[index] for index in remote)]
    return Blueprint(
        plan,
        parts,
        stream_of,
        moved,
        tuple(by_stream[stream] for stream in range(len(streams))),
        tuple(str(Member(b"", hello)) for hello in hellos) if remote else (),
        staging & {way for way, _ in given},
        # One bucket, whose messages both ends cut into steps.
        num_steps(moved, config.bucket_bytes) if is_direct and set(transports) == {"nccl"} else 1,
        tuple(Member(b"", hello).engine for hello in hellos) if remote else (),
        sum(nbytes for way, nbytes in given if way in staging),
    )


def _staging(
    streams: Sequence[Placement], transports: Mapping[int, str], actors: Sequence[ActorHello], staging: str
) -> frozenset[tuple[int, int]]:
    """Who reads a ring of whom."""
    return frozenset(
        (stream, rank)
        for stream, reader in enumerate(streams)
        if transports[stream] == "ipc"
        for rank, hello in enumerate(actors)
        if is_staged(hello.memory, staging, is_near=reader.location == _location(hello, by_device=True))
    )


def _streams(
    workers: Sequence[WorkerHello], records: Sequence[Recorded], transports: Sequence[str]
) -> tuple[list[Placement], tuple[int, ...]]:
    """Workers of one host that hold the same share a stream of shared memory: their bytes are written once and read by each.

    Any other worker is a stream of its own: nothing is saved by sharing, and its sources are chosen for it alone.
    """
    groups: dict[tuple[int | str, bytes], list[int]] = defaultdict(list)
    for index, (hello, record) in enumerate(zip(workers, records, strict=True)):
        held = record.placement
        reader = hello.shm_domain if transports[index] == "shm" else index
        groups[reader, msgspec.msgpack.encode((held.buffers, held.pieces, held.fills))].append(index)
    placements, stream_of = [], [0] * len(workers)
    for stream, members in enumerate(groups.values()):
        more = f" and {len(members) - 1} more" if len(members) > 1 else ""
        first = records[members[0]].placement
        location = _location(workers[members[0]], transports[members[0]] == "ipc")
        placements.append(replace(first, holder=f"{first.holder}{more}", location=location))
        for index in members:
            stream_of[index] = stream
    return placements, tuple(stream_of)


def _location(hello: ActorHello | WorkerHello, by_device: bool) -> Location:
    """Transports that go through host memory find one GPU as near as another."""
    return Location(hello.host, hello.gpu_uuid if by_device else None)


def _as_member(group: GroupInfo | None, rank: int) -> GroupInfo | None:
    return None if group is None else msgspec.structs.replace(group, rank=rank)


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
