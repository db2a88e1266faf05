"""Claims about faults of a sync over the real channel: each ends within the deadline in one error, the same on all ranks.

The engine is the only stand-in: tests/chaos and tests/gpu cause the same in real ones.
"""

from __future__ import annotations

import pickle
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import Peer
from rlsync.coordinator.server import CoordinatorServer
from rlsync.errors import WeightSyncError
from rlsync.plan.verification import SAMPLE_PERIOD
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer, attempt
from rlsync.sync.comparison import compare_engines
from rlsync.transport.tasks import Tasks
from tests.deadlines import ended_before
from tests.phases import hanging, passed_deadline
from tests.thread_actors import Actors, Numbers, holds
from tests.thread_engines import TIMEOUT_S, ThreadEngine

HELLO = m.ActorHello("", "", 0, 1, "", "", "", 1, None, "")


def test_an_exception_in_fill_is_the_same_error_everywhere_and_the_next_sync_heals(actors: Actors, engines: list[ThreadEngine]) -> None:
    def boom(bucket: int) -> None:
        if bucket == 3:
            raise ZeroDivisionError("the third is cursed")

    actors.sources[1].on_fill = boom
    error = actors.failure(lambda s: s.sync(1))
    assert (error.phase, error.version, error.bucket, error.engine) == ("transfer", 1, 3, None)
    assert "the third is cursed" in error.cause
    assert "actor rank 1" in error.cause
    assert all("the third is cursed" in engine.dirty for engine in engines)
    actors.sources[1].on_fill = lambda bucket: None
    actors.sync(1)
    assert all(holds(engine, 1) and not engine.dirty for engine in engines)


def test_an_exception_in_a_worker_names_engine_and_bucket(actors: Actors, engines: list[ThreadEngine]) -> None:
    def boom(worker: int, bucket: int) -> None:
        if (worker, bucket) == (1, 2):
            raise KeyError("no such layer")

    engines[1].on_bucket = boom
    error = actors.failure(lambda s: s.sync(1))
    assert error.engine == "e1"
    assert "no such layer" in error.cause
    assert engines[0].dirty, "an engine that loaded everything has not committed either"
    assert "resume 1" not in engines[0].calls


def test_a_filler_that_hangs_is_found_by_the_deadline_and_must_connect_anew(actors: Actors, engines: list[ThreadEngine]) -> None:
    with hanging(1) as (actors.sources[1].on_fill, hangs):
        with ended_before(TIMEOUT_S), passed_deadline("actor rank 1", has_failed=hangs.is_set):
            error = actors.failure(lambda s: s.sync(1))
        assert "actor rank 1" in error.cause
        assert "fill bucket 1" in error.cause
        retry = actors.failure(lambda s: s.sync(1))
        assert "still inside the source" in retry.cause


@pytest.mark.parametrize(("verify", "found"), [("full", [True] * 3), ("sampled", [True] * 3), ("off", [False] * 3)])
def test_a_flipped_bit_is_found_where_it_is_verified_and_does_not_pass_in_the_sync_after(
    engines: list[ThreadEngine], verify: str, found: list[bool]
) -> None:
    actors = Actors(engines, verify=verify)
    actors.connect()

    def flip(worker: int, weights: dict[str, torch.Tensor]) -> None:
        if worker == 1:
            weights["w2"].view(torch.int32)[-3] ^= 1 << 7

    engines[1].on_hold = flip
    for version, expected in enumerate(found, 1):
        outcomes = actors.both(lambda s, version=version: s.sync(version))
        assert [isinstance(o, WeightSyncError) for o in outcomes] == [expected] * 2, outcomes
        if expected:
            assert (outcomes[0].phase, outcomes[0].engine, outcomes[0].bucket) == ("verify", "e1", 2)
            assert "w2" in outcomes[0].cause
            assert "actor rank 1" in outcomes[0].cause
            assert all(engine.dirty for engine in engines)
    engines[1].on_hold = lambda worker, weights: None
    actors.sync(4)
    assert all(holds(engine, 4) for engine in engines)
    actors.close()


