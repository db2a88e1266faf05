"""Claims about real vLLM engines on CPU: what refusals and every fault of a sync leave them in.

Tests share engines; each leaves its own clean or says that the next sync heals them. The last ones cost engines ``a`` and ``b``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from rlsync.coordinator import messages as m
from rlsync.coordinator import state_machine
from rlsync.coordinator.roster import Member
from rlsync.coordinator.state_machine import Coordinator
from rlsync.engine.handles.local import Engine, shared_segments
from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from rlsync.sync.comparison import _Compared
from rlsync.sync.packer import Packed
from rlsync.transport.shm import RingSender
from tests.deadlines import ended_before
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder
from tests.integration.tiny_engines import (
    GREEDY,
    PROMPTS,
    SETTINGS,
    TIMEOUT_S,
    Answers,
    TwoRanks,
    assert_refuses,
    is_stopped,
    one_rank,
    same,
    worker_of,
)  # fmt: skip
from tests.phases import passed_deadline

# The first test waits for all engines to start.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tiny_answers")]


def test_names_shapes_and_gaps_are_one_error_at_connect(tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path]) -> None:
    tensors = read_folder(tiny_folders["b"])
    del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(7, 5)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(128)
    tensors["model.unheard_of.weight"] = torch.zeros(3)
    syncer = WeightSyncer(FolderSource(tensors), [tiny_engines["a"]], SyncConfig(**SETTINGS, timeout_s=60.0))
    with pytest.raises(WeightSyncError) as raised:
        syncer.connect()
    assert raised.value.phase == "connect"
    for words in (
        "layers.1.self_attn.qkv_proj.weight", "model.norm.weight", "layers.0.mlp.down_proj.weight", "o_proj.bias", "model.unheard_of.weight"
    ):  # fmt: skip
        assert words in raised.value.cause, raised.value.cause
    assert "layers.0.self_attn.qkv_proj.weight" not in raised.value.cause
    assert_refuses(tiny_engines["a"], "connection")


def test_a_wrong_token_is_refused(tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = tiny_engines["a"].init_weight_transfer
    monkeypatch.setattr(tiny_engines["a"], "init_weight_transfer", lambda info, timeout_s: real({**info, "token": "guess"}, timeout_s))
    with pytest.raises(WeightSyncError, match="wrong token"):
        one_rank([tiny_engines["a"]], tiny_folders["b"]).connect()


def test_a_missing_worker_is_named(tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_engines["a"], "num_workers", 2)
    missing = pytest.raises(WeightSyncError, match=r"from engine a worker 1, which has not dialled in")
    with passed_deadline("engine a worker 1"), missing:
        one_rank([tiny_engines["a"]], tiny_folders["b"]).connect()


def test_a_stopped_filler_is_found_by_the_deadline_and_a_new_connection_heals(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks([tiny_engines["a"], tiny_engines["b"]], tiny_folders["b"])
    ranks.connect()
    assert ranks.stop_in_sync(1, at=1).bucket == 1
    for name in ("a", "b"):
        assert_refuses(tiny_engines[name], "actor rank 1")
    ranks.close()
    again = two_ranks([tiny_engines["a"], tiny_engines["b"]], tiny_folders["b"])
    again.connect()
    again.sync(1)
    assert all(same(tiny_engines[name].generate(PROMPTS, GREEDY), tiny_answers["b"]) for name in ("a", "b"))


def test_a_killed_filler_is_found_at_once(
    tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path], two_ranks: Callable[..., TwoRanks]
) -> None:
    ranks = two_ranks([tiny_engines["a"]], tiny_folders["b"])
    ranks.connect()
    ranks.kill_in_sync(1, at=1)
    assert_refuses(tiny_engines["a"], "actor rank 1")


def test_workers_leave_a_sync_whose_coordinator_is_gone(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path]
) -> None:
    """As when actor rank 0 is killed: a worker that went on waiting would block its engine for ever."""
    with one_rank([tiny_engines["a"]], tiny_folders["b"], timeout_s=4.0) as syncer:
        syncer.connect()
        call_on_fill(syncer, lambda bucket: syncer._server._stop.set() if bucket == 1 else None)
        with pytest.raises(WeightSyncError, match="nothing was heard from the coordinator"):
            syncer.sync(1)
    assert_refuses(tiny_engines["a"], "coordinator")
    with one_rank([tiny_engines["a"]], tiny_folders["b"]) as syncer:
        syncer.connect()
        syncer.sync(1)
    assert same(tiny_engines["a"].generate(PROMPTS, GREEDY), tiny_answers["b"])


def test_a_bit_that_flips_on_its_way_is_found_in_the_engine_and_the_next_sync_heals(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path]
) -> None:
    with one_rank([tiny_engines["a"]], tiny_folders["b"]) as syncer:
        syncer.connect()
        assert syncer._connection is not None
        packer, pack = syncer._connection.packer, syncer._connection.packer.pack
        ring = syncer._endpoints.senders["shm"]
        assert isinstance(ring, RingSender)

        def flipped(bucket: int, turn: int) -> Packed:
            packed = pack(bucket, turn)
            if bucket == 1:
                ring.slots()[1][0] ^= 1
            return packed

        packer.pack = flipped  # type: ignore[method-assign]
        with pytest.raises(WeightSyncError, match=r"1 of .* verified regions are not what was sent") as raised:
            syncer.sync(1)
        assert (raised.value.phase, raised.value.engine, raised.value.bucket) == ("verify", "a", 1)
        assert_refuses(tiny_engines["a"], "not what was sent")
        packer.pack = pack  # type: ignore[method-assign]
        syncer.sync(1)
    assert same(tiny_engines["a"].generate(PROMPTS, GREEDY), tiny_answers["b"])


def test_checksums_may_follow_their_bucket_and_no_engine_commits_before_they_are_there(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path]
) -> None:
    """As those of weights that are read where they are."""
    with one_rank([tiny_engines["a"]], tiny_folders["b"]) as syncer:
        syncer.connect()
        assert syncer._connection is not None
        packer, pack, sum_up = syncer._connection.packer, syncer._connection.packer.pack, syncer._connection.packer.sum_up
        flips = 0

        def without_sums(bucket: int, turn: int) -> Packed:
            return Packed(pack(bucket, turn).nbytes, None)

        def late(bucket: int, turn: int) -> tuple[m.Sum, ...]:
            time.sleep(0.1)
            return tuple(m.Sum(s.destination, s.region, s.value ^ flips) for s in sum_up(bucket, turn))

        packer.pack, packer.sum_up = without_sums, late  # type: ignore[method-assign]
        syncer.sync(1)
        assert same(tiny_engines["a"].generate(PROMPTS, GREEDY), tiny_answers["b"])
        flips = 1
        with pytest.raises(WeightSyncError, match="verified regions are not what was sent"):
            syncer.sync(2)
        assert_refuses(tiny_engines["a"], "not what was sent")
        flips = 0
        syncer.sync(3)
    assert same(tiny_engines["a"].generate(PROMPTS, GREEDY), tiny_answers["b"])


def test_a_comparison_that_goes_no_further_than_to_connect_is_left_when_another_one_or_an_actor_comes(
    tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path]
) -> None:
    """As of a ``rlsync verify`` that was killed. It leaves the connection beside it alone."""
    engine = tiny_engines["a"]

    def num_rings() -> int:
        """Rings of actors, or of those who compare, that the engine's processes map."""
        mapped = (entry.path for pid in engine.process_ids for entry in psutil.Process(pid).memory_maps(grouped=False))
        return sum(Path(path).name.startswith("rlsync-ring-") for path in mapped)

    def compare_half() -> None:
        source = FolderSource(read_folder(tiny_folders["b"]))
        with WeightSyncer(source, [_Compared(engine)], SyncConfig(**SETTINGS, timeout_s=TIMEOUT_S)) as comparing:
            comparing.connect()

    with one_rank([engine], tiny_folders["b"]) as syncer:
        syncer.connect()
        syncer.sync(1)
        assert num_rings() == 1
        for _ in range(2):
            compare_half()
            assert num_rings() == 2
        syncer.sync(2)
    with one_rank([engine], tiny_folders["b"]) as syncer:
        syncer.connect()
        assert num_rings() == 1
        syncer.sync(1)


