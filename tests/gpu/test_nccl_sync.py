"""Real vLLM engines that get their weights over NCCL, from actor ranks on GPUs of their own; and every way in which that can fail."""

from __future__ import annotations

import faulthandler
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from rlsync.engine.handles.local import Engine
from rlsync.engine.state import state_difference
from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from tests.gpu.engines import KV_CACHE_BYTES
from tests.gpu.nccl_engine_rank import serve
from tests.gpu.test_ipc_sync import CudaSource, connected, state, told
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder
from tests.integration.sink_models import save_case

CASE = "qwen2-bfloat16"
TIMEOUT_S = 20.0
SLACK_S = 6.0


@pytest.fixture(autouse=True)
def stacks() -> Iterator[None]:
    """Of a test that is stuck, before pytest ends it."""
    faulthandler.dump_traceback_later(100)
    yield
    faulthandler.cancel_dump_traceback_later()
    torch.cuda.set_device(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_case(tmp_path_factory.mktemp(CASE) / name, CASE, name) for name in "ab"}


def start(name: str, folder: Path) -> Engine:
    """On the first GPU."""
    engine = Engine(name, {
        "model": str(folder), "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": KV_CACHE_BYTES, "enforce_eager": True,
    })  # fmt: skip
    engine.start()
    return engine


@pytest.fixture(scope="module")
def started(folders: dict[str, Path]) -> Iterator[tuple[Engine, dict[str, dict[str, str]]]]:
    """An engine, and the states of fresh ones of each version, of which it is the second."""
    engine = start("fresh", folders["a"])
    found = {"a": state(engine)}
    engine.close()
    engine = start("far", folders["b"])
    found["b"] = state(engine)
    assert state_difference(found["a"], found["b"]), "the two versions differ"
    yield engine, found
    engine.close()


@pytest.fixture(scope="module")
def engine(started: tuple[Engine, dict[str, dict[str, str]]]) -> Engine:
    return started[0]


