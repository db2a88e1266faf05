"""Deadlines of phases that pass when a test says so: it neither waits for their seconds, nor gives too few of them to what goes before.

And calls that hang, for which they pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from rlsync.coordinator.state_machine import Coordinator


@contextlib.contextmanager
def passed_deadline(*who: str, has_failed: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within, the deadline of a phase has passed as soon as nobody but ``who`` is waited for and ``has_failed``; and so one has.

    ``has_failed`` is left out where ``who`` never come at all: others are waited for last in phases that are in order, too.
    """
    expire, passed = Coordinator.expire, False

    def look(coordinator: Coordinator, now: float) -> None:
        nonlocal passed
        roster, sync, phase = coordinator._roster, coordinator._sync, coordinator.phase
        if coordinator.deadline_s is not None and has_failed():
            if phase == "connect":
                waited_for = [words for _, words in roster.absent()]
            else:
                assert sync is not None
                waited_for = [str(member) for member, _ in sync.stragglers(phase, roster.actors(), roster.workers())]
            if waited_for and all(words.startswith(who) for words in waited_for):
                now, passed = coordinator.deadline_s, True
        expire(coordinator, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "expire", look)
        yield
    assert passed, f"no deadline passed for {' or '.join(who)}"


@contextlib.contextmanager
def hanging(*at: int) -> Iterator[tuple[Callable[..., None], threading.Event]]:
    """A call that hangs at these arguments, or at all where there are none, until the block ends. The event is set when it does."""
    hangs, release = threading.Event(), threading.Event()

    def call(*arguments: int) -> None:
        if not at or arguments == at:
            hangs.set()
            release.wait()

    try:
        yield call, hangs
    finally:
        release.set()
