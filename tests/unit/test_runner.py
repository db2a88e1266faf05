"""Claims about checkpoints that ranks write while a run goes on: when they get their name, and when their failure is told."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlsync.bridge.checkpoint_folder import TRACKER, complete_checkpoints
from rlsync.errors import CheckpointError, GradientError
from workers.config import load_config
from workers.runner import Runner

VALUES = {
    "cluster": {"component_placement": {"actor": "0-1", "rollout,reward": "2"}},
    "runner": {"seq_length": 16, "experiment_name": "run", "save_interval": 2},
    "rollout": {"model": {"model_path": "model"}},
    "data": {"train_data_paths": ["train.jsonl"], "max_prompt_length": 8, "rollout_batch_size": 4},
}


class Ranks:
    """Two ranks as a worker group calls them, whose disk is as fast as ``written`` says: by rank."""

    topology = SimpleNamespace(world_size=2)

    def __init__(self) -> None:
        self.written, self.failure, self.calls = [False, False], "", []

    def on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        self.calls.append(method)
        if self.failure:
            raise CheckpointError(self.failure)
        if method == "save":
            self.folder = Path(arguments[0])
            self.folder.mkdir()
            self.step = arguments[1]
        if method == "finish_save":
            (self.folder / TRACKER).write_text(str(self.step))
        return list(self.written)

    def memory(self) -> dict[str, float]:
        return {}


class Steps(Runner[Any, Any]):
    """Steps that do nothing."""

    def __init__(self, folder: Path, ranks: Ranks, script: Mapping[int, Any]) -> None:
        super().__init__(load_config({**VALUES, "actor": {"megatron": {"async_save": True}}}))
        self.notes: list[str] = []
        quiet = SimpleNamespace(phase=lambda *_: None, step=lambda *_: None, note=self.notes.append, summary=lambda *_, **__: None)
        self._group, self._screen, self._script, self._total = ranks, quiet, script, 5
        self._results = SimpleNamespace(path=folder)
        self._prepared = SimpleNamespace(hf_config={}, beginning=SimpleNamespace(step=0))
        self.seen: list[list[int]] = []

    _prepare = _start = _speeds = lambda self, *_: {}

    def _data_state(self) -> Mapping[str, Any]:
        return {}

    def _step(self, step: int, seconds: dict[str, float]) -> tuple[dict[str, float], list[dict[str, float]]]:
        self.seen.append([int(path.name.rpartition("_")[2]) for path in complete_checkpoints(self._results.path / "checkpoints")])
        self._script.get(step, lambda: None)()
        return {}, []

    def train(self) -> None:
        self._train(SimpleNamespace(log=lambda *_: {}, history=[], folder=None))  # type: ignore[arg-type]


def test_a_checkpoint_has_its_name_when_every_rank_has_written_it_and_the_last_before_the_run_ends(tmp_path) -> None:
    ranks = Ranks()

    def disk(*written: bool):
        return lambda: ranks.written.__setitem__(slice(None), written)

    run = Steps(tmp_path, ranks, {3: disk(True, False), 4: disk(True, True), 5: disk(False, False)})
    run.train()
    # Saved after 2, 4 and 5; what is seen is from before a step. The one of 4 is waited for: the next save has its memory.
    assert run.seen == [[], [], [], [], [2]]
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["global_step_2", "global_step_4", "global_step_5"]
    assert ranks.calls.count("finish_save") == 3


@pytest.mark.parametrize("at", [3, 4, 5])
def test_what_cannot_be_written_ends_the_run_after_the_step_under_way(tmp_path, at: int) -> None:
    ranks = Ranks()
    said = "actor rank 1: /results/model.safetensors: cannot be written (No space left on device)"
    run = Steps(tmp_path, ranks, {at: lambda: setattr(ranks, "failure", said)})
    with pytest.raises(CheckpointError, match="No space left on device"):
        run.train()
    assert len(run.seen) == at
    way_on = "no checkpoint is complete in" if at < 5 else f"runner.resume_dir=auto goes on after global_step_2 in {tmp_path}/checkpoints"
    assert run.notes[0] == f"checkpoint {2 if at < 5 else 4} is not complete; those before it are"
    assert run.notes[1].startswith(way_on) and len(run.notes) == 2


def test_a_step_has_its_line_also_where_the_validation_behind_its_checkpoint_fails(tmp_path) -> None:
    """A resume goes on behind that step: nobody else would ever write its line."""
    ranks, lines = Ranks(), []
    ranks.written = [True, True]
    run = Steps(tmp_path, ranks, {})
    run._validates = lambda step: step == 2  # type: ignore[method-assign]
    run._validate = lambda step: setattr(ranks, "failure", "engine 0 has ended") or ranks.on_ranks("sync")  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="engine 0 has ended"):
        run._train(SimpleNamespace(log=lambda step, *_: lines.append(step) or {}, history=[], folder=None))  # type: ignore[arg-type]
    assert lines == [1, 2]


def test_gradients_that_are_not_finite_end_the_run_with_the_number_of_the_step_and_nothing_of_it_is_saved(tmp_path) -> None:
    def fail() -> None:
        raise GradientError("the norm of the gradients is nan")

    ranks = Ranks()
    ranks.written = [True, True]
    run = Steps(tmp_path, ranks, {4: fail})
    with pytest.raises(GradientError, match=r"^step 4: the norm of the gradients is nan"):
        run.train()
    assert ranks.calls.count("save") == 1
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["global_step_2"]


def test_the_disk_has_what_the_driver_writes_before_a_checkpoint_has_its_name(tmp_path, monkeypatch) -> None:
    """A machine that loses power keeps the name, which is on the disk, and not what is not."""
    happened: list[str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    monkeypatch.setattr(os, "rename", lambda old, new: (happened.append(f"{Path(new).name}"), rename(old, new)))
    Steps(tmp_path, Ranks(), {}).train()
    until = [happened.index(f"global_step_{step}") for step in (2, 4, 5)]
    for step, end in zip((2, 4, 5), until, strict=True):
        kept = [Path(path).name.removesuffix(".partial") for path in happened[:end] if f".global_step_{step}.partial" in path]
        assert sorted(kept) == ["data.pt", "run.json"]
