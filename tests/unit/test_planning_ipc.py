"""Claims about who reads whose GPU memory, from a reports alone: nothing is mapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace as replace_in

from rlsync.coordinator.messages import ActorHello, Recorded, Reports, WorkerHello
from rlsync.coordinator.roster import ExportRegistry
from rlsync.errors import ConfigError
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.plan.packing import pack_message
from rlsync.sync.config import SyncConfig
from rlsync.sync.planning import ConnectionPlan, plan_connection
from rlsync.transport import ipc
from rlsync.transport.ipc import memory_of
from tests.planned import assigned

TENSORS = [TensorSpec(f"w{i}", "bfloat16", (64, 32)) for i in range(8)]
NBYTES = sum(t.nbytes for t in TENSORS)


def actor(rank: int, place: str, memory: Any) -> ActorHello:
    host, gpu = place
    return ActorHello("token", "run", rank, 2, host, f"{host}:5", f"{host}:pid", 100 + rank, f"GPU-{host}{gpu}", "digest", memory)


def worker(number: int, place: str, pid: int | None = None) -> WorkerHello:
    host, gpu = place
    uuid = None if gpu == "-" else f"GPU-{host}{gpu}"
    return WorkerHello("token", "run", f"e{number}", 0, 0, 1, host, f"{host}:5", f"{host}:pid", pid or 200 + number, uuid, "0.25.1")


def planned(
    actors: Sequence[str],
    workers: Sequence[str],
    memory: Sequence[str] = ("stable", "stable"),
    sink: str = "direct",
    dtype: str = "bfloat16",
    declared: Mapping[str, str] | None = None,
    frozen: tuple[tuple[int, int], ...] = (),
    last: ConnectionPlan | None = None,
    **config: Any,
) -> ConnectionPlan:
    """Two actor ranks, replicas of each other, and workers that hold everything in ``dtype``; each is given by its host and GPU."""
    held = [replace(tensor, dtype=dtype) for tensor in TENSORS]
    reports = Reports(
        tuple(replace_in(actor(rank, *each), frozen=frozen) for rank, each in enumerate(zip(actors, memory, strict=True))),
        tuple(worker(number, place) for number, place in enumerate(workers)),
        tuple(Recorded(whole_tensors(f"worker {number}", held), sink) for number in range(len(workers))),
    )
    placements = [whole_tensors(f"actor {rank}", TENSORS) for rank in range(2)]
    return plan_connection(TENSORS, placements, reports, SyncConfig(**{"bucket_bytes": NBYTES // 2, **config}), declared, last)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": ("a2", "a1")}, {"transport": "nccl"}, {"workers": ("a2",)}, {"actors": ("a1", "a0")},
        {"memory": ("stable", "device")}, {"sink": "layerwise"}, {"dtype": "float32"}, {"declared": {"w3": "merge"}},
        {"frozen": ((0, 8),)}, {"staging": "always"}, {"bucket_bytes": NBYTES // 4},
    ],
)  # fmt: skip
def test_a_connection_like_the_one_before_takes_its_plan_and_any_other_is_planned(change):
    before = {"actors": ("a0", "a1"), "workers": ("a2", "a3"), "sink": "direct" if "sink" in change else "layerwise"}
    # What is declared is staged, whatever the configuration says.
    before["staging"] = "always" if "declared" in change else "auto"
    last = planned(**before)
    again = planned(**before, last=last)
    assert again == last and again.plan is last.plan and again.parts is last.parts
    other = planned(**{**before, **change}, last=last)
    assert other == planned(**{**before, **change}) and other != last and other.plan is not last.plan


def test_workers_of_the_actors_host_read_the_replica_on_their_own_gpu_in_place_and_in_one_bucket():
    made = planned(("a0", "a1"), ("a0", "a1"))
    assert (made.transport, made.is_read_in_place, made.num_destinations, len(made.parts)) == ("ipc", True, 2, 1)
    assert made.traffic.bytes_by_link == {"same device": 2 * NBYTES, "same host": 0, "other host": 0}
    given = assigned(made)
    assert [w.imports for w in given.workers] == [(0,), (1,)]
    assert [len(end.in_place[0]) for end in given.exporters] == [1, 1]
    assert not any(any(end.staged) or end.stage_bytes for end in given.exporters)
    assert all(ends.keys() == {"ipc"} for ends in given.senders)


def test_what_is_read_in_place_waits_for_no_slot():
    made = planned(("a0", "a1"), ("a2", "a3"), sink="layerwise", bucket_bytes=NBYTES // 8)
    given = assigned(made)
    assert len(made.parts) > 2, "a layer at a time has memory"
    assert {each.num_slots for each in (*given.actors, *given.workers)} == {len(made.parts)}


@pytest.mark.parametrize(
    ("memory", "staging", "expected"),
    [(("stable", "device"), "auto", {1}), (("device", "device"), "auto", {0, 1}), (("stable", "stable"), "always", {0, 1})],
)
def test_ranks_that_cannot_be_read_in_place_stage_what_they_give(memory, staging, expected):
    made = planned(("a0", "a1"), ("a0", "a1"), memory, staging=staging)
    assert {rank for _, rank in made.staging} == expected and len(made.parts) > 1
    given = assigned(made)
    for rank, share in enumerate(given.exporters):
        assert (rank in expected) == bool(share.stage_bytes) == any(share.staged) != any(share.in_place)
        for bucket, row in enumerate(share.staged):
            taken: list[tuple[int, int]] = []
            for part in row:
                size = pack_message(part.destination, part.regions).nbytes
                assert given.receivers[made.destination_of.index(part.destination)].staged[bucket][rank] == part.offset
                taken.append((part.offset, part.offset + size))
            assert all(end <= begin for (_, end), (begin, _) in zip(sorted(taken), sorted(taken)[1:], strict=False))
            assert all(end <= share.stage_bytes for _, end in taken)


def test_memory_that_leaves_between_syncs_is_read_in_place_on_its_own_gpu_and_through_a_ring_on_others():
    """A mapping of another GPU's memory would have to be made anew in every sync."""
    near = planned(("a0", "a1"), ("a0", "a1"), ("unstable", "unstable"))
    assert near.is_read_in_place and len(near.parts) == 1
    away = planned(("a0", "a1"), ("a0", "a2"), ("unstable", "unstable"), bucket_bytes=NBYTES // 4)
    assert away.staging == {(1, 1)} and len(away.parts) > 2 and not away.is_read_in_place
    assert near.staged_bytes == 0 and away.staged_bytes == NBYTES
    given = assigned(away)
    actors, workers = given.exporters, given.receivers
    in_place = [{part.destination for row in end.in_place for part in row} for end in actors]
    staged = [{part.destination for row in end.staged for part in row} for end in actors]
    assert in_place == [{0}, set()] and staged[1] == {1}, "the far worker reads the replica that the near one leaves alone"
    assert actors[0].stage_bytes == 0 < actors[1].stage_bytes
    assert not any(workers[0].staged) and all(set(row) <= {1} for row in workers[1].staged) and any(workers[1].staged)
    both = planned(("a0", "a0"), ("a0", "a2"), ("unstable", "unstable"), bucket_bytes=NBYTES // 4)
    assert any(any(end.in_place) and any(end.staged) for end in assigned(both).exporters), "for the near worker and for the far one"


def test_every_region_is_exported_staged_or_put_into_the_ring_once():
    made = planned(("a0", "a1"), ("a0", "a-", "a1", "a2"), ("unstable", "device"))
    assert made.transports == ("ipc", "shm", "ipc", "ipc")
    given = assigned(made)
    assert [w.transport for w in given.workers] == ["ipc", "shm", "ipc", "ipc"]
    for bucket, row in enumerate(made.parts):
        told = [
            (part.destination, r.number)
            for end, ends in zip(given.exporters, given.senders, strict=True)
            for table in (end.in_place, end.staged, ends["shm"].parts)
            for part in table[bucket]
            for r in part.regions
        ]
        assert sorted(told) == sorted((d, r.number) for d, part in enumerate(row) for r in part.regions)


def test_workers_of_other_hosts_and_without_a_gpu_are_served_otherwise():
    made = planned(("a0", "a1"), ("a0", "b0", "a-"))
    assert made.transports == ("ipc", "gloo", "shm")
    given = assigned(made)
    group = given.receivers[1]
    assert [m.split(" (")[0] for m in group.members] == ["actor rank 0", "actor rank 1", "engine e1 worker 0"]
    assert group.engines == (None, None, "e1") and group.rank == 2 and not given.workers[1].imports


def test_actors_on_several_hosts_export_nothing_that_is_not_all():
    assert planned(("a0", "b0"), ("a1", "b1")).transport == "nccl"
    assert planned(("a0", "b0"), ("a0", "b1")).transport == "gloo", "NCCL takes no two members on one GPU"


@pytest.mark.parametrize(
    ("workers", "memory", "why"),
    [
        (("a0", "b0"), ("stable", "stable"), r"engine e1 worker 0 .* is not on the host of actor rank 0"),
        (("a-",), ("stable", "stable"), "engine e0 worker 0 .* has no GPU"),
        (("a0",), ("stable", "host"), "the parameters of actor rank 1 .* are in host memory"),
    ],
)
def test_ipc_by_name_is_refused_where_it_does_not_reach(workers, memory, why):
    with pytest.raises(ConfigError, match=f"weight_sync.transport is ipc, but: {why}"):
        planned(("a0", "a1"), workers, memory, transport="ipc")


def test_a_process_does_not_map_its_own_memory():
    reports = Reports((actor(0, "a0", "stable"),), (worker(0, "a0", pid=100),), (Recorded(whole_tensors("worker 0", TENSORS), "direct"),))
    with pytest.raises(ConfigError, match="are one process"):
        plan_connection(TENSORS, [whole_tensors("actor 0", TENSORS)], reports, SyncConfig(transport="ipc"))
    assert plan_connection(TENSORS, [whole_tensors("actor 0", TENSORS)], reports, SyncConfig()).transport == "shm"


def test_a_worker_is_told_of_the_exports_that_it_imports_and_of_renewed_ones_in_each_attempt():
    registry = ExportRegistry()
    registry.add_reader(b"w0", "ipc", (0, 1))
    registry.add_reader(b"w1", "ipc", (1,))
    registry.add_reader(b"w2", "other", (1,))
    registry.add(0, {"ipc": b"first"})
    registry.add(1, {"ipc": b"first"})
    assert [told.actor_rank for told in registry.first(b"w0")] == [0, 1]
    assert registry.first(b"w2") == (), "of its own transport alone"
    assert registry.renewed(b"w0", 1) == ()
    registry.renew(1, {"ipc": b"second"})
    # A worker that failed in attempt 2 may not have read what it was sent, so attempt 3 says it again.
    for attempt in (2, 3):
        for identity in (b"w0", b"w1"):
            assert [(told.actor_rank, told.export) for told in registry.renewed(identity, attempt)] == [(1, b"second")]
            assert registry.renewed(identity, attempt) == ()
        assert registry.renewed(b"w2", attempt) == ()


@pytest.mark.parametrize(
    ("is_cuda", "is_exportable", "stable", "expected"),
    [
        ((True, True), (True, True), True, "stable"),
        ((True, True), (True, True), False, "unstable"),
        ((True, True), (True, False), False, "device"),
        ((True, False), (True, True), True, "host"),
        ((), (), False, "stable"),
    ],
)
def test_an_actor_rank_says_where_its_memory_is(monkeypatch, is_cuda, is_exportable, stable, expected):
    buffers: Any = {str(i): SimpleNamespace(is_cuda=on_gpu, data_ptr=partial(int, i), numel=lambda: 1) for i, on_gpu in enumerate(is_cuda)}
    monkeypatch.setattr(ipc, "can_be_exported", lambda address: is_exportable[address])
    assert memory_of(buffers, stable_memory=stable) == expected


def test_replicas_that_share_experts_are_destinations_of_their_own():
    """Workers of two data-parallel replicas of one engine, which have the same rank in theirs."""
    workers = [replace_in(worker(0, place), dp_index=index) for index, place in enumerate(("a2", "a3"))]
    half = len(TENSORS) // 2
    records = [Recorded(whole_tensors("worker 0", held), "direct") for held in (TENSORS[:half], TENSORS[half:])]
    reports = Reports(tuple(actor(rank, f"a{rank}", "stable") for rank in range(2)), tuple(workers), tuple(records))
    placements = [whole_tensors(f"actor {rank}", TENSORS) for rank in range(2)]
    made = plan_connection(TENSORS, placements, reports, SyncConfig(bucket_bytes=NBYTES))
    assert made.traffic.redundancy == {"engine e0 worker 0": 1.0, "engine e0 worker 1": 1.0}