def test_a_sync_does_not_meet_what_is_left_of_a_failed_one(
    tiny_engines: dict[str, Engine], tiny_answers: dict[str, Answers], tiny_folders: dict[str, Path]
) -> None:
    """A failed sync leaves its caller before its calls to vLLM are over, and vLLM has one session of an engine's weights."""
    engine = tiny_engines["a"]
    with one_rank([engine], tiny_folders["b"], timeout_s=4.0) as syncer:
        syncer.connect()
        syncer.sync(1)
    info = {"version": 2, "attempt": 1}
    with pytest.raises(Exception, match="the engine is not paused"):
        engine.update_weights(info, 60.0)
    engine.pause("abort", "a sync", 60.0)
    with ThreadPoolExecutor() as threads:
        calls = [threads.submit(engine.update_weights, info, 60.0) for _ in range(2)]
        refused = [str(call.exception()) for call in calls]
    assert all("waiting for the actor's side" in cause for cause in refused), refused
    with one_rank([engine], tiny_folders["b"]) as syncer:
        syncer.connect()
        for version in range(2, 6):
            call_on_fill(syncer, _cursed)
            with pytest.raises(WeightSyncError, match="cursed"):
                syncer.sync(version)
            call_on_fill(syncer, lambda bucket: None)
            syncer.sync(version)
            assert same(engine.generate(PROMPTS, GREEDY), tiny_answers["b"])