def test_sampling_covers_every_region_within_the_period(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines[:1])
    actors.connect()
    actors.sync(1)

    def flip(worker: int, weights: dict[str, torch.Tensor]) -> None:
        weights["w4"].view(torch.int32)[0] ^= 1

    engines[0].on_hold = flip
    outcomes = [actors.both(lambda s, version=version: s.sync(version))[0] for version in range(2, 2 + SAMPLE_PERIOD)]
    failed = [isinstance(o, WeightSyncError) for o in outcomes]
    assert failed == sorted(failed) and 1 < sum(failed) < len(failed), "found when it was looked at, and in each sync from then on"
    actors.close()


def test_a_worker_that_hangs_is_found_by_the_deadline(actors: Actors, engines: list[ThreadEngine]) -> None:
    with hanging(0, 2) as (engines[1].on_bucket, hangs), passed_deadline("engine e1 worker 0", has_failed=hangs.is_set):
        error = actors.failure(lambda s: s.sync(1))
    assert (error.engine, error.bucket, error.phase) == ("e1", 2, "transfer")


def test_an_actor_rank_that_does_not_enter_is_found_by_the_deadline(actors: Actors) -> None:
    with passed_deadline("actor rank 1"), pytest.raises(WeightSyncError, match=r"actor rank 1.*enter sync"):
        actors.syncers[0].sync(1)


def test_ranks_that_disagree_on_the_version_fail(actors: Actors) -> None:
    versions = iter((1, 2))
    lock = threading.Lock()

    def call(syncer: WeightSyncer) -> SyncReport:
        with lock:
            version = next(versions)
        return syncer.sync(version)

    outcomes = actors.both(call)
    assert all(isinstance(o, WeightSyncError) and "started version" in str(o) for o in outcomes)


def test_the_report_counts_what_failed_before_and_knows_its_floor(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sources[0].on_fill = lambda bucket: 1 // 0
    actors.failure(lambda s: s.sync(1))
    assert actors.syncers[0].health.dirty == {"e0", "e1"}
    actors.sources[0].on_fill = lambda bucket: None
    report = actors.sync(1)
    assert (report.failures, report.engines_dirty) == ({"transfer": 1}, 0)
    assert report.floor_s is not None
    assert 0 < report.floor_s < report.seconds


def test_a_coordinator_that_is_gone_is_noticed(actors: Actors) -> None:
    server, connection = actors.syncers[0]._server, actors.syncers[1]._connection
    assert server is not None and connection is not None
    server.stop()
    actors.syncers[1]._connection = replace(connection, config=replace(connection.config, timeout_s=0.5))
    with pytest.raises(WeightSyncError, match="heard from the coordinator"):
        actors.syncers[1].sync(1)


def test_calls_that_end_meanwhile_do_not_put_off_the_end_of_the_wait_for_a_coordinator_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "GRACE_S", 0.2)
    peer, tasks, began_s = Peer("tcp://127.0.0.1:1", HELLO), Tasks(), time.monotonic()
    release, ended = threading.Event(), 0
    # More often than the wait is long, and for ten times as long.
    delays_s = [0.8 * i for i in range(1, 16)]
    for delay_s in delays_s:
        tasks.spawn("update", partial(release.wait, delay_s))

    def listen() -> None:
        nonlocal ended
        while attempt.receive(peer, tasks, 1.0, since_s=began_s, attempt=1, phase="transfer") is None:
            ended += len(tasks.finished())

    with pytest.raises(WeightSyncError, match=r"heard from the coordinator.* within 1\.2 s"):
        listen()
    assert 0 < ended < len(delays_s), "a call ended meanwhile, and others would have"
    release.set()
    peer.close()


def test_errors_cross_processes() -> None:
    error = WeightSyncError(phase="transfer", cause="why", engine="e0", version=3, bucket=1)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.bucket, copy.engine) == (str(error), 1, "e0")


