"""Claims about who reads whose GPU memory, from a survey alone: nothing is mapped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from rlsync.coordinator.assignments import GroupInfo, Lent, Loan, RingInfo
from rlsync.coordinator.messages import ActorHello, Recorded, Surveyed, WorkerHello
from rlsync.coordinator.roster import Ledger
from rlsync.errors import ConfigError
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.plan.packing import Part
from rlsync.sync.config import SyncConfig
from rlsync.sync.lending import memory_of
from rlsync.sync.planning import Blueprint, draw_up
from rlsync.transport import cuda_ipc
from rlsync.transport.parcels import make_parcel

TENSORS = [TensorSpec(f"w{i}", "bfloat16", (64, 32)) for i in range(8)]
NBYTES = sum(t.nbytes for t in TENSORS)


def actor(rank: int, place: str, memory: Any) -> ActorHello:
    host, gpu = place
    return ActorHello("token", "run", rank, 2, host, f"{host}:5", f"{host}:pid", 100 + rank, f"GPU-{host}{gpu}", "digest", memory)


def worker(number: int, place: str, pid: int | None = None) -> WorkerHello:
    host, gpu = place
    uuid = None if gpu == "-" else f"GPU-{host}{gpu}"
    return WorkerHello("token", "run", f"e{number}", 0, 0, 1, host, f"{host}:5", f"{host}:pid", pid or 200 + number, uuid, "0.25.1")


def blueprint(
    actors: Sequence[str], workers: Sequence[str], memory: Sequence[str] = ("lendable", "lendable"), sink: str = "direct", **config: Any
) -> Blueprint:
    """Two actor ranks, replicas of each other, and workers that hold everything; each is given by its host and GPU."""
    survey = Surveyed(
        tuple(actor(rank, place, kind) for rank, (place, kind) in enumerate(zip(actors, memory, strict=True))),
        tuple(worker(number, place) for number, place in enumerate(workers)),
        tuple(Recorded(whole_tensors(f"worker {number}", TENSORS), sink) for number in range(len(workers))),
    )
    placements = [whole_tensors(f"actor {rank}", TENSORS) for rank in range(2)]
    return draw_up(TENSORS, placements, survey, SyncConfig(**{"bucket_bytes": NBYTES // 2, **config}))


def test_workers_of_the_actors_host_read_the_replica_on_their_own_gpu_in_place_and_in_one_bucket():
    made = blueprint(("a0", "a1"), ("a0", "a1"))
    assert (made.transport, made.is_read_in_place, made.num_streams, len(made.parts)) == ("ipc", True, 2, 1)
    assert made.traffic.bytes_by_link == {"same device": 2 * NBYTES, "same host": 0, "other host": 0}
    actors, workers = made.shares(2, 2, "full", ring=None, group=None)
    assert [w.lenders for w in workers] == [(0,), (1,)]
    assert [len(a.lent[0]) for a in actors] == [1, 1]
    assert not any(a.staged or a.stage_bytes or a.parts[0] or a.parcels[0] for a in actors)


def test_what_is_read_in_place_waits_for_no_slot():
    made = blueprint(("a0", "a1"), ("a2", "a3"), sink="layerwise", bucket_bytes=NBYTES // 8)
    actors, workers = made.shares(2, 2, "off", ring=None, group=None)
    assert len(made.parts) > 2, "a layer at a time has memory"
    assert {share.num_slots for share in (*actors, *workers)} == {len(made.parts)}


@pytest.mark.parametrize(
    ("memory", "staging", "expected"),
    [(("lendable", "device"), "auto", {1}), (("device", "device"), "auto", {0, 1}), (("lendable", "lendable"), "always", {0, 1})],
)
def test_ranks_that_cannot_be_read_in_place_stage_what_they_give(memory, staging, expected):
    made = blueprint(("a0", "a1"), ("a0", "a1"), memory, staging=staging)
    assert {rank for _, rank in made.staging} == expected and len(made.parts) > 1
    actors, workers = made.shares(2, 2, "off", ring=None, group=None)
    for rank, share in enumerate(actors):
        assert (rank in expected) == bool(share.stage_bytes) == any(share.staged) != any(share.lent)
        for bucket, row in enumerate(share.staged):
            taken: list[tuple[int, int]] = []
            for part in row:
                size = make_parcel(part.stream, part.regions, 0).nbytes
                assert workers[made.stream_of.index(part.stream)].staged[bucket][rank] == part.offset
                taken.append((part.offset, part.offset + size))
            assert all(end <= begin for (_, end), (begin, _) in zip(sorted(taken), sorted(taken)[1:], strict=False))
            assert all(end <= share.stage_bytes for _, end in taken)


def test_memory_that_leaves_between_syncs_is_read_in_place_on_its_own_gpu_and_through_a_ring_on_others():
    """A mapping of another GPU's memory would have to be made anew in every sync."""
    near = blueprint(("a0", "a1"), ("a0", "a1"), ("leaving", "leaving"))
    assert near.is_read_in_place and len(near.parts) == 1
    away = blueprint(("a0", "a1"), ("a0", "a2"), ("leaving", "leaving"), bucket_bytes=NBYTES // 4)
    assert away.staging == {(1, 1)} and len(away.parts) > 2 and not away.is_read_in_place
    assert near.staged_bytes == 0 and away.staged_bytes == NBYTES
    actors, workers = away.shares(2, 2, "off", ring=None, group=None)
    lent = [{part.stream for row in share.lent for part in row} for share in actors]
    staged = [{part.stream for row in share.staged for part in row} for share in actors]
    assert lent == [{0}, set()] and staged[1] == {1}, "the far worker reads the replica that the near one leaves alone"
    assert actors[0].stage_bytes == 0 < actors[1].stage_bytes
    assert not any(workers[0].staged) and all(set(row) <= {1} for row in workers[1].staged) and any(workers[1].staged)
    both = blueprint(("a0", "a0"), ("a0", "a2"), ("leaving", "leaving"), bucket_bytes=NBYTES // 4)
    first, _ = both.shares(2, 2, "off", ring=None, group=None)
    assert any(share.lent and share.staged for share in first), "one rank lends to the near worker and stages for the far one"


def test_every_region_is_lent_staged_or_put_into_the_ring_once():
    made = blueprint(("a0", "a1"), ("a0", "a-", "a1", "a2"), ("leaving", "device"))
    assert made.transports == ("ipc", "shm", "ipc", "ipc")
    actors, workers = made.shares(2, 2, "off", ring=RingInfo("/dev/shm/r", "t", 2, 1), group=None)
    assert [bool(w.ring) for w in workers] == [False, True, False, False]
    for bucket, row in enumerate(made.parts):
        given = [
            (part.stream, r.number)
            for share in actors
            for table in (share.parts, share.lent, share.staged)
            if table
            for part in table[bucket]
            for r in part.regions
        ]
        assert sorted(given) == sorted((s, r.number) for s, part in enumerate(row) if isinstance(part, Part) for r in part.regions)


def test_workers_of_other_hosts_and_without_a_gpu_are_served_otherwise():
    made = blueprint(("a0", "a1"), ("a0", "b0", "a-"))
    assert made.transports == ("ipc", "gloo", "shm")
    assert [m.split(" (")[0] for m in made.members] == ["actor rank 0", "actor rank 1", "engine e1 worker 0"]
    _, workers = made.shares(2, 2, "off", ring=RingInfo("/dev/shm/r", "t", 2, 1), group=GroupInfo("h", 1, 0, made.members))
    assert workers[1].group is not None and workers[1].group.rank == 2 and not workers[1].lenders


def test_actors_on_several_hosts_lend_nothing_that_is_not_all():
    assert blueprint(("a0", "b0"), ("a1", "b1")).transport == "nccl"
    assert blueprint(("a0", "b0"), ("a0", "b1")).transport == "gloo", "NCCL takes no two members on one GPU"


@pytest.mark.parametrize(
    ("workers", "memory", "why"),
    [
        (("a0", "b0"), ("lendable", "lendable"), r"engine e1 worker 0 .* is not on the host of actor rank 0"),
        (("a-",), ("lendable", "lendable"), "engine e0 worker 0 .* has no GPU"),
        (("a0",), ("lendable", "host"), "the parameters of actor rank 1 .* are in host memory"),
    ],
)
def test_ipc_by_name_is_refused_where_it_does_not_reach(workers, memory, why):
    with pytest.raises(ConfigError, match=f"weight_sync.transport is ipc, but: {why}"):
        blueprint(("a0", "a1"), workers, memory, transport="ipc")


def test_a_process_does_not_map_its_own_memory():
    survey = Surveyed((actor(0, "a0", "lendable"),), (worker(0, "a0", pid=100),), (Recorded(whole_tensors("worker 0", TENSORS), "direct"),))
    with pytest.raises(ConfigError, match="are one process"):
        draw_up(TENSORS, [whole_tensors("actor 0", TENSORS)], survey, SyncConfig(transport="ipc"))
    assert draw_up(TENSORS, [whole_tensors("actor 0", TENSORS)], survey, SyncConfig()).transport == "shm"


def test_a_worker_is_told_of_the_loans_that_it_borrows_and_of_renewed_ones_in_each_attempt():
    ledger, first, second = Ledger(), Loan(buffers={"w": Lent(16, 2, "bfloat16")}), Loan(buffers={"w": Lent(32, 2, "bfloat16")})
    ledger.borrows(b"w0", (0, 1))
    ledger.borrows(b"w1", (1,))
    ledger.lend(0, first)
    ledger.lend(1, first)
    assert [loan.actor_rank for loan in ledger.first(b"w0")] == [0, 1]
    assert ledger.renewed(b"w0", 1) == ()
    ledger.renew(1, second)
    # A worker that failed in attempt 2 may not have read what it was sent, so attempt 3 says it again.
    for attempt in (2, 3):
        for identity in (b"w0", b"w1"):
            assert [(x.actor_rank, x.loan) for x in ledger.renewed(identity, attempt)] == [(1, second)]
            assert ledger.renewed(identity, attempt) == ()


@pytest.mark.parametrize(
    ("is_cuda", "is_lendable", "stays", "expected"),
    [
        ((True, True), (True, True), True, "lendable"),
        ((True, True), (True, True), False, "leaving"),
        ((True, True), (True, False), False, "device"),
        ((True, False), (True, True), True, "host"),
        ((), (), False, "lendable"),
    ],
)
def test_an_actor_rank_says_where_its_memory_is(monkeypatch, is_cuda, is_lendable, stays, expected):
    buffers: Any = {str(i): SimpleNamespace(is_cuda=on_gpu, data_ptr=partial(int, i), numel=lambda: 1) for i, on_gpu in enumerate(is_cuda)}
    monkeypatch.setattr(cuda_ipc, "can_be_lent", lambda address: is_lendable[address])
    assert memory_of(buffers, stays=stays) == expected
