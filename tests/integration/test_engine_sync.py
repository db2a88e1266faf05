"""Claims about real vLLM engines on CPU: what a sync makes of them. What faults leave is in ``test_engine_sync_faults``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsync.engine.handle import Engine
from rlsync.errors import ConfigError, WeightSyncError
from tests.integration.engine_source import call_on_fill, read_folder
from tests.integration.tiny_engines import (
    GREEDY,
    PROMPTS,
    Answers,
    TwoRanks,
    assert_refuses,
    one_rank,
    same,
    transformers_answers,
)  # fmt: skip

# The first test waits for all engines to start.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engines(tiny_engines: dict[str, Engine]) -> dict[str, Engine]:
    return tiny_engines


@pytest.fixture(scope="module")
def folders(tiny_folders: dict[str, Path]) -> dict[str, Path]:
    return tiny_folders


@pytest.fixture(scope="module", autouse=True)
def fresh(tiny_answers: dict[str, Answers]) -> dict[str, Answers]:
    return tiny_answers


def test_the_two_checkpoints_answer_differently(fresh: dict[str, Answers]) -> None:
    assert not same(fresh["a"], fresh["b"])


def test_a_synced_engine_answers_like_a_fresh_one(engines: dict[str, Engine], fresh: dict[str, Answers], folders: dict[str, Path]) -> None:
    """Also: two engines by one sync, the same weights again, and back to what an engine was started with."""
    with one_rank([engines["a"], engines["b"]], folders["b"]) as syncer:
        syncer.connect()
        for version in (1, 2, 3):
            report = syncer.sync(version)
            answers = [engines[name].generate(PROMPTS, GREEDY) for name in ("a", "b")]
            assert same(answers[0], fresh["b"])
            assert same(answers[1], fresh["b"])
            assert {c.version for answer in answers[0] for c in answer} == {version}
            assert report.num_buckets > 3
            assert report.bytes == sum(t.nbytes for t in read_folder(folders["b"]).values()), "two engines, one stream"
        syncer._source.take(read_folder(folders["a"]))  # type: ignore[attr-defined]
        syncer.sync(4)
        assert all(same(engines[name].generate(PROMPTS, GREEDY), fresh["a"]) for name in ("a", "b"))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_tied_engine_without_weights_answers_like_transformers(
    engines: dict[str, Engine], folders: dict[str, Path], num_slots: int
) -> None:
    if num_slots == 1:
        assert_refuses(engines["llama"], "dummy")
    with one_rank([engines["llama"]], folders["llama"], num_slots=num_slots) as syncer:
        syncer.connect()
        assert "lm_head.weight" not in {t.name for t in syncer._source.tensors}
        for version in (1, 2):
            syncer.sync(version)
            assert same(engines["llama"].generate(PROMPTS, GREEDY), transformers_answers(folders["llama"]))


def test_an_engine_with_two_workers_answers_like_transformers(engines: dict[str, Engine], folders: dict[str, Path]) -> None:
    """Each worker takes its share of every tensor: one bucket table serves all."""
    if "tp2" not in engines:
        pytest.skip("tensor parallelism needs two GPUs")
    assert_refuses(engines["tp2"], "dummy")
    with one_rank([engines["tp2"], engines["llama"]], folders["llama"]) as syncer:
        syncer.connect()
        syncer.sync(1)
        wanted = transformers_answers(folders["llama"])
        assert all(same(engines[name].generate(PROMPTS, GREEDY), wanted) for name in ("tp2", "llama"))


@pytest.mark.parametrize("name", ["a", "llama", "tp2"])
def test_a_sync_leaves_no_weight_update_open_and_ends_one_that_is(engines: dict[str, Engine], folders: dict[str, Path], name: str) -> None:
    """One that failed, one that nobody waited for, one that somebody began and gave up."""
    if name not in engines:
        pytest.skip("tensor parallelism needs two GPUs")
    engine, folder = engines[name], folders["b" if name == "a" else "llama"]
    with one_rank([engine], folder, timeout_s=20.0) as syncer:
        syncer.connect()
        engine.pause("abort", "a sync", 10)
        with pytest.raises(Exception, match="joined attempt 98, which the actor has not started"):
            engine.update_weights({"version": 1, "attempt": 98}, 10)
        with pytest.raises(TimeoutError):
            engine.update_weights({"version": 1, "attempt": 99}, 1e-3)
        syncer.sync(1)
        wanted = engine.generate(PROMPTS, GREEDY)
        # Workers that refused to begin another one would leave their executor with answers that it takes for others.
        engine._calls.run(engine._llm.start_weight_update(), 10)
        for version in (2, 3):
            syncer.sync(version)
            assert same(engine.generate(PROMPTS, GREEDY), wanted)


def test_sleeping_is_refused_where_the_platform_cannot(engines: dict[str, Engine]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this platform can")
    with pytest.raises(ConfigError, match="no sleep mode"):
        engines["a"].sleep(1, 10.0)


def test_ranks_fill_side_by_side_and_the_first_exception_is_everybodys(
    engines: dict[str, Engine], fresh: dict[str, Answers], folders: dict[str, Path], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks([engines["a"], engines["b"]], folders["b"])
    ranks.connect()
    ranks.sync(1)
    assert same(engines["a"].generate(PROMPTS, GREEDY), fresh["b"])
    ranks.tell("curse", True)
    error, answer = ranks.both("sync", 2)
    assert isinstance(error, WeightSyncError)
    assert answer == ("error", str(error))
    assert (error.phase, error.version, error.bucket) == ("transfer", 2, 2)
    assert "the second is cursed" in error.cause
    for name in ("a", "b"):
        assert_refuses(engines[name], "the second is cursed")
    ranks.tell("curse", False)
    ranks.sync(2)
    for name in ("a", "b"):
        assert same(engines[name].generate(PROMPTS, GREEDY), fresh["b"])


def test_requests_wait_for_a_sync_and_kept_ones_go_on_with_the_new_weights(
    engines: dict[str, Engine], fresh: dict[str, Answers], folders: dict[str, Path]
) -> None:
    engine = engines["a"]
    long = {**GREEDY, "max_tokens": 120}
    with one_rank([engine], folders["a"], pause_mode="keep") as syncer, ThreadPoolExecutor(2) as pool:
        syncer.connect()
        syncer.sync(1)
        syncer._source.take(read_folder(folders["b"]))  # type: ignore[attr-defined]
        kept = pool.submit(engine.generate, PROMPTS, long)
        time.sleep(0.1)
        asked = threading.Event()

        def ask(bucket: int) -> None:
            if not asked.is_set():
                asked.set()
                waiting.append(pool.submit(engine.generate, PROMPTS, GREEDY))

        waiting: list[Any] = []
        call_on_fill(syncer, ask)
        syncer.sync(2)
        assert same(waiting[0].result(60), fresh["b"])
        (first, *_), *_ = kept.result(60)
        assert (first.version, first.last_version, len(first.token_ids)) == (1, 2, 120)


# Faults that leave the engines usable after the next complete sync.


def test_waiting_for_other_engines_is_not_counted_as_waiting_for_buckets(
    engines: dict[str, Engine], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = engines["b"]
    pause = late.pause

    def pause_late(mode: Any, sync: str, timeout_s: float) -> None:
        time.sleep(2)
        pause(mode, sync, timeout_s)

    with one_rank([engines["a"], late], folders["b"]) as syncer:
        syncer.connect()
        monkeypatch.setattr(late, "pause", pause_late)
        report = syncer.sync(1)
    assert report.pause_s >= 2 > 1 > report.wait_s
