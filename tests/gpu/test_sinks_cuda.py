"""Every sink on a real vLLM engine on CUDA leaves the state of a fresh engine: to another version and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlsync.engine.handles.local import Engine
from rlsync.engine.state import state_difference
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from tests.gpu.engines import start
from tests.inspection import inspect_engines
from tests.integration.engine_source import FolderSource, read_folder
from tests.integration.sink_models import save_case
from tests.ranks import run_ranks

PROMPTS = [[5, 17, 99, 3], [130, 2, 64], [7] * 12]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


def give(engine: Engine, folder: Path, sink: str, version: int) -> SyncReport:
    with WeightSyncer(
        FolderSource(read_folder(folder)), [engine], SyncConfig(bucket_bytes=100_000, sink=sink, verify="full", timeout_s=60)
    ) as syncer:
        syncer.connect()
        # What follows the last bucket is left out from the third on, where it is the same for any weights.
        return [syncer.sync(version + number) for number in range(4)][-1]


def state(engine: Engine) -> dict[str, str]:
    return inspect_engines([engine])[engine.engine_id, 0]


@pytest.mark.gpu(1)
@pytest.mark.parametrize(("case", "expected"), [("qwen2-bfloat16", "direct"), ("qwen3-bfloat16", "direct"), ("moe-bfloat16", "direct")])
def test_a_synced_engine_holds_what_a_fresh_one_holds(tmp_path: Path, case: str, expected: str) -> None:
    folders = {name: save_case(tmp_path / name, case, name) for name in "ab"}
    engines = {}
    try:
        for name, folder in folders.items():
            engines[name] = start(name, folder, "0", dtype="bfloat16")
        fresh = {name: state(engine) for name, engine in engines.items()}
        answers = {name: engine.generate(PROMPTS, GREEDY) for name, engine in engines.items()}
        assert state_difference(fresh["a"], fresh["b"]), "the two versions differ"
        for sink in ("auto", "layerwise", "loaders"):
            for name in "ba":
                report = give(engines["a"], folders[name], sink, 1)
                found = [[c.token_ids for c in row] for row in engines["a"].generate(PROMPTS, GREEDY)]
                assert state_difference(state(engines["a"]), fresh[name]) == (), (sink, name)
                assert found == [[c.token_ids for c in row] for row in answers[name]], (sink, name)
            print(f"{case} {sink}: {report.sinks} {report.seconds:.3f} s, pause {report.pause_s:.3f}, pull {report.pull_s:.3f}, "
                  f"verify {report.verify_s:.3f}, finalize {report.finalize_s:.3f}")  # fmt: skip
            if sink == "auto":
                assert report.sinks == (expected,), report.sinks
    finally:
        for engine in engines.values():
            engine.close()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("case", ["qwen2-bfloat16", "qwen3-bfloat16", "moe-bfloat16"])
def test_loaders_write_plain_layers_where_they_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Or a sync by loaders would rebuild every layer, which is right and takes five times as long."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    report = tmp_path / "report.json"
    run_ranks(
        1, "tests.gpu.rebuilt_layers", "run", timeout_s=200, folder=str(save_case(tmp_path / case, case, "a")), report=str(report)
    )  # fmt: skip
    found = json.loads(report.read_text())
    print(found)
    assert all("experts" in path for path in found)
    assert bool(found) == (case == "moe-bfloat16")