def test_no_engine_goes_on_before_the_workers_of_all_have_committed(
    tiny_engines: dict[str, Engine],
    tiny_answers: dict[str, Answers],
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines resume themselves at the end of their updates, which must not end before. One worker's commit is not heard."""
    engines = [tiny_engines["a"], tiny_engines["b"]]
    hear, is_unheard = Coordinator._on_committed, threading.Event()

    def hear_the_first(coordinator: Coordinator, peer: Member, message: m.Committed, now: float) -> None:
        if peer.engine == engines[0].engine_id:
            hear(coordinator, peer, message, now)
        else:
            is_unheard.set()

    with one_rank(engines, tiny_folders["b"]) as syncer:
        syncer.connect()
        syncer.sync(1)
        with monkeypatch.context() as patch:
            patch.setitem(state_machine._HANDLERS, (m.Committed, True), hear_the_first)
            late = passed_deadline(f"engine {engines[1].engine_id} worker", has_failed=is_unheard.is_set)
            with late, pytest.raises(WeightSyncError, match="which was to commit") as failed:
                syncer.sync(2)
        assert (failed.value.phase, failed.value.engine) == ("commit", engines[1].engine_id)
        for engine in engines:
            assert engine.state == "dirty" and engine._calls.run(engine._llm.is_paused(), 60)
        syncer.sync(2)
    for engine in engines:
        assert engine.version == 2 and not engine._calls.run(engine._llm.is_paused(), 60)
        assert same(engine.generate(PROMPTS, GREEDY), tiny_answers["b"])


def _cursed(bucket: int) -> None:
    raise ZeroDivisionError("cursed")


# Faults that cost engines a and b. Keep them last.


def test_a_killed_worker_is_found_at_once(tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path]) -> None:
    with one_rank([tiny_engines["a"], tiny_engines["b"]], tiny_folders["b"]) as syncer:
        syncer.connect()
        call_on_fill(syncer, lambda bucket: worker_of(tiny_engines["a"]).kill() if bucket == 1 else None)
        with ended_before(TIMEOUT_S), pytest.raises(WeightSyncError) as raised:
            syncer.sync(1)
    assert raised.value.engine == "a"
    for name in ("a", "b"):
        assert_refuses(tiny_engines[name], "engine a")


def test_a_stopped_worker_is_found_by_the_deadline_and_nothing_is_left_behind(
    tiny_engines: dict[str, Engine], tiny_folders: dict[str, Path]
) -> None:
    worker = worker_of(tiny_engines["b"])
    processes = [*tiny_engines["a"]._processes.seen, *tiny_engines["b"]._processes.seen]
    segments = shared_segments(processes)
    with one_rank([tiny_engines["b"]], tiny_folders["b"]) as syncer:
        syncer.connect()
        # Of two slots the third bucket finds one free only when the worker has begun to load.
        call_on_fill(syncer, lambda bucket: worker.suspend() if bucket == 2 else None)
        with passed_deadline("engine b worker 0", has_failed=lambda: is_stopped(worker)), pytest.raises(WeightSyncError) as raised:
            syncer.sync(1)
    assert raised.value.engine == "b"
    assert_refuses(tiny_engines["b"], "engine b worker 0")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Engine.close, (tiny_engines["a"], tiny_engines["b"])))
    assert worker in processes and segments
    assert [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert [p for p in os.listdir("/dev/shm") if p.startswith(f"rlsync-ring-{os.getpid()}-")] == []
    assert [p for p in segments if os.path.exists(p)] == []
