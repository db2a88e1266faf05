"""Claims about real vLLM engines that get their weights as gloo messages, from two actor ranks on the same host.

The engine ``tp2`` has two workers, each of which takes its share of every tensor from both ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlsync.engine.handles.local import Engine
from rlsync.errors import WeightSyncError
from tests.deadlines import ended_before, ended_by
from tests.integration.engine_source import call_on_fill, read_folder
from tests.integration.tiny_engines import (
    GREEDY,
    PROMPTS,
    TIMEOUT_S,
    TwoRanks,
    assert_refuses,
    is_stopped,
    same,
    transformers_answers,
    worker_of,
)
from tests.phases import passed_deadline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tiny_folders: dict[str, Path]) -> dict[str, Path]:
    """Two checkpoints of one model."""
    return {"a": tiny_folders["llama"], "b": tiny_folders["other llama"]}


@pytest.fixture(scope="module")
def wanted(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: transformers_answers(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def engines(tiny_engines: dict[str, Engine]) -> dict[str, Engine]:
    if "tp2" not in tiny_engines:
        pytest.skip("tensor parallelism needs two GPUs")
    return {name: tiny_engines[name] for name in ("llama", "tp2")}


@pytest.fixture
def two_ranks(engines: dict[str, Engine], folders: dict[str, Path], two_ranks: Callable[..., TwoRanks]) -> Callable[..., TwoRanks]:
    def make(*names: str, **settings: Any) -> TwoRanks:
        settings = {"transport": "gloo", "verify": "full", **settings}
        made = two_ranks([engines[name] for name in names], folders["b"], **settings)
        made.connect()
        return made

    return make


def answers(engine: Engine) -> Any:
    return engine.generate(PROMPTS, GREEDY)


def take(ranks: TwoRanks, folder: Path) -> None:
    ranks.source.take(read_folder(folder))
    ranks.tell("read", str(folder))


def test_engines_answer_like_transformers_and_each_worker_gets_what_it_holds(
    engines: dict[str, Engine], folders: dict[str, Path], wanted: dict[str, Any], two_ranks: Callable[..., TwoRanks]
) -> None:
    assert not same(wanted["a"], wanted["b"])
    ranks = two_ranks("llama", "tp2")
    for version, name in ((1, "b"), (2, "b"), (3, "a")):
        take(ranks, folders[name])
        report = ranks.sync(version)
        assert all(same(answers(engine), wanted[name]) for engine in engines.values()), (version, name)
    whole = sum(t.nbytes for t in read_folder(folders["b"]).values())
    assert report.transport == "gloo"
    assert report.max_redundancy == 1.0
    assert len(report.redundancy) == 3
    assert 2 * whole < report.bytes < 3 * whole, "once the single worker, and the two halves with what both hold"
    assert report.extra_bytes > 0
    assert report.link_gb_per_s is None


def test_an_exception_of_one_rank_costs_one_sync(
    engines: dict[str, Engine], wanted: dict[str, Any], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks("llama", "tp2")
    ranks.tell("fault", ("curse", 2))
    error, answer = ranks.both("sync", 1)
    assert isinstance(error, WeightSyncError)
    assert answer == ("error", str(error))
    assert (error.phase, error.bucket) == ("transfer", 2)
    for engine in engines.values():
        assert_refuses(engine, "the second is cursed")
    ranks.tell("no fault")
    ranks.sync(1)
    assert all(same(answers(engine), wanted["b"]) for engine in engines.values())


@pytest.mark.parametrize("bucket", [0, 2])
def test_a_stopped_rank_is_found_by_the_deadline_and_the_next_sync_is_right(
    engines: dict[str, Engine], wanted: dict[str, Any], two_ranks: Callable[..., TwoRanks], bucket: int
) -> None:
    ranks = two_ranks("llama", "tp2")
    ranks.stop_in_sync(1, at=bucket)
    for engine in engines.values():
        assert_refuses(engine, "actor rank 1")
    ranks.tell("no fault")
    ranks.sync(1)
    assert all(same(answers(engine), wanted["b"]) for engine in engines.values())


def test_a_killed_rank_is_found_at_once_and_a_new_connection_heals(
    engines: dict[str, Engine], wanted: dict[str, Any], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks("llama", "tp2")
    ranks.kill_in_sync(1, at=2)
    for engine in engines.values():
        assert_refuses(engine, "actor rank 1")
    with pytest.raises(WeightSyncError, match=r"connect\(\) anew"):
        ranks.syncer.sync(2)
    ranks.close()
    two_ranks("llama", "tp2").sync(1)
    assert all(same(answers(engine), wanted["b"]) for engine in engines.values())


def test_workers_leave_a_sync_whose_coordinator_is_gone(engines: dict[str, Engine], two_ranks: Callable[..., TwoRanks]) -> None:
    ranks = two_ranks("llama", "tp2", timeout_s=4.0)
    server = ranks.syncer._server
    assert server is not None

    def let_go(at: int) -> None:
        if at == 1:
            server._stop.set()
            # Workers give up before this call is as old as their patience: neither end is news of the coordinator.
            time.sleep(2)

    call_on_fill(ranks.syncer, let_go)
    ranks.pipe.send(("sync", 1))
    with ended_by(4.0), pytest.raises(WeightSyncError, match="nothing was heard from the coordinator"):
        ranks.syncer.sync(1)
    ranks.close()
    # Engines that still were inside would not answer a new connection before its deadline.
    two_ranks("llama", "tp2").sync(1)
    assert engines["llama"].state == engines["tp2"].state == "clean"


# Faults that cost the engine. Keep them last.


def test_a_stopped_worker_is_found_by_the_deadline(
    engines: dict[str, Engine], wanted: dict[str, Any], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks("llama", "tp2")
    worker = worker_of(engines["llama"])
    call_on_fill(ranks.syncer, lambda at: worker.suspend() if at == 2 else None)
    with passed_deadline("engine llama worker 0", has_failed=lambda: is_stopped(worker)):
        error, answer = ranks.both("sync", 1)
    worker.resume()
    assert isinstance(error, WeightSyncError)
    assert answer == ("error", str(error))
    assert (error.engine, error.phase) == ("llama", "transfer")
    for engine in engines.values():
        assert_refuses(engine, "engine llama worker 0")


def test_a_killed_worker_is_found_at_once_and_nothing_is_left_behind(
    engines: dict[str, Engine], tiny_engines: dict[str, Engine], two_ranks: Callable[..., TwoRanks]
) -> None:
    """No engine of the session is needed after it."""
    ranks = two_ranks("llama", "tp2")
    worker = worker_of(engines["tp2"])
    call_on_fill(ranks.syncer, lambda at: worker.kill() if at == 2 else None)
    with ended_before(TIMEOUT_S):
        error, answer = ranks.both("sync", 1)
    assert isinstance(error, WeightSyncError)
    assert answer == ("error", str(error))
    assert error.engine == "tp2"
    ranks.close()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Engine.close, tiny_engines.values()))
    assert [p for p in psutil.Process().children(recursive=True) if "VLLM" in "".join(p.cmdline())] == []
    assert [name for name in os.listdir("/dev/shm") if name.startswith(f"rlsync-ring-{os.getpid()}-")] == []
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [c for c in listening if c.laddr.ip != "127.0.0.1"] == []
