"""States of an engine handle when calls come late. vLLM itself is replaced by one that answers when it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from rlsync.engine.handles import SyncOrder
from rlsync.engine.handles.local import Engine
from rlsync.errors import EngineCallError, EngineDirtyError


class SlowLLM:
    """``resume_generation`` waits for ``gate``, a pause for ``stopped`` and an update for ``reset``, which are set. It is its own core, and
    has no requests unless ``is_busy``.

    Attributes:
        asked: the calls of a sync, in the order in which the core gets them.
    """

    def __init__(self) -> None:
        self.gate, self.entered, self.stopped = threading.Event(), threading.Event(), threading.Event()
        self.stopped.set()
        self.reset, self.can_reset = threading.Event(), True
        self.reset.set()
        self.engine_core = self.output_processor = self
        self.vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_size=1),
            model_config=SimpleNamespace(is_multimodal_model=False, is_encoder_decoder=False, enable_prompt_embeds=False),
        )
        self.is_busy = False
        self.pause_error: Exception | None = None
        self.asked: list[str] = []

    def has_unfinished_requests(self) -> bool:
        return self.is_busy

    async def pause_scheduler_async(self, **_: object) -> None:
        self.asked.append("pause")
        await asyncio.to_thread(self.stopped.wait)
        if self.pause_error is not None:
            raise self.pause_error

    async def call_utility_async(
        self, method: str, info: object, label: str, pause_mode: str | None, keeps_caches: bool, resumes: bool
    ) -> bool:
        self.asked.append(f"{method} {label}" + (f" {pause_mode}" if pause_mode else ""))
        await asyncio.to_thread(self.reset.wait)
        if not self.can_reset:
            raise RuntimeError("requests hold blocks")
        return resumes

    async def reset_mm_cache(self) -> None:
        self.asked.append("reset pictures")

    async def reset_encoder_cache(self) -> None:
        self.asked.append("reset encoder")

    async def resume_generation(self) -> None:
        self.asked.append("resume")
        self.entered.set()
        await asyncio.to_thread(self.gate.wait)


@pytest.fixture
def engine():
    made = Engine("e", {})
    made._llm = SlowLLM()
    made._calls.start()
    yield made
    # Threads that wait for these would keep a failed run from ending.
    for event in (made._llm.stopped, made._llm.reset, made._llm.gate):
        event.set()
    made._calls.stop()


def test_a_resume_that_outlives_its_sync_does_not_clean_a_dirty_engine(engine):
    engine.pause("abort", "a sync", 60)
    failures: list[BaseException] = []

    def resume() -> None:
        try:
            engine.resume(7, 60)
        except EngineDirtyError as error:
            failures.append(error)

    late = threading.Thread(target=resume)
    late.start()
    assert engine._llm.entered.wait(60)
    engine.mark_dirty("the deadline passed")
    engine._llm.gate.set()
    late.join(60)
    assert engine.state == "dirty" and engine.version is None and "the deadline passed" in str(failures[0])


def test_a_pause_that_comes_behind_the_failure_of_its_sync_does_not_begin_it(engine):
    engine.mark_dirty("a process of it has ended", "a sync")
    with pytest.raises(EngineDirtyError, match="a process of it has ended"):
        engine.pause("abort", "a sync", 60)
    assert engine.state == "dirty"
    engine.mark_dirty("for another reason")
    with pytest.raises(EngineDirtyError, match="for another reason"):
        engine.pause("abort", "a sync", 60)
    engine.pause("abort", "the next sync", 60)
    assert engine.state == "syncing"


def order(version: int) -> SyncOrder:
    return SyncOrder("abort", f"sync {version}", {"version": version, "attempt": version}, version, 60, 60)


def test_an_idle_engine_is_paused_updated_and_resumed_by_one_call_of_its_core(engine):
    """One that has not the whole update does not serve, and the call that failed is named."""
    engine.sync(order(3))
    assert engine._llm.asked == ["rlsync_update 3 abort"] and (engine.state, engine.version) == ("clean", 3)
    engine._llm.can_reset = False
    with pytest.raises(EngineCallError, match="requests hold blocks") as failed:
        engine.sync(order(4))
    assert (failed.value.call, engine.state, engine.version) == ("update", "syncing", 3)


def test_an_engine_with_requests_is_paused_before_its_update_and_resumed_behind_it(engine):
    engine._llm.gate.set()
    engine._llm.is_busy = True
    engine.sync(order(3))
    assert engine._llm.asked == ["pause", "rlsync_update 3", "resume"] and engine.version == 3
    engine._llm.pause_error = RuntimeError("a worker of it has ended")
    with pytest.raises(EngineCallError, match="a worker of it has ended") as failed:
        engine.sync(order(4))
    assert failed.value.call == "pause" and engine._llm.asked[3:] == ["pause"]


def test_an_update_is_not_begun_when_its_sync_has_failed_during_the_pause(engine):
    engine._llm.is_busy = True
    engine._llm.stopped.clear()
    with ThreadPoolExecutor(1) as pool:
        syncing = pool.submit(engine.sync, order(3))
        while not engine._llm.asked:
            time.sleep(0.01)
        engine.mark_dirty("another engine failed", "sync 3")
        engine._llm.stopped.set()
        with pytest.raises(EngineCallError, match="another engine failed") as failed:
            syncing.result(60)
    assert failed.value.call == "update" and engine._llm.asked == ["pause"] and engine.state == "dirty"


def test_an_engine_that_was_paused_and_not_updated_is_resumed(engine):
    """As in a comparison."""
    engine._llm.gate.set()
    engine.sync(order(3))
    engine.pause("keep", "a comparison", 60)
    engine.resume(3, 60)
    assert engine._llm.asked[1:] == ["pause", "resume"]


def test_an_engine_that_takes_pictures_forgets_what_it_made_of_them_before_it_serves(engine):
    engine._llm.gate.set()
    engine._llm.vllm_config.model_config.is_multimodal_model = True
    engine.sync(order(3))
    assert set(engine._llm.asked[1:3]) == {"reset pictures", "reset encoder"} and engine._llm.asked[3:] == ["resume"]


def test_a_resume_of_a_sync_that_has_failed_does_not_end_the_next_one(engine):
    engine.pause("abort", "a sync", 60)
    engine.mark_dirty("another engine failed", "a sync")
    engine.pause("abort", "the next sync", 60)
    with pytest.raises(EngineDirtyError, match="is in another sync by now"):
        engine.resume(7, 60, "a sync")
    assert engine.state == "syncing"


def test_an_update_of_an_engine_with_requests_ends_when_their_keys_are_forgotten(engine):
    engine._llm.is_busy = True
    engine._llm.reset.clear()
    engine.pause("abort", "a sync", 60)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
        engine.update_weights({"version": 3, "attempt": 1}, 0.1)


def test_an_engine_with_requests_is_paused_before_anything_else_is_asked_of_it(engine):
    engine._llm.is_busy = True
    engine._llm.stopped.clear()
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
        engine.pause("wait", "a sync", 0.1)
    engine._llm.stopped.set()


def test_a_resume_of_an_engine_that_is_not_syncing_is_refused(engine):
    engine.mark_dirty("its sync failed")
    engine._llm.gate.set()
    with pytest.raises(EngineDirtyError, match="its sync failed"):
        engine.resume(7, 60)


def test_a_resume_in_time_makes_it_clean(engine):
    engine.pause("abort", "a sync", 60)
    engine._llm.gate.set()
    engine.resume(7, 60)
    assert (engine.state, engine.version) == ("clean", 7)


def test_an_engine_that_is_closed_in_the_midst_of_a_sync_is_not_made_to_serve_by_it(engine):
    engine._llm.gate.set()
    engine._gate.close("it is closed")
    with pytest.raises(EngineDirtyError, match="it is closed"):
        engine.pause("abort", "a sync", 60)
    with pytest.raises(EngineDirtyError, match="it is closed"):
        engine.resume(7, 60)
    engine.mark_dirty("its sync failed")
    with pytest.raises(EngineDirtyError, match="it is closed"):
        engine.generate([[1]], {})


def test_marking_a_closed_engine_dirty_says_nothing(engine):
    engine._calls.stop()
    engine.mark_dirty("too late")
    assert engine.state == "dirty"


def test_a_request_waits_for_a_sync_no_longer_than_it_was_given(engine):
    engine.pause("abort", "a sync", 60)
    with pytest.raises(TimeoutError, match=r"engine e was still in a sync after 0\.1 s"):
        engine.generate([[1]], {}, timeout_s=0.1)
    assert engine.state == "syncing"


def test_a_sync_that_nobody_hears_of_again_counts_as_failed(engine):
    engine.pause("abort", "a sync", 0.02)
    with pytest.raises(EngineDirtyError, match="neither committed nor failed in time"):
        engine.generate([[1]], {})
    assert engine.state == "dirty"


def test_a_call_that_is_never_answered_ends_with_its_loop(engine):
    engine.pause("abort", "a sync", 60)
    with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
        engine._calls.run(asyncio.sleep(60), 0.1)
    never = engine._calls.spawn(asyncio.sleep(60))
    engine._calls.stop()
    assert never.cancelled() and engine._calls.closed
