"""Claims about who is served by what, from reports alone: nothing is connected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from rlsync.coordinator.messages import ActorHello, Recorded, Reports, WorkerHello
from rlsync.errors import ConfigError
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.plan.transports import TRANSPORTS
from rlsync.sync.config import SyncConfig
from rlsync.sync.planning import ConnectionPlan, plan_connection
from rlsync.transport import shm
from tests.planned import assigned

TENSORS = [TensorSpec(f"w{i}", "float32", (64, 32)) for i in range(8)]
NBYTES = sum(t.nbytes for t in TENSORS)


def actor(rank: int, domain: str) -> ActorHello:
    return ActorHello("token", "run", rank, 2, f"host {domain}", domain, "pids", 100 + rank, None, "digest")


def worker(number: int, domain: str) -> WorkerHello:
    return WorkerHello("token", "run", f"e{number}", 0, 0, 1, f"host {domain}", domain, "pids", 200 + number, None, "0.32.0")


def planned(actors: Sequence[str], workers: Sequence[str], **config: Any) -> ConnectionPlan:
    """Two actor ranks, replicas of each other, and workers that hold everything; each is given by its /dev/shm."""
    reports = Reports(
        tuple(actor(rank, domain) for rank, domain in enumerate(actors)),
        tuple(worker(number, domain) for number, domain in enumerate(workers)),
        tuple(Recorded(whole_tensors(f"worker {number}", TENSORS), "direct") for number in range(len(workers))),
    )
    placements = [whole_tensors(f"actor {rank}", TENSORS) for rank in range(2)]
    return plan_connection(TENSORS, placements, reports, SyncConfig(bucket_bytes=3 * NBYTES // 8, **config))


@pytest.mark.parametrize(
    ("actors", "workers", "transport", "remote", "destinations"),
    [
        ("aa", "aaa", "auto", (), 1),
        ("aa", "abb", "auto", (1, 2), 3),
        ("aa", "bab", "auto", (0, 2), 3),
        ("ab", "ab", "auto", (0, 1), 2),
        ("aa", "aa", "gloo", (0, 1), 2),
        ("aa", "aa", "shm", (), 1),
    ],
)
def test_shared_memory_serves_whom_it_reaches_and_gloo_the_others(actors, workers, transport, remote, destinations):
    made = planned(actors, workers, transport=transport)
    grouped = [d for d, name in enumerate(made.transports) if TRANSPORTS[name].is_grouped]
    assert tuple(made.destination_of.index(d) for d in grouped) == remote
    assert made.num_destinations == destinations
    names = {(): "shm", tuple(range(len(workers))): "gloo"}
    assert made.transport == names.get(remote, "gloo+shm")
    assert {len(end.group.members) for end in assigned(made).groups} == ({2 + len(remote)} if remote else set())
    assert made.nbytes == destinations * NBYTES


@pytest.mark.parametrize(("actors", "workers", "who"), [("aa", "ab", "engine e1 worker 0"), ("ab", "aa", "actor rank 1")])
def test_shared_memory_by_name_is_refused_where_it_does_not_reach(actors, workers, who):
    with pytest.raises(ConfigError, match=rf"{who} \(pid \d+ on host b\) does not share /dev/shm with actor rank 0 on host a"):
        planned(actors, workers, transport="shm")


def test_workers_far_away_draw_on_both_replicas_alike():
    made = planned("aa", "bbbb")
    given = made.traffic.bytes_by_source
    assert set(made.traffic.redundancy.values()) == {1.0}
    assert given["actor 0"] == given["actor 1"] == 2 * NBYTES


def test_every_region_is_either_in_the_ring_or_in_one_message_to_the_right_worker():
    made = planned("aa", "abb")
    given = assigned(made)
    assert [end.group.rank for end in given.groups] == [0, 1]
    assert [worker.transport for worker in given.workers] == ["shm", "gloo", "gloo"]
    assert [end.rank for end in given.receivers[1:]] == [2, 3]
    assert [member.split(" (")[0] for member in given.receivers[1].members[2:]] == ["engine e1 worker 0", "engine e2 worker 0"]
    taken = [worker.destination for worker in given.workers]
    for bucket, row in enumerate(made.parts):
        put = {(part.destination, r.number) for ends in given.senders for part in ends["shm"].parts[bucket] for r in part.regions}
        sent = [(p.receiver, p.destination, r.number) for end in given.groups for p in end.messages[bucket] for r in p.regions]
        assert len(sent) == len(set(sent))
        assert put | {(d, number) for _, d, number in sent} == {(d, r.number) for d, part in enumerate(row) for r in part.regions}
        assert {d for d, _ in put} == {taken[0]}
        assert {(receiver, d) for receiver, d, _ in sent} == {(2, taken[1]), (3, taken[2])}
        end = given.receivers[0].offsets[bucket] + given.workers[0].parts[bucket].nbytes
        assert end <= shm.slot_bytes(made.routes(2)["shm"])
        for sender in given.groups:
            for message in sender.messages[bucket]:
                part = row[message.destination]
                assert message.whole_bytes == (part.nbytes if len(message.regions) == len(part.regions) else 0)


def test_workers_that_a_transport_does_not_reach_are_named_and_beyond_some_counted() -> None:
    with pytest.raises(ConfigError, match=r"but: engine e0 worker 0 .*; engine e7 worker 0 (?!.*engine e8 ).* and 12 more$"):
        planned("aa", "b" * 20, transport="shm")
