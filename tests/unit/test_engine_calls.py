"""Claims about calls of an engine handle, with coroutines for an engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from typing import Any

import pytest

from rlsync.engine.handles import SyncOrder, calls
from rlsync.engine.handles.calls import Calls, Gate, sync_gated
from rlsync.errors import EngineCallError, EngineDirtyError


@pytest.fixture
def gate() -> Gate:
    made = Gate("one", "it is not started")
    made.open()
    return made


@pytest.fixture
def started(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    monkeypatch.setattr(calls, "_PROBE_S", 0.1)
    made = Calls(gate)
    made.start()
    yield made
    made.stop()


def ask_in_vain(started: Calls) -> None:
    started.run_requests([asyncio.sleep(60)], 0.1, lambda: asyncio.sleep(60))


def test_requests_that_time_out_in_a_sync_end_and_leave_it_alone(started: Calls, gate: Gate) -> None:
    """Its core answers nobody while its workers are inside an update, where they may wait for other engines."""
    gate.begin_sync("a sync", 60)
    ticket = gate.ticket()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        ask_in_vain(started)
    gate.commit(ticket, 2)
    assert gate.state == "clean"


def test_an_engine_that_gives_no_sign_of_life_outside_a_sync_is_dirty(started: Calls, gate: Gate) -> None:
    with pytest.raises(EngineDirtyError, match="no sign of life"):
        ask_in_vain(started)
    assert gate.state == "dirty"


def test_requests_that_were_let_in_before_their_engine_became_dirty_are_not_made_after(started: Calls, gate: Gate) -> None:
    """A thread may rest between the two for as long as the machine has other things to do."""
    asked: list[str] = []

    async def answer() -> str:
        asked.append("the engine")
        return "from weights of no version"

    gate.wait()
    gate.shut("its sync failed")
    started.end_requests()
    with pytest.raises(EngineDirtyError, match="its sync failed"):
        started.run_requests([answer()], 60, lambda: asyncio.sleep(0))
    assert asked == []


def test_an_answer_that_comes_as_the_time_is_over_is_an_answer(started: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "wait", lambda futures, timeout_s: wait(futures, 60))

    async def answer() -> str:
        return "here"

    async def fail() -> None:
        raise TimeoutError("its own")

    assert started.run(answer(), 0.0) == "here"
    with pytest.raises(TimeoutError, match="its own"):
        started.run(fail(), 0.0)


def test_each_result_is_handed_over_when_its_request_ends(started: Calls) -> None:
    seen: list[tuple[int, str]] = []

    async def after(others: int, result: str) -> str:
        while len(seen) < others:
            await asyncio.sleep(0.001)
        if result == "fails":
            raise ZeroDivisionError
        return result

    def ask(*results: str) -> list[str]:
        requests = [after(len(results) - 1 - number, result) for number, result in enumerate(results)]
        return started.run_requests(requests, 60, lambda: asyncio.sleep(0), lambda number, result: seen.append((number, result)))

    assert ask("last", "then", "first") == ["last", "then", "first"]
    assert seen == [(2, "first"), (1, "then"), (0, "last")]
    seen.clear()
    with pytest.raises(ZeroDivisionError):
        ask("never", "fails", "first")
    assert seen == [(2, "first")]


@pytest.mark.parametrize("others_s", [0, 60])
def test_what_takes_a_result_and_fails_ends_the_call(started: Calls, others_s: float) -> None:
    """Otherwise results were lost, and nobody heard. The last request to end, and one whose others would go on for a minute."""
    told: list[int] = []

    async def after(seconds: float) -> None:
        await asyncio.sleep(seconds)

    def take(number: int, result: None) -> None:
        told.append(number)
        if number == 1:
            raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        started.run_requests([after(others_s), after(0.05)], 10, lambda: asyncio.sleep(0), take)
    assert told == ([1] if others_s else [0, 1])


def test_calls_in_turn_wait_for_one_whose_caller_has_left_and_for_none_that_was_given_up(started: Calls) -> None:
    """A server's update is several requests: those of a failed sync do not come between those of the next."""
    happened: list[str] = []

    async def update(name: str, seconds: float) -> None:
        happened.append(f"{name} begins")
        try:
            await asyncio.sleep(seconds)
        finally:
            happened.append(f"{name} ends")

    left = threading.Thread(target=started.run_in_turn, args=(lambda: update("failed", 0.3), None))
    left.start()
    while not happened:
        time.sleep(0.01)
    started.run_in_turn(lambda: update("next", 0), 60)
    with pytest.raises(TimeoutError, match=r"within 3 s"):
        started.run_in_turn(lambda: update("stuck", 60), 3.0)
    started.run_in_turn(lambda: update("last", 0), 60)
    left.join(60)
    assert happened == [f"{name} {what}" for name in ("failed", "next", "stuck", "last") for what in ("begins", "ends")]


def test_nothing_of_a_sync_is_begun_after_it_has_failed_elsewhere(gate: Gate) -> None:
    begun: list[str] = []

    class Handle:
        def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
            begun.append("update")
            if update_info["version"] == 4:
                gate.shut("another engine failed", "sync 4")

        def resume(self, version: int | None, timeout_s: float, sync: str = "") -> None:
            gate.commit(gate.ticket(sync), version)
            begun.append("resume")

    def pause(sync: str) -> None:
        gate.begin_sync(sync, 60)
        if sync == "sync 3":
            gate.shut("another engine failed", sync)

    def order(version: int) -> SyncOrder:
        return SyncOrder("abort", f"sync {version}", {"version": version}, version, 60, 60)

    for version, call in ((3, "update"), (4, "resume")):
        with pytest.raises(EngineCallError, match="another engine failed") as failed:
            sync_gated(gate, Handle(), order(version), partial(pause, f"sync {version}"))
        assert failed.value.call == call and gate.state == "dirty"
    assert begun == ["update"]
    sync_gated(gate, Handle(), order(5), partial(pause, "sync 5"))
    assert begun == ["update", "update", "resume"] and gate.version == 5


def test_a_resume_that_ends_after_its_sync_has_failed_opens_nothing(gate: Gate) -> None:
    """It is in a thread of its own, and the engine may be in its next sync by then."""
    gate.begin_sync("first", 60)
    ticket = gate.ticket("first")
    gate.shut("another engine failed", "first")
    with pytest.raises(EngineDirtyError, match="another engine failed"):
        gate.commit(ticket, 3)
    gate.begin_sync("second", 60)
    with pytest.raises(EngineDirtyError):
        gate.commit(ticket, 3)
    assert (gate.state, gate.version) == ("syncing", None)


def test_a_pause_that_comes_behind_the_failure_of_its_sync_is_refused(gate: Gate) -> None:
    gate.shut("another engine failed", "first")
    with pytest.raises(EngineDirtyError, match="another engine failed"):
        gate.begin_sync("first", 60)
    assert gate.state == "dirty"
    gate.begin_sync("second", 60)
    assert gate.state == "syncing"


def test_a_resume_outside_a_sync_is_refused_and_says_so(gate: Gate) -> None:
    with pytest.raises(EngineDirtyError, match=r"^engine one is in no sync$"):
        gate.ticket()
    gate.shut("a sync failed")
    with pytest.raises(EngineDirtyError, match="refuses to generate: a sync failed"):
        gate.ticket()