class Answering:
    """A coordinator that has one answer to whatever it hears."""

    def __init__(self, answer: m.FromCoordinator) -> None:
        self.answer, self.has_answered = answer, threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.server = CoordinatorServer("127.0.0.1", 1)
        self.server.start(self)

    def receive(self, identity: bytes, raw: bytes, now: float) -> None:
        assert self.may_answer.wait(60)
        self.server.send(identity, self.answer)
        self.has_answered.set()

    def lose(self, identity: bytes) -> None: ...

    def expire(self, now: float) -> None: ...

    def fail(self, cause: str) -> None: ...

    def is_awaited(self) -> bool:
        return False

    def process_of(self, identity: bytes) -> None: ...


def test_who_was_stopped_beyond_its_deadline_hears_what_happened_meanwhile() -> None:
    server = Answering(m.Error(attempt=0, phase="transfer", cause="it took too long")).server
    peer = Peer(server.endpoint, HELLO)
    with pytest.raises(WeightSyncError, match="it took too long"):
        peer.receive(0, time.monotonic() - 1)
    with pytest.raises(TimeoutError):
        peer.receive(0, time.monotonic() - 1)
    peer.close()
    server.stop()


def test_a_peer_whom_zmq_has_hung_up_on_blocks_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As on whoever is sent more than it takes: zmq closes the connection and makes no other."""
    served = Answering(m.Error(attempt=0, phase="connect", cause="x" * 5000))
    # The limit is the peer's alone.
    served.may_answer.clear()
    with monkeypatch.context() as patch:
        patch.setattr(m, "MAX_MESSAGE_BYTES", 1000)
        peer = Peer(served.server.endpoint, HELLO)
    served.may_answer.set()
    assert served.has_answered.wait(60)

    def send_until_it_is_broken() -> None:
        while "is broken, and a message (Goodbye) stays unsent" not in caplog.text:
            time.sleep(0.05)
            peer.send(m.Goodbye())

    sending = threading.Thread(target=send_until_it_is_broken, daemon=True)
    sending.start()
    sending.join(60)
    assert not sending.is_alive()
    with pytest.raises(TimeoutError):
        peer.receive(0, time.monotonic())
    peer.close()
    served.server.stop()


@pytest.mark.parametrize("call", ["connect", "sync"])
def test_an_engine_that_cannot_be_marked_dirty_keeps_no_other_from_it(
    call: str, actors: Actors, engines: list[ThreadEngine], caplog: pytest.LogCaptureFixture
) -> None:
    """And what the ranks raise is what has failed first."""

    def mark_dirty(reason: str, sync: str = "") -> None:
        raise OSError("no way to it")

    actors.sync(1)
    engines[0].mark_dirty = mark_dirty  # type: ignore[method-assign]
    if call == "sync":
        actors.sources[1].on_fill = lambda bucket: 1 // 0
        error = actors.failure(lambda s: s.sync(2))
        assert "ZeroDivisionError" in error.cause
    else:
        actors.close()
        actors.there.clear()
        engines[1].change_info = lambda info: {**info, "token": "another"}
        error = actors.failure(lambda s: s.connect())
        assert "token" in error.cause
    assert str(error) in engines[1].dirty
    assert "engine e0" in caplog.text and "no way to it" in caplog.text


def test_a_comparison_that_fails_lets_every_engine_go_on_although_one_cannot(engines: list[ThreadEngine]) -> None:
    """Engines of threads cannot compare, and say so when all are paused."""

    def resume(version: int, timeout_s: float) -> None:
        raise OSError("no way to it")

    engines[0].resume = resume  # type: ignore[method-assign]
    for engine in engines:
        engine.version = None  # type: ignore[attr-defined]
    with pytest.raises(WeightSyncError, match="came after the connection was complete"):
        compare_engines(Numbers(0, 1), engines, SyncConfig(timeout_s=TIMEOUT_S))
    assert engines[1].calls == ["pause keep", "resume None"]
