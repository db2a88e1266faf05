"""Claims about calls of an engine handle, with coroutines for an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from rlsync.engine import calls
from rlsync.engine.calls import Calls
from rlsync.engine.gate import Gate
from rlsync.errors import EngineDirtyError


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
    gate.begin_sync(60)
    ticket = gate.ticket()
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        ask_in_vain(started)
    gate.commit(ticket, 2)
    assert gate.state == "clean"


def test_an_engine_that_gives_no_sign_of_life_outside_a_sync_is_dirty(started: Calls, gate: Gate) -> None:
    with pytest.raises(EngineDirtyError, match="no sign of life"):
        ask_in_vain(started)
    assert gate.state == "dirty"
