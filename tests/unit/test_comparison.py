"""Claims about engines whose comparison fails while they are paused. That real engines serve again is claimed in tests/integration."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlsync.errors import RlsyncError
from rlsync.sync.comparison import _Compared
from tests.thread_engines import ThreadEngine


class Paused(ThreadEngine):
    """Its pause takes as long as it is told to, and fails in the end where it is told to."""

    version = None

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("e0")
        self.error, self.is_inside, self.may_end = error, threading.Event(), threading.Event()

    def pause(self, mode: str, sync: str, timeout_s: float) -> None:
        self.is_inside.set()
        assert self.may_end.wait(60)
        super().pause(mode, sync, timeout_s)
        if self.error is not None:
            raise self.error


def test_an_engine_that_is_being_paused_when_its_comparison_fails_is_resumed_behind_the_pause() -> None:
    engine = Paused()
    compared = _Compared(engine)
    with ThreadPoolExecutor() as threads:
        pausing = threads.submit(compared.pause, "keep", "one", 60.0)
        assert engine.is_inside.wait(60)
        compared.mark_dirty("another engine has failed", "one")
        engine.may_end.set()
        assert isinstance(pausing.exception(), RlsyncError)
    assert engine.calls == ["pause keep", "resume None"]
    with pytest.raises(RlsyncError, match="comparison with engine e0 has failed already"):
        compared.pause("keep", "one", 60.0)
    compared.pause("keep", "two", 60.0)
    compared.mark_dirty("another engine has failed", "two")
    compared.mark_dirty("and another one", "two")
    assert engine.calls[2:] == ["pause keep", "resume None"], "resumed once"


def test_an_engine_whose_pause_fails_in_a_comparison_is_resumed() -> None:
    engine = Paused(TimeoutError("the pause took too long"))
    engine.may_end.set()
    with pytest.raises(TimeoutError, match="the pause took too long"):
        _Compared(engine).pause("keep", "one", 60.0)
    assert engine.calls == ["pause keep", "resume None"]
