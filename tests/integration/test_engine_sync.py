"""Claims about real vLLM engines on CPU: what a sync makes of them. What faults leave is in ``test_engine_sync_faults``."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from vllm.distributed.device_communicators import shm_broadcast

from rlsync.engine.compat.engine import core_processes, sleep_between_looks
from rlsync.engine.handles.local import Engine
from rlsync.errors import ConfigError, WeightSyncError
from tests.deadlines import HANG_S
from tests.integration.engine_source import call_on_fill, read_folder
from tests.integration.held_requests import hold
from tests.integration.tiny_engines import (
    GREEDY,
    PROMPTS,
    Answers,
    TwoRanks,
    assert_refuses,
    one_rank,
    same,
    transformers_answers,
    worker_of,
)  # fmt: skip
from tests.ranks import make_process

# The first test waits for all engines to start.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_answers")]


def test_the_two_checkpoints_answer_differently(tiny_answers: dict[str, Answers]) -> None:
    assert not same(tiny_answers["a"], tiny_answers["b"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM starts processes on GPUs as it does without rlsync")
def test_engines_on_cpu_are_forked_from_one_process_that_has_imported_vllm(tiny_engines: dict[str, Engine]) -> None:
    cores = [psutil.Process(process.pid) for engine in tiny_engines.values() for process in core_processes(engine._llm)]
    (parent,) = {core.parent() for core in cores}
    assert parent is not None and parent != psutil.Process()
    assert parent.create_time() < min(core.create_time() for core in cores)


def test_processes_of_engines_on_cpu_sleep_between_looks_for_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM yields instead, and looks again at once. In this process, as in theirs."""
    monkeypatch.setattr(shm_broadcast, "sched_yield", shm_broadcast.sched_yield)
    sleep_between_looks()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    just_read = SimpleNamespace(is_reader=True, busy_loop_s=3600, last_read=time.monotonic())
    shm_broadcast.SpinCondition.wait(just_read)
    assert len(slept) == 1 and 0 < slept[0] < 0.001


