"""Claims about peers that are late or come again: engines whose calls do not return are named on all ranks, and plans are kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rlsync.sync.packer import Packer
from tests.phases import passed_deadline
from tests.thread_actors import Actors, holds
from tests.thread_engines import ThreadEngine


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """Set at the end, so that calls that wait for it end too."""
    event = threading.Event()
    yield event
    event.set()


def hang_in(engine: ThreadEngine, call: str, stuck: threading.Event) -> threading.Event:
    """The call does what it does, and does not return. The event: it has come to that."""
    real, hangs = getattr(engine, call), threading.Event()

    def hang(*arguments: object) -> None:
        real(*arguments)
        hangs.set()
        stuck.wait()

    setattr(engine, call, hang)
    return hangs


@pytest.mark.parametrize("call", ["update_weights", "resume"])
def test_an_engine_that_does_not_go_on_after_the_commit_is_named(call: str, stuck: threading.Event) -> None:
    engines = [ThreadEngine("left"), ThreadEngine("right")]
    hangs = hang_in(engines[1], call, stuck)
    actors = Actors(engines)
    actors.connect()
    with passed_deadline("engine right worker 0", has_failed=hangs.is_set):
        error = actors.failure(lambda syncer: syncer.sync(1))
    assert (error.engine, error.phase, error.version) == ("right", "resume", 1)
    assert [bool(engine.dirty) for engine in engines] == [True, True]
    actors.close()


def test_an_engine_whose_workers_connect_and_whose_core_is_stuck_is_no_connection_on_any_rank(stuck: threading.Event) -> None:
    engines = [ThreadEngine("left"), ThreadEngine("right")]
    hangs = hang_in(engines[1], "init_weight_transfer", stuck)
    with passed_deadline("engine right, ", has_failed=hangs.is_set):
        error = Actors(engines).failure(lambda syncer: syncer.connect())
    assert (error.engine, error.phase) == ("right", "connect")
    assert "engine right, whose workers are connected, but whose init_weight_transfer has not returned" in error.cause


def test_a_rank_that_cannot_bind_what_it_sends_says_so_to_all_while_an_engine_still_connects(
    stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ThreadEngine("late")
    hang_in(engine, "init_weight_transfer", stuck)

    def fail(packer: Packer) -> None:
        raise ZeroDivisionError("cursed")

    monkeypatch.setattr(Packer, "prepare", fail)
    error = Actors([engine]).failure(lambda syncer: syncer.connect())
    assert error.phase == "connect" and "actor rank" in error.cause and "cursed" in error.cause


def test_the_same_peers_connect_again_by_the_same_plan() -> None:
    engine = ThreadEngine("again")
    actors = Actors([engine])
    actors.connect()
    actors.sync(1)
    first = actors.syncers[0]._plan
    actors.close()
    actors.there.clear()
    actors.connect()
    second = actors.syncers[0]._plan
    assert first is not None and second is not None and second.plan is first.plan
    actors.sync(2)
    assert holds(engine, 2)
    actors.close()
