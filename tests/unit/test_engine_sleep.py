"""What an engine handle keeps account of when its engine sleeps. vLLM itself, which cannot sleep without a GPU, is replaced."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlsync.engine.compat import engine as compat
from rlsync.engine.handles.local import Engine
from rlsync.errors import ConfigError, EngineDirtyError, RlsyncError


class Sleeper:
    """Notes what it is asked for; ``full`` makes it fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.full = False
        self.engine_core = self.output_processor = self
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=1))

    def has_unfinished_requests(self) -> bool:
        return False

    async def sleep(self, level: int) -> None:
        if self.full:
            raise RuntimeError("Memory usage increased after sleeping.")
        self.calls.append(f"sleep {level}")

    async def wake_up(self, tags: list[str]) -> None:
        if self.full:
            raise RuntimeError("CUDA Error: out of memory")
        self.calls.append("wake " + " ".join(tags))

    async def pause_scheduler_async(self, **_: object) -> None: ...

    async def resume_generation(self) -> None: ...


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(compat, "can_sleep", lambda: True)
    made = Engine("e", {"enable_sleep_mode": True})
    made._llm = Sleeper()
    made._calls.start()
    made._gate.open()
    yield made
    made._calls.stop()


def sync(engine: Engine) -> None:
    engine.pause("abort", "a sync", 5)
    engine.resume(3, 5)


def test_level_2_is_dirty_until_weights_are_awake_and_synced_and_answers_only_with_its_cache(engine):
    engine.sleep(2, 5)
    engine.sleep(2, 5)
    with pytest.raises(EngineDirtyError, match="dropped by sleep level 2"):
        engine.generate([[1]], {})
    with pytest.raises(ConfigError, match="sleeps without its weights"):
        engine.pause("abort", "a sync", 5)
    engine.wake(["weights"], 5)
    sync(engine)
    assert engine.state == "clean"
    with pytest.raises(ConfigError, match="sleeps without its kv_cache"):
        engine.generate([[1]], {})
    engine.wake(["kv_cache", "weights"], 5)
    engine.wake(["kv_cache"], 5)
    assert engine._llm.calls == ["sleep 2", "wake weights", "wake kv_cache"]


@pytest.mark.parametrize("level", [1, 2])
def test_one_that_is_awake_but_for_its_cache_sleeps_again(engine, level):
    """As where the step after a sync fails before the engine answers: its weights are on the GPU that the actor trains on."""
    engine.sleep(level, 5)
    engine.wake(["weights"], 5)
    engine.sleep(level, 5)
    assert engine._llm.calls == [f"sleep {level}", "wake weights", f"sleep {level}"]
    assert engine.state == ("clean" if level == 1 else "dirty")
    with pytest.raises(ConfigError, match="sleeps without its weights"):
        engine.pause("abort", "a sync", 5)
    engine.wake(["weights", "kv_cache"], 5)
    assert engine._llm.calls[3:] == ["wake weights kv_cache"]


def test_level_1_keeps_the_weights(engine):
    engine.sleep(1, 5)
    with pytest.raises(ConfigError, match="sleeps without its weights and kv_cache"):
        engine.generate([[1]], {})
    engine.wake(["weights", "kv_cache"], 5)
    assert engine.state == "clean"


def test_an_engine_that_cannot_wake_says_what_to_do_and_is_dirty(engine):
    engine.sleep(1, 5)
    engine._llm.full = True
    with pytest.raises(RlsyncError, match=r"could not wake its weights: RuntimeError: CUDA Error: out of memory; .* offload more"):
        engine.wake(["weights"], 5)
    assert engine.state == "dirty"


def test_an_engine_that_cannot_fall_asleep_answers_no_more_and_takes_no_sync(engine):
    """At level 1 too, where nothing else would tell that its memory may be gone."""
    engine._llm.full = True
    with pytest.raises(RlsyncError, match=r"could not fall asleep: RuntimeError: Memory usage increased after sleeping\.; restart it"):
        engine.sleep(1, 5)
    with pytest.raises(EngineDirtyError, match=r"could not fall asleep, and its memory may be gone; restart it$"):
        engine.generate([[1]], {})
    with pytest.raises(EngineDirtyError, match="could not fall asleep"):
        engine.pause("abort", "a sync", 5)


def test_what_cannot_sleep_is_refused(engine, monkeypatch):
    with pytest.raises(ConfigError, match="sleep level 3 gives no memory back"):
        engine.sleep(3, 5)
    with pytest.raises(ConfigError, match="has no cache to wake"):
        engine.wake(["cache"], 5)
    engine._args = {}
    with pytest.raises(ConfigError, match="started without enable_sleep_mode"):
        engine.sleep(2, 5)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="no sleep mode"):
        engine.sleep(2, 5)
    assert engine.state == "clean" and engine._llm.calls == []
