"""Engines that read the actor's GPU memory through CUDA IPC: in place and through the staging ring, wherever the memory moves to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlsync.engine.handles.local import Engine
from rlsync.engine.state import state_difference
from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from rlsync.transport.ipc import IpcExporter
from tests.gpu.engines import KV_CACHE_BYTES
from tests.inspection import inspect_engines
from tests.integration.engine_source import FolderSource, read_folder
from tests.integration.sink_models import save_case

CASES = {"qwen2-bfloat16": "direct", "moe-bfloat16": "direct"}


class CudaSource(FolderSource):
    """Tensors of a folder in one buffer on a GPU, as Megatron's distributed optimizer keeps them; other folders go to the same memory."""

    def __init__(self, folder: Path, device: str) -> None:
        tensors = read_folder(folder)
        super().__init__(tensors)
        self._spread(tensors, torch.device(device))

    def _spread(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        torch.cuda.set_device(device)
        sizes = {name: -(-t.nbytes // 256) * 256 for name, t in tensors.items()}
        # More than one segment of the allocator, and with something else in it.
        memory = torch.empty(sum(sizes.values()) + 32 * 2**20, dtype=torch.uint8, device=device)
        self.memory, cursor = memory, 0
        for name, tensor in tensors.items():
            place = memory[cursor : cursor + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor)
            if name in self.buffers and self.buffers[name].is_cuda:
                self.buffers[name].data = place
            else:
                self.buffers[name] = place
            cursor += sizes[name]

    def move(self, folder: Path) -> None:
        """Other values in other memory, under the same tensor objects; what was there before is overwritten and given back."""
        before = self.memory
        self._spread(read_folder(folder), before.device)
        before.fill_(0x5A)
        del before
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", params=CASES)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Engine, dict[str, Path], dict[str, dict[str, str]]]]:
    """A case, an engine, folders of two versions, and the state of fresh engines of each."""
    case, folders, fresh = request.param, {}, {}
    for name in "ab":
        folders[name] = save_case(tmp_path_factory.mktemp(case) / name, case, name)
        engine = Engine(f"{case} {name}", {
            "model": str(folders[name]), "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 8, "skip_tokenizer_init": True,
            "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": KV_CACHE_BYTES, "enforce_eager": name == "b",
        })  # fmt: skip
        engine.start()
        fresh[name] = state(engine)
        if name == "a":
            engine.close()
    assert state_difference(fresh["a"], fresh["b"]), "the two versions differ"
    yield case, engine, folders, fresh
    engine.close()


def state(engine: Engine) -> dict[str, str]:
    return inspect_engines([engine])[engine.engine_id, 0]


def connected(source: FolderSource, engine: Engine, **config: object) -> WeightSyncer:
    options: dict[str, object] = {"bucket_bytes": 100_000, "timeout_s": 20, "transport": "ipc", "verify": "full"}
    syncer = WeightSyncer(source, [engine], SyncConfig(**{**options, **config}))  # type: ignore[arg-type]
    syncer.connect()
    return syncer


def told(report: SyncReport) -> str:
    return (
        f"{report.transport} {report.sinks} {report.num_buckets} buckets: {report.seconds * 1e3:.1f} ms (pause {report.pause_s * 1e3:.1f}, "
        f"begin {report.begin_s * 1e3:.1f}, transfer {report.transfer_s * 1e3:.1f}: wait {report.wait_s * 1e3:.1f} "
        f"pull {report.pull_s * 1e3:.2f} "
        f"verify {report.verify_s * 1e3:.2f} finalize {report.finalize_s * 1e3:.2f}; commit {report.commit_s * 1e3:.1f}, "
        f"resume {report.resume_s * 1e3:.1f}), extra {report.extra_bytes} B, {report.bytes_by_link}"
    )


@pytest.mark.gpu(1)
@pytest.mark.parametrize("staging", ["auto", "always"])
@pytest.mark.parametrize("sink", ["auto", "layerwise", "loaders"])
def test_a_synced_engine_holds_what_a_fresh_one_holds(world, staging, sink):
    case, engine, folders, fresh = world
    source = CudaSource(folders["a"], "cuda:0")
    with connected(source, engine, staging=staging, sink=sink) as syncer:
        for version, name in enumerate("abab"):
            source.take(read_folder(folders[name]))
            report = syncer.sync(version)
            assert report.transport == "ipc"
            assert (report.num_buckets == 1) == (staging == "auto" and sink == "auto")
            assert report.bytes_by_link["same device"] == report.bytes == sum(report.bytes_by_link.values())
            assert state_difference(state(engine), fresh[name]) == (), (staging, sink, name)
        assert report.sinks == ((CASES[case],) if sink == "auto" else (sink,))
    print(f"\n{case} {staging}: {told(report)}")


@pytest.mark.gpu(2)
def test_memory_of_another_gpu_is_read_over_the_link(world):
    _, engine, folders, fresh = world
    source = CudaSource(folders["a"], "cuda:1")
    with connected(source, engine) as syncer:
        report = syncer.sync(0)
        assert report.bytes_by_link["same host"] == report.bytes
        assert state_difference(state(engine), fresh["a"]) == ()
    torch.cuda.set_device(0)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("stays", [True, False])
def test_memory_that_has_moved_is_found_where_it_is(world, stays):
    _, engine, folders, fresh = world
    source = CudaSource(folders["a"], "cuda:0")
    source.stable_memory = stays
    with connected(source, engine) as syncer:
        for version, name in enumerate("abab"):
            before = source.memory.data_ptr()
            source.move(folders[name])
            print(f"\nmemory {before:#x} -> {source.memory.data_ptr():#x}")
            report = syncer.sync(version)
            assert state_difference(state(engine), fresh[name]) == (), name
    print(f"stays {stays}: {told(report)}")


@pytest.mark.gpu(1)
def test_memory_taken_again_at_the_same_address_is_not_mistaken_for_the_old(world):
    _, engine, folders, fresh = world
    source = CudaSource(folders["a"], "cuda:0")
    with connected(source, engine) as syncer:
        syncer.sync(0)
        storage = source.memory.untyped_storage()
        for version in range(1, 6):
            address, nbytes, values = storage.data_ptr(), storage.nbytes(), source.memory.cpu()
            storage.resize_(0)
            torch.cuda.empty_cache()
            storage.resize_(nbytes)
            source.memory.copy_(values)
            name = "ab"[version % 2]
            source.take(read_folder(folders[name]))
            print(f"\n{address:#x} -> {storage.data_ptr():#x}")
            syncer.sync(version)
            assert state_difference(state(engine), fresh[name]) == (), name


@pytest.mark.gpu(1)
def test_a_reader_that_is_not_told_of_a_move_is_found_out(world, monkeypatch):
    """The control of the tests above: without the generation a sync is refused by its checksums, and the engine by the gate."""
    _, engine, folders, fresh = world
    source = CudaSource(folders["a"], "cuda:0")
    with connected(source, engine) as syncer:
        syncer.sync(0)
        kept = source.memory
        with monkeypatch.context() as patched:
            patched.setattr(IpcExporter, "renewed", lambda self: None)
            source._spread(read_folder(folders["b"]), kept.device)
            with pytest.raises(WeightSyncError, match="are not what was sent") as failure:
                syncer.sync(1)
            assert failure.value.phase == "verify" and engine.state == "dirty"
        syncer.sync(2)
        assert state_difference(state(engine), fresh["b"]) == ()


@pytest.mark.gpu(1)
def test_parameters_without_memory_are_refused_and_the_next_sync_is_right(world):
    _, engine, folders, fresh = world
    source = CudaSource(folders["a"], "cuda:0")
    with connected(source, engine) as syncer:
        storage = source.memory.untyped_storage()
        nbytes = storage.nbytes()
        storage.resize_(0)
        with pytest.raises(WeightSyncError, match="onload them first"):
            syncer.sync(0)
        storage.resize_(nbytes)
        source.take(read_folder(folders["b"]))
        syncer.sync(1)
        assert state_difference(state(engine), fresh["b"]) == ()


@pytest.mark.gpu(1)
def test_other_precisions_are_cast_on_the_way(world):
    _, engine, folders, fresh = world
    for staging in ("auto", "always"):
        tensors = {name: t.float() for name, t in read_folder(folders["a"]).items()}
        source = FolderSource({name: t.cuda() for name, t in tensors.items()})
        with connected(source, engine, staging=staging) as syncer:
            syncer.sync(0)
            assert state_difference(state(engine), fresh["a"]) == (), staging


@pytest.mark.gpu(1)
def test_memory_of_expandable_segments_goes_through_the_ring(world):
    _, engine, folders, fresh = world
    torch.cuda.empty_cache()
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    try:
        source = CudaSource(folders["a"], "cuda:0")
        with connected(source, engine) as syncer:
            report = syncer.sync(0)
            print(f"\n{told(report)}")
            assert report.num_buckets > 1
            assert state_difference(state(engine), fresh["a"]) == ()
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


@pytest.mark.gpu(1)
def test_parameters_that_move_where_nobody_can_map_them_are_refused_and_a_new_connection_takes_the_ring(world):
    _, engine, folders, fresh = world
    torch.cuda.empty_cache()
    source = CudaSource(folders["a"], "cuda:0")
    try:
        with connected(source, engine) as syncer:
            assert syncer.sync(0).num_buckets == 1
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
            source.move(folders["b"])
            with pytest.raises(WeightSyncError, match=r"other processes cannot map .* connect\(\) anew"):
                syncer.sync(1)
        with connected(source, engine) as syncer:
            assert syncer.sync(1).num_buckets > 1
            assert state_difference(state(engine), fresh["b"]) == ()
    finally:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


@pytest.mark.gpu(2)
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_weights_that_leave_between_syncs_are_staged_where_they_are_on_another_gpu(world, device):
    """To map them there anew in every sync takes the driver longer than all else."""
    _, engine, folders, fresh = world
    source = CudaSource(folders["a"], device)
    source.stable_memory = False
    with connected(source, engine) as syncer:
        for version, name in enumerate("abab"):
            source.move(folders[name])
            report = syncer.sync(version)
            assert state_difference(state(engine), fresh[name]) == (), name
            assert report.staged_bytes == (0 if device == "cuda:0" else report.bytes)
            assert (report.num_buckets == 1) == (device == "cuda:0")
    print(f"\n{device}: {told(report)}")
    torch.cuda.set_device(0)
