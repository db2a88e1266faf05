"""Claims about a sync that goes from parameters to parameters in steps that no message announces, over the real channel.

What plans, cuts, packs, sends, lands, verifies and fails is what serves GPUs. There are none here: real gloo groups carry the
messages in place of NCCL, which tests/gpu tries, and each thread says that it is on a GPU of its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from rlsync.coordinator.messages import WorkerAssignment
from rlsync.plan import packing
from rlsync.sync import syncer
from rlsync.transport import gloo, nccl
from rlsync.transport.p2p import GroupReceiver, group_of
from rlsync.transport.rendezvous import PATIENCE
from tests.deadlines import ended_before
from tests.phases import hanging, passed_deadline
from tests.thread_actors import SIZES, Actors, holds
from tests.thread_engines import TIMEOUT_S, ThreadEngine

BUCKET_BYTES = 200


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    monkeypatch.setattr(syncer, "_gpu_uuid", lambda: f"GPU-actor-{next(numbers)}")
    monkeypatch.setattr(syncer, "memory_of", lambda buffers, stable_memory: "device")
    monkeypatch.setattr(nccl, "make_sender", gloo.make_sender)
    monkeypatch.setattr(nccl, "make_receiver", receiver_that_lands_ahead)
    monkeypatch.setattr(packing, "LEAST_PIECE_BYTES", 64)


def receiver_that_lands_ahead(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> GroupReceiver:
    """As of NCCL, over gloo."""
    info = group_of(assignment)
    return GroupReceiver(
        assignment, lambda number: gloo.GlooCommunicator(info, number, timeout_s), device, device, timeout_s, lands_ahead=True
    )


@pytest.fixture
def engine() -> ThreadEngine:
    made = ThreadEngine("far")
    made.gpus, made.domain = ["GPU-far-0", "GPU-far-1"], "another"
    return made


@pytest.fixture
def actors(engine: ThreadEngine) -> Iterator[Actors]:
    made = Actors([engine], verify="full", transport="nccl", bucket_bytes=BUCKET_BYTES)
    made.connect()
    yield made
    made.close()


def test_weights_land_where_they_belong_in_one_bucket_of_many_steps(actors: Actors, engine: ThreadEngine) -> None:
    for version in (1, 2, 3):
        report = actors.sync(version)
        assert holds(engine, version)
        assert not holds(engine, version + 1)
    assert (report.transport, report.num_buckets, report.max_redundancy) == ("nccl", 1, 1.0)
    group = group_of(engine._assignments[0])
    # Each worker takes all of both halves, and each actor rank gives its half twice.
    assert group.num_steps == -(-4 * sum(SIZES) // BUCKET_BYTES) == 3


def test_auto_takes_it_for_gpus_apart_and_gloo_where_one_worker_has_none(engine: ThreadEngine) -> None:
    for gpu, transport in (("GPU-far-1", "nccl"), (None, "gloo")):
        engine.gpus[1] = gpu
        actors = Actors([engine], bucket_bytes=BUCKET_BYTES)
        actors.connect()
        assert actors.sync(1).transport == transport
        assert holds(engine, 1)
        actors.close()


@pytest.mark.parametrize("gpu", ["GPU-actor-1", "GPU-far-0"])
def test_two_members_on_one_gpu_are_refused_by_name(engine: ThreadEngine, gpu: str) -> None:
    engine.gpus[1] = gpu
    cause = Actors([engine], transport="nccl").failure(lambda s: s.connect()).cause
    assert f"share the GPU {gpu}" in cause
    assert "engine far worker 1" in cause
    assert ("actor rank" if "actor" in gpu else "engine far worker 0") in cause


def test_the_sync_after_a_failed_fill_is_right_in_the_same_connection(actors: Actors, engine: ThreadEngine) -> None:
    actors.sync(1)

    def receiving() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "rlsync-receiver"}

    def boom(at: int) -> None:
        raise ZeroDivisionError("cursed")

    actors.sources[1].on_fill, before = boom, receiving()
    with ended_before(PATIENCE * TIMEOUT_S):
        for _ in range(2):
            error = actors.failure(lambda s: s.sync(2))
            assert error.phase == "transfer"
            assert "cursed" in error.cause
        actors.sources[1].on_fill = lambda at: None
        for version in (2, 3):
            actors.sync(version)
            assert holds(engine, version)
        until_s = time.monotonic() + TIMEOUT_S
        while len(receiving() - before) > len(engine.weights) and time.monotonic() < until_s:
            time.sleep(0.01)
        assert len(receiving() - before) <= len(engine.weights), "a worker that waits for bytes is let go"


def test_the_sync_after_a_failed_worker_is_right(actors: Actors, engine: ThreadEngine) -> None:
    def boom(worker: int, bucket: int) -> None:
        if worker == 1:
            raise KeyError("no such layer")

    engine.on_bucket = boom
    assert "no such layer" in actors.failure(lambda s: s.sync(1)).cause
    engine.on_bucket = lambda worker, bucket: None
    actors.sync(1)
    assert holds(engine, 1)


def test_a_flipped_bit_is_found(actors: Actors, engine: ThreadEngine) -> None:
    engine.on_hold = lambda worker, weights: weights["w2"].neg_() if worker == 1 else None
    error = actors.failure(lambda s: s.sync(1))
    assert (error.phase, error.engine) == ("verify", "far")


def test_buffers_that_move_between_syncs_are_written_where_they_are(actors: Actors, engine: ThreadEngine) -> None:
    actors.sync(1)
    for weights in engine.weights:
        weights.update({name: torch.zeros_like(t) for name, t in weights.items()})
    actors.sync(2)
    assert holds(engine, 2)


def test_buffers_that_move_in_a_sync_are_an_error(actors: Actors, engine: ThreadEngine) -> None:
    def move(worker: int, bucket: int) -> None:
        engine.weights[worker]["w1"] = engine.weights[worker]["w1"].clone()

    engine.on_bucket = move
    assert "have moved while they were written, among them w1" in actors.failure(lambda s: s.sync(1)).cause


@pytest.mark.parametrize("who", ["actor", "worker"])
def test_who_hangs_is_found_by_the_deadline(actors: Actors, engine: ThreadEngine, who: str) -> None:
    late = "actor rank 1" if who == "actor" else "engine far worker"
    with hanging() as (hang, hangs), ended_before(TIMEOUT_S), passed_deadline(late, has_failed=hangs.is_set):
        if who == "actor":
            actors.sources[1].on_fill = hang
        else:
            engine.on_bucket = hang
        error = actors.failure(lambda s: s.sync(1))
    assert late in str(error)


def test_a_worker_without_a_gpu_is_refused_by_name(engine: ThreadEngine) -> None:
    engine.gpus[0] = None
    cause = Actors([engine], transport="nccl").failure(lambda s: s.connect()).cause
    assert "weight_sync.transport is nccl, but: engine far worker 0" in cause
    assert "has no GPU" in cause