def count_looks_for_kernels(pipe: Connection) -> None:
    """Of a worker that begins in this process: how often all modules are looked through, and what stands in the place of a kernel."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher
    from vllm.v1.worker import block_table

    looks: list[Any] = []
    dispatcher._rebind_kernels = looks.append
    current_platform.register_triton_kernel_overrides()
    pipe.send((len(looks), type(block_table.ComputeSlotMappingKernel.kernel) is dispatcher.KernelOverride))


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM has kernels for GPUs")
def test_workers_on_cpu_are_forked_with_their_kernels_overridden() -> None:
    pipe, other = multiprocessing.Pipe()
    process = make_process(count_looks_for_kernels, other)
    process.start()
    assert pipe.poll(HANG_S) and pipe.recv() == (0, True)
    process.join()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the groups of engines on GPUs are made as vLLM makes them")
def test_groups_of_a_worker_on_cpu_share_a_thread(tiny_engines: dict[str, Engine]) -> None:
    (core,) = core_processes(tiny_engines["tp2"]._llm)
    for worker in psutil.Process(core.pid).children(recursive=True):
        names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{worker.pid}/task").iterdir()]
        assert names.count("gloo_tcp_loop") == 1


@pytest.mark.parametrize(
    ("prompts", "wrong"), [([[1], [1, 131]], "[1, 131]"), ([[-1]], "[-1]"), ([[]], "[]"), (["ab"], "'ab'"), ([[1.5]], "[1.5]")]
)
def test_a_prompt_of_no_tokens_is_refused_and_the_engine_goes_on(tiny_engines: dict[str, Engine], prompts: Any, wrong: str) -> None:
    """In vLLM, which has no tokenizer to ask here, the id after the last ends the worker."""
    with pytest.raises(ConfigError, match=re.escape(f"one or more token ids from 0 to 130, and not {wrong}")):
        tiny_engines["a"].generate(prompts, GREEDY)
    ((answer,),) = tiny_engines["a"].generate([np.array([1, 130])], GREEDY)
    assert answer.token_ids


def test_an_engine_is_started_once_and_takes_a_seed_for_each_prompt(tiny_engines: dict[str, Engine]) -> None:
    engine = tiny_engines["a"]
    processes = engine.process_ids
    with pytest.raises(ConfigError, match="engine a is started already"):
        engine.start()
    with pytest.raises(ConfigError, match="engine a: 1 seeds for 2 prompts"):
        engine.generate([[1], [2]], GREEDY, seeds=[1])
    ((longer,), (shorter,)) = engine.generate([[1], [2]], [GREEDY, {**GREEDY, "max_tokens": 3, "logprobs": None}])
    assert (len(longer.logprobs), len(shorter.token_ids), shorter.logprobs) == (GREEDY["max_tokens"], 3, ())
    assert engine.process_ids == processes and engine.failure_reason() is None


def test_a_synced_engine_answers_like_a_fresh_one(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path]
) -> None:
    """Also: two engines by one sync, the same weights again, and back to what an engine was started with."""
    with one_rank([tiny_engines["a"], tiny_engines["b"]], tiny_folders["b"]) as syncer:
        syncer.connect()
        for version in (1, 2, 3):
            report = syncer.sync(version)
            answers = [tiny_engines[name].generate(PROMPTS, GREEDY) for name in ("a", "b")]
            assert same(answers[0], tiny_answers["b"])
            assert same(answers[1], tiny_answers["b"])
            assert {c.version for answer in answers[0] for c in answer} == {version}
            assert report.num_buckets > 3
            assert report.bytes == sum(t.nbytes for t in read_folder(tiny_folders["b"]).values()), "two engines, one stream"
        syncer._source.take(read_folder(tiny_folders["a"]))  # type: ignore[attr-defined]
        syncer.sync(4)
        assert all(same(tiny_engines[name].generate(PROMPTS, GREEDY), tiny_answers["a"]) for name in ("a", "b"))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_tied_engine_without_weights_answers_like_transformers(
    tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path], num_slots: int
) -> None:
    if num_slots == 1:
        assert_refuses(tiny_engines["llama"], "dummy")
    with one_rank([tiny_engines["llama"]], tiny_folders["llama"], num_slots=num_slots) as syncer:
        syncer.connect()
        assert "lm_head.weight" not in {t.name for t in syncer._source.tensors}
        for version in (1, 2):
            syncer.sync(version)
            assert same(tiny_engines["llama"].generate(PROMPTS, GREEDY), transformers_answers(tiny_folders["llama"]))


def test_an_engine_with_two_workers_answers_like_transformers(tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path]) -> None:
    """Each worker takes its share of every tensor: one bucket table serves all."""
    if "tp2" not in tiny_engines:
        pytest.skip("tensor parallelism needs two GPUs")
    assert_refuses(tiny_engines["tp2"], "dummy")
    with one_rank([tiny_engines["tp2"], tiny_engines["llama"]], tiny_folders["llama"]) as syncer:
        syncer.connect()
        syncer.sync(1)
        wanted = transformers_answers(tiny_folders["llama"])
        assert all(same(tiny_engines[name].generate(PROMPTS, GREEDY), wanted) for name in ("tp2", "llama"))


@pytest.mark.parametrize("name", ["a", "llama", "tp2"])
def test_a_sync_leaves_no_weight_update_open_and_ends_one_that_is(
    tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path], name: str
) -> None:
    """One that failed, one that nobody waited for, one that somebody began and gave up."""
    if name not in tiny_engines:
        pytest.skip("tensor parallelism needs two GPUs")
    engine, folder = tiny_engines[name], tiny_folders["b" if name == "a" else "llama"]
    with one_rank([engine], folder) as syncer:
        syncer.connect()
        engine.pause("abort", "a sync", 10)
        with pytest.raises(Exception, match="joined attempt 98, which the actor has not started"):
            engine.update_weights({"version": 1, "attempt": 98}, 10)
        # The call cannot be over before it is given up.
        worker = worker_of(engine)
        worker.suspend()
        with pytest.raises(TimeoutError):
            engine.update_weights({"version": 1, "attempt": 99}, 0.1)
        worker.resume()
        syncer.sync(1)
        wanted = engine.generate(PROMPTS, GREEDY)
        # Workers that refused to begin another one would leave their executor with answers that it takes for others.
        engine._calls.run(engine._llm.start_weight_update(), 10)
        for version in (2, 3):
            syncer.sync(version)
            assert same(engine.generate(PROMPTS, GREEDY), wanted)


def test_sleeping_is_refused_where_the_platform_cannot(tiny_engines: dict[str, Engine]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this platform can")
    with pytest.raises(ConfigError, match="no sleep mode"):
        tiny_engines["a"].sleep(1, 10.0)


def test_ranks_fill_side_by_side_and_the_first_exception_is_everybodys(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks([tiny_engines["a"], tiny_engines["b"]], tiny_folders["b"])
    ranks.connect()
    ranks.sync(1)
    assert same(tiny_engines["a"].generate(PROMPTS, GREEDY), tiny_answers["b"])
    ranks.tell("fault", ("curse", 2))
    error, answer = ranks.both("sync", 2)
    assert isinstance(error, WeightSyncError)
    assert answer == ("error", str(error))
    assert (error.phase, error.version, error.bucket) == ("transfer", 2, 2)
    assert "the second is cursed" in error.cause
    for name in ("a", "b"):
        assert_refuses(tiny_engines[name], "the second is cursed")
    ranks.tell("no fault")
    ranks.sync(2)
    for name in ("a", "b"):
        assert same(tiny_engines[name].generate(PROMPTS, GREEDY), tiny_answers["b"])


def test_requests_wait_for_a_sync_and_kept_ones_go_on_with_the_new_weights(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path]
) -> None:
    engine = tiny_engines["a"]
    long = {**GREEDY, "max_tokens": 40}
    with one_rank([engine], tiny_folders["a"], pause_mode="keep") as syncer, ThreadPoolExecutor(2) as pool:
        syncer.connect()
        syncer.sync(1)
        syncer._source.take(read_folder(tiny_folders["b"]))  # type: ignore[attr-defined]
        kept = hold(engine, len(PROMPTS), len(PROMPTS), lambda: pool.submit(engine.generate, PROMPTS, long))
        asked = threading.Event()

        def ask(bucket: int) -> None:
            if not asked.is_set():
                asked.set()
                waiting.append(pool.submit(engine.generate, PROMPTS, GREEDY))

        waiting: list[Any] = []
        call_on_fill(syncer, ask)
        syncer.sync(2)
        assert same(waiting[0].result(60), tiny_answers["b"])
        (first, *_), *_ = kept.result(60)
        assert (first.version, first.last_version, len(first.token_ids)) == (1, 2, 40)


def test_waiting_for_other_engines_is_not_counted_as_waiting_for_buckets(
    tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = tiny_engines["b"]
    pause = late.pause

    def pause_late(*arguments: Any) -> None:
        time.sleep(2)
        pause(*arguments)

    with one_rank([tiny_engines["a"], late], tiny_folders["b"]) as syncer:
        syncer.connect()
        monkeypatch.setattr(late, "pause", pause_late)
        report = syncer.sync(1)
    assert report.pause_s >= 2
    assert report.pause_s + report.wait_s <= report.seconds
