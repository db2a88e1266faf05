"""Claims about who is served by what, from a survey alone: nothing is connected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlsync.coordinator.assignments import GroupInfo, RingInfo
from rlsync.coordinator.messages import ActorHello, Recorded, Surveyed, WorkerHello
from rlsync.errors import ConfigError
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.sync.config import SyncConfig
from rlsync.sync.planning import Blueprint, draw_up

TENSORS = [TensorSpec(f"w{i}", "float32", (64, 32)) for i in range(8)]
NBYTES = sum(t.nbytes for t in TENSORS)
RING = RingInfo("/dev/shm/ring", "token", 2, 1)


def actor(rank: int, domain: str) -> ActorHello:
    return ActorHello("token", "run", rank, 2, f"host {domain}", domain, "pids", 100 + rank, None, "digest")


def worker(number: int, domain: str) -> WorkerHello:
    return WorkerHello("token", "run", f"e{number}", 0, 0, 1, f"host {domain}", domain, "pids", 200 + number, None, "0.32.0")


def blueprint(actors: Sequence[str], workers: Sequence[str], **config: Any) -> Blueprint:
    """Two actor ranks, replicas of each other, and workers that hold everything; each is given by its /dev/shm."""
    survey = Surveyed(
        tuple(actor(rank, domain) for rank, domain in enumerate(actors)),
        tuple(worker(number, domain) for number, domain in enumerate(workers)),
        tuple(Recorded(whole_tensors(f"worker {number}", TENSORS), "direct") for number in range(len(workers))),
    )
    placements = [whole_tensors(f"actor {rank}", TENSORS) for rank in range(2)]
    return draw_up(TENSORS, placements, survey, SyncConfig(bucket_bytes=3 * NBYTES // 8, **config))


@pytest.mark.parametrize(
    ("actors", "workers", "transport", "remote", "streams"),
    [
        ("aa", "aaa", "auto", (), 1),
        ("aa", "abb", "auto", (1, 2), 3),
        ("aa", "bab", "auto", (0, 2), 3),
        ("ab", "ab", "auto", (0, 1), 2),
        ("aa", "aa", "gloo", (0, 1), 2),
        ("aa", "aa", "shm", (), 1),
    ],
)
def test_shared_memory_serves_whom_it_reaches_and_gloo_the_others(actors, workers, transport, remote, streams):
    made = blueprint(actors, workers, transport=transport)
    assert tuple(made.stream_of.index(stream) for stream in made.remote) == remote
    assert made.num_streams == streams
    names = {(): "shm", tuple(range(len(workers))): "gloo"}
    assert made.transport == names.get(remote, "gloo+shm")
    assert bool(made.slot_bytes) == (made.transport != "gloo")
    assert len(made.members) == (2 + len(remote) if remote else 0)
    assert made.nbytes == streams * NBYTES


@pytest.mark.parametrize(("actors", "workers", "who"), [("aa", "ab", "engine e1 worker 0"), ("ab", "aa", "actor rank 1")])
def test_shared_memory_by_name_is_refused_where_it_does_not_reach(actors, workers, who):
    with pytest.raises(ConfigError, match=rf"{who} \(pid \d+ on host b\) does not share /dev/shm with actor rank 0 on host a"):
        blueprint(actors, workers, transport="shm")


def test_workers_far_away_draw_on_both_replicas_alike():
    made = blueprint("aa", "bbbb")
    given = made.traffic.bytes_by_source
    assert set(made.traffic.redundancy.values()) == {1.0}
    assert given["actor 0"] == given["actor 1"] == 2 * NBYTES


def test_every_region_is_either_in_the_ring_or_in_one_parcel_of_the_right_worker():
    made = blueprint("aa", "abb")
    group = GroupInfo("10.0.0.1", 1234, 0, made.members)
    actors, workers = made.shares(2, 2, "off", ring=RING, group=group)
    assert [share.group.rank for share in actors if share.group] == [0, 1]
    assert [(w.ring is None, None if w.group is None else w.group.rank) for w in workers] == [(False, None), (True, 2), (True, 3)]
    assert [member.split(" (")[0] for member in made.members[2:]] == ["engine e1 worker 0", "engine e2 worker 0"]
    for bucket, row in enumerate(made.parts):
        put = {(part.stream, r.number) for share in actors for part in share.parts[bucket] for r in part.regions}
        sent = [(p.taker, p.stream, r.number) for share in actors for p in share.parcels[bucket] for r in p.regions]
        assert len(sent) == len(set(sent))
        assert put | {(stream, number) for _, stream, number in sent} == {(s, r.number) for s, part in enumerate(row) for r in part.regions}
        assert {stream for stream, _ in put} == {workers[0].stream}
        assert {(taker, stream) for taker, stream, _ in sent} == {(2, workers[1].stream), (3, workers[2].stream)}
        assert workers[0].parts[bucket].offset + workers[0].parts[bucket].nbytes <= made.slot_bytes
        for share in actors:
            for parcel in share.parcels[bucket]:
                part = row[parcel.stream]
                assert parcel.whole_bytes == (part.nbytes if len(parcel.regions) == len(part.regions) else 0)


def test_workers_that_a_transport_does_not_reach_are_named_and_beyond_some_counted() -> None:
    with pytest.raises(ConfigError, match=r"but: engine e0 worker 0 .*; engine e7 worker 0 (?!.*engine e8 ).* and 12 more$"):
        blueprint("aa", "b" * 20, transport="shm")
