"""Claims about messages between actor ranks and workers, over real gloo groups, with engines that are a thread and a dictionary."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlsync.errors import WeightSyncError
from rlsync.transport import gloo
from tests.deadlines import ended_before
from tests.phases import hanging, passed_deadline
from tests.thread_actors import SIZES, Actors, holds
from tests.thread_engines import TIMEOUT_S, ThreadEngine


@pytest.fixture
def engines() -> list[ThreadEngine]:
    """Two engines; the first says that it is on another host."""
    made = [ThreadEngine("far"), ThreadEngine("near")]
    made[0].domain = "another"
    return made


@pytest.fixture
def actors(engines: list[ThreadEngine]) -> Iterator[Actors]:
    made = Actors(engines, verify="full")
    made.connect()
    yield made
    made.close()


def both_hold(engines: list[ThreadEngine], version: int) -> bool:
    return all(holds(engine, version) for engine in engines)


def test_each_worker_gets_what_it_can_reach_and_both_ways_carry_the_same(actors: Actors, engines: list[ThreadEngine]) -> None:
    for version in (1, 2, 3):
        report = actors.sync(version)
        assert both_hold(engines, version)
        assert not holds(engines[0], version + 1)
        assert report.transport == "gloo+shm"
        assert report.bytes == 3 * 4 * sum(SIZES), "two workers far away, and two that share a stream"
        assert report.max_redundancy == 1.0


@pytest.mark.parametrize(("num_slots", "transport"), [(1, "gloo"), (3, "auto"), (8, "gloo")])
def test_any_number_of_slots_carries_the_same_bytes(engines: list[ThreadEngine], num_slots: int, transport: str) -> None:
    actors = Actors(engines, num_slots=num_slots, transport=transport)
    actors.connect()
    for version in (1, 2):
        assert actors.sync(version).transport == ("gloo" if transport == "gloo" else "gloo+shm")
        assert both_hold(engines, version)
    actors.close()


def test_shared_memory_where_there_is_none_is_refused(engines: list[ThreadEngine]) -> None:
    error = Actors(engines, transport="shm").failure(lambda s: s.connect())
    assert "engine far worker 0" in error.cause
    assert "does not share /dev/shm" in error.cause


@pytest.mark.parametrize("bucket", [0, 2, 4])
def test_the_sync_after_a_failed_fill_is_right_in_the_same_connection(actors: Actors, engines: list[ThreadEngine], bucket: int) -> None:
    def boom(at: int) -> None:
        if at == bucket:
            raise ZeroDivisionError("cursed")

    actors.sources[1].on_fill = boom
    for _ in range(2):
        error = actors.failure(lambda s: s.sync(1))
        assert (error.phase, error.bucket) == ("transfer", bucket)
        assert "cursed" in error.cause
    actors.sources[1].on_fill = lambda at: None
    for version in (1, 2):
        actors.sync(version)
        assert both_hold(engines, version)


@pytest.mark.parametrize("engine", [0, 1])
def test_the_sync_after_a_failed_worker_is_right(actors: Actors, engines: list[ThreadEngine], engine: int) -> None:
    def boom(worker: int, bucket: int) -> None:
        if (worker, bucket) == (1, 2):
            raise KeyError("no such layer")

    engines[engine].on_bucket = boom
    error = actors.failure(lambda s: s.sync(1))
    assert (error.engine, error.bucket) == (engines[engine].engine_id, 2)
    assert "no such layer" in error.cause
    engines[engine].on_bucket = lambda worker, bucket: None
    actors.sync(1)
    assert both_hold(engines, 1)


@pytest.mark.parametrize("late", ["engine", "actor"])
def test_those_who_are_late_within_the_deadline_are_waited_for_also_after_a_failed_sync(
    actors: Actors, engines: list[ThreadEngine], late: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed sync costs its group. Members of the next one wait for each other for less than a phase, and not before all are here."""
    engines[0].on_bucket = lambda worker, bucket: 1 // 0
    actors.failure(lambda s: s.sync(1))
    engines[0].on_bucket = lambda worker, bucket: None
    entered, enter, is_here = list[bool](), gloo.enter, threading.Event()

    def noted(*arguments: Any) -> Any:
        entered.append(is_here.is_set())
        return enter(*arguments)

    def come_late() -> None:
        time.sleep(0.5)
        is_here.set()

    monkeypatch.setattr(gloo, "enter", noted)
    if late == "engine":
        monkeypatch.setattr(engines[0], "pause", lambda mode, sync, timeout_s: come_late())
    else:
        sync = actors.syncers[1].sync
        monkeypatch.setattr(actors.syncers[1], "sync", lambda version: come_late() or sync(version))
    actors.sync(1)
    assert both_hold(engines, 1)
    assert entered == [True] * 4, "two actor ranks and two workers"


def test_a_flipped_bit_is_found(actors: Actors, engines: list[ThreadEngine]) -> None:
    engines[0].on_hold = lambda worker, weights: weights["w2"].neg_() if worker == 1 else None
    error = actors.failure(lambda s: s.sync(1))
    # A worker's own report, which names the bucket, and its engine's answer race.
    assert error.engine == "far" and error.bucket in (2, None), error
    assert "verified regions are not what was sent: w2 in w2" in error.cause, error


def test_a_filler_that_hangs_is_found_by_the_deadline(actors: Actors) -> None:
    with hanging(1) as (actors.sources[1].on_fill, hangs):
        with ended_before(TIMEOUT_S), passed_deadline("actor rank 1", has_failed=hangs.is_set):
            error = actors.failure(lambda s: s.sync(1))
        assert "actor rank 1" in error.cause
        assert "still inside the source" in actors.failure(lambda s: s.sync(1)).cause


def test_a_worker_that_hangs_is_found_by_the_deadline(actors: Actors, engines: list[ThreadEngine]) -> None:
    with (
        hanging(0, 2) as (engines[0].on_bucket, hangs),
        ended_before(TIMEOUT_S),
        passed_deadline("engine far worker 0", has_failed=hangs.is_set),
    ):
        error = actors.failure(lambda s: s.sync(1))
    assert (error.engine, error.bucket, error.phase) == ("far", 2, "transfer")


def test_a_worker_that_does_not_come_to_the_new_group_is_named(
    actors: Actors, engines: list[ThreadEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines[0].on_bucket = lambda worker, bucket: 1 / 0
    actors.failure(lambda s: s.sync(1))
    engines[0].on_bucket = lambda worker, bucket: None
    receiver: Any = engines[0]._receivers[1]
    receiver.join = lambda group: None
    with monkeypatch.context() as patch:
        patch.setattr(gloo, "PATIENCE", 2 / TIMEOUT_S)
        error = actors.failure(lambda s: s.sync(1))
    assert "engine far worker 1" in error.cause
    assert "did not come to the gloo group" in error.cause
    assert error.engine == "far"
    del receiver.join
    actors.sync(1)
    assert both_hold(engines, 1)


def test_a_new_connection_starts_over(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(1)
    actors.close()
    with pytest.raises(WeightSyncError, match="not connected"):
        actors.syncers[0].sync(2)
    again = Actors(engines)
    again.connect()
    again.sync(2)
    again.close()
    assert both_hold(engines, 2)