@pytest.fixture(scope="module")
def fresh(started: tuple[Engine, dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    return started[1]


def source_on(gpu: int, folder: Path) -> CudaSource:
    return CudaSource(folder, f"cuda:{gpu}")


@pytest.mark.gpu(2)
@pytest.mark.timeout(120, func_only=True)
@pytest.mark.parametrize("sink", ["auto", "layerwise", "loaders"])
@pytest.mark.parametrize("bucket_bytes", [100_000, 10**7])
def test_a_synced_engine_holds_what_a_fresh_one_holds(engine, folders, fresh, sink, bucket_bytes):
    source = source_on(1, folders["a"])
    with connected(source, engine, transport="nccl", sink=sink, bucket_bytes=bucket_bytes) as syncer:
        for version, name in enumerate("abab"):
            source.take(read_folder(folders[name]))
            torch.cuda.synchronize()
            report = syncer.sync(version)
            assert state_difference(state(engine), fresh[name]) == (), (sink, name)
            print(f"\n{sink} {bucket_bytes}: {told(report)}")
        assert report.transport == "nccl" and report.max_redundancy == 1.0
        assert (report.num_buckets == 1) == (sink == "auto" or bucket_bytes == 10**7)


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_memory_that_has_moved_is_sent_from_where_it_is(engine, folders, fresh):
    source = source_on(1, folders["a"])
    with connected(source, engine, transport="nccl") as syncer:
        for version, name in enumerate("aba"):
            source.move(folders[name])
            syncer.sync(version)
            assert state_difference(state(engine), fresh[name]) == (), name


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_other_precisions_are_cast_before_they_are_sent(engine, folders, fresh):
    torch.cuda.set_device(1)
    source = FolderSource({name: t.float().cuda() for name, t in read_folder(folders["b"]).items()})
    with connected(source, engine, transport="nccl") as syncer:
        syncer.sync(0)
        assert state_difference(state(engine), fresh["b"]) == ()


@pytest.mark.gpu(1)
@pytest.mark.timeout(120)
def test_two_members_on_one_gpu_are_refused(engine, folders):
    source = source_on(0, folders["a"])
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    with pytest.raises(WeightSyncError, match=rf"engine far worker 0 .*actor rank 0 .*share the GPU .*{re.escape(uuid)}"):
        connected(source, engine, transport="nccl")


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
@pytest.mark.parametrize("num_buckets", ["one", "several"])
def test_the_sync_after_a_failed_one_is_right(engine, folders, fresh, num_buckets):
    """The actor fails after it has begun to send, or before; the group is given up, and the next one has another number."""
    source = source_on(1, folders["b"])
    sink = "auto" if num_buckets == "one" else "layerwise"
    with connected(source, engine, transport="nccl", sink=sink) as syncer:
        syncer.sync(0)
        failing = 0 if num_buckets == "one" else 3

        def boom(bucket: int) -> None:
            if bucket == failing:
                raise ZeroDivisionError("cursed")

        call_on_fill(syncer, boom)
        begin_s = time.monotonic()
        with pytest.raises(WeightSyncError, match="cursed"):
            syncer.sync(1)
        took_s = time.monotonic() - begin_s
        assert engine.state == "dirty"
        call_on_fill(syncer, lambda bucket: None)
        begin_s = time.monotonic()
        report = syncer.sync(1)
        print(f"\nfailed in {took_s:.2f} s, right in {time.monotonic() - begin_s:.2f} s: {told(report)}")
        assert took_s < 10
        assert state_difference(state(engine), fresh["b"]) == ()


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_a_filler_that_hangs_is_found_by_the_deadline(engine, folders, fresh):
    source = source_on(1, folders["a"])
    with connected(source, engine, transport="nccl", timeout_s=8.0) as syncer:
        syncer.sync(0)
        call_on_fill(syncer, lambda bucket: time.sleep(12))
        begin_s = time.monotonic()
        with pytest.raises(WeightSyncError) as raised:
            syncer.sync(1)
        took_s = time.monotonic() - begin_s
        print(f"\nended in {took_s:.2f} s: {raised.value}")
        assert took_s < 8.0 + SLACK_S
        time.sleep(max(0.0, 13 - took_s))
        call_on_fill(syncer, lambda bucket: None)
        syncer.sync(1)
        assert state_difference(state(engine), fresh["a"]) == ()


@pytest.mark.gpu(3)
@pytest.mark.timeout(120)
def test_a_killed_actor_rank_is_found_and_a_new_connection_heals(engine, folders, fresh):
    settings = {"bucket_bytes": 100_000, "timeout_s": TIMEOUT_S, "transport": "nccl", "verify": "full"}
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    second = context.Process(target=serve, args=(other, str(folders["b"]), 2, settings, 60.0), daemon=True)
    second.start()
    torch.cuda.set_device(1)
    tensors = {name: t.cuda() for name, t in read_folder(folders["b"]).items()}

    def tell(payload: bytes) -> bytes:
        pipe.send(payload)
        return payload

    source = FolderSource(tensors, rank=0, world_size=2)
    syncer = WeightSyncer(source, [engine], SyncConfig(**settings), rank=0, world_size=2, broadcast=tell)
    syncer.connect()
    report = syncer.sync(0)
    print(f"\ntwo actor ranks: {told(report)}")
    assert state_difference(state(engine), fresh["b"]) == ()
    killer = threading.Timer(1.5, second.kill)
    killer.start()
    begin_s = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"the process of actor rank 1 .* has ended") as raised:
        syncer.sync(1)
    took_s = time.monotonic() - begin_s
    print(f"ended in {took_s:.2f} s: {raised.value}")
    assert took_s < 1.5 + SLACK_S
    syncer.close()
    with connected(source_on(1, folders["a"]), engine, transport="nccl") as healed:
        healed.sync(0)
    assert state_difference(state(engine), fresh["a"]) == ()


# It costs the engine. Keep it last.


@pytest.mark.gpu(2)
@pytest.mark.timeout(120)
def test_a_killed_worker_is_found_and_the_actor_goes_on(engine, folders):
    source = source_on(1, folders["a"])
    syncer = connected(source, engine, transport="nccl", timeout_s=TIMEOUT_S)
    syncer.sync(0)
    # A single worker is in the process of the engine's core.
    core = psutil.Process(engine._llm.engine_core.resources.engine_manager.processes[0].pid)
    call_on_fill(syncer, lambda bucket: core.kill())
    begin_s = time.monotonic()
    with pytest.raises(WeightSyncError, match="engine far") as raised:
        syncer.sync(1)
    took_s = time.monotonic() - begin_s
    print(f"\nended in {took_s:.2f} s: {raised.value}")
    assert took_s < TIMEOUT_S + SLACK_S
    syncer.close()
    # What waited on the device for the dead worker has let go of it.
    begin_s = time.monotonic()
    while not torch.cuda.current_stream().query():
        assert time.monotonic() - begin_s < 10
        time.sleep(0.01)
    assert float(torch.ones(1000, device="cuda:1").sum()) == 1000
