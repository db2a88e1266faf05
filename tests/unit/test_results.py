"""Claims about the results folder: no start overwrites what an earlier run left, and no two runs share it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlsync.errors import ConfigError
from tests.unit.test_models_config import QWEN2
from tests.unit.test_preparation import TP2_SHARDS, checkpoint, config, world  # noqa: F401
from workers.config.schema import SeededModelConfig
from workers.results import ResultsFolder


def used(root: Path) -> Path:
    folder = checkpoint(root, 34, *TP2_SHARDS)
    (root / "run" / "metrics.jsonl").write_text('{"step": 33}\n' * 33)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_fresh_start_sets_the_earlier_run_aside_as_a_whole(world, tmp_path) -> None:  # noqa: F811
    for number in (1, 2):
        used(tmp_path)
        before = content(tmp_path / "run")
        with ResultsFolder(config(world, tmp_path), None) as results:
            assert results.notes == (f"an earlier run is set aside: {tmp_path}/run is now {tmp_path}/run.{number}",)
            assert content(tmp_path / "run") == {} and content(tmp_path / f"run.{number}") == before and not results.in_place


def test_a_resume_in_place_touches_nothing(world, tmp_path) -> None:  # noqa: F811
    folder = used(tmp_path)
    before = content(tmp_path / "run")
    with ResultsFolder(config(world, tmp_path), folder) as results:
        assert results.in_place and results.notes == () and content(tmp_path / "run") == before


def test_a_resume_from_elsewhere_is_a_fresh_start_in_this_folder(world, tmp_path) -> None:  # noqa: F811
    used(tmp_path)
    elsewhere = used(tmp_path / "other")
    with ResultsFolder(config(world, tmp_path), elsewhere) as results:
        assert not results.in_place and (tmp_path / "run.1" / "metrics.jsonl").is_file()


def test_logs_of_a_start_that_failed_are_no_run(world, tmp_path) -> None:  # noqa: F811
    (tmp_path / "run" / "worker_logs").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with ResultsFolder(config(world, tmp_path), None) as results:
        assert results.notes == () and (tmp_path / "run" / "worker_logs").is_dir()


def test_a_conversion_stays_for_the_next_run(world, tmp_path) -> None:  # noqa: F811
    used(tmp_path)
    (tmp_path / "run" / "converted_ckpts" / "actor").mkdir(parents=True)
    with ResultsFolder(config(world, tmp_path), None):
        assert (tmp_path / "run" / "converted_ckpts" / "actor").is_dir() and not (tmp_path / "run.1" / "converted_ckpts").exists()


def test_a_run_that_reads_the_earlier_run_s_files_is_refused(world, tmp_path) -> None:  # noqa: F811
    folder = used(tmp_path)
    values = config(world, tmp_path, rollout={"model": {"model_path": str(folder / "actor" / "hf_model")}})
    with pytest.raises(ConfigError, match=r"holds an earlier run.*reads .*hf_model in it; set another runner\.experiment_name"):
        ResultsFolder(values, None)
    assert folder.is_dir()


@pytest.mark.parametrize("read", ["actor/hf_adapter", "tokenizer", "reward.py"])
def test_adapters_tokenizers_and_reward_functions_are_files_that_a_run_reads(world, tmp_path, read) -> None:  # noqa: F811
    named = used(tmp_path) / read
    values = config(world, tmp_path, actor={"lora": {"r": 4, "adapter_path": str(named) if "adapter" in read else None}})
    if read == "tokenizer":
        values = replace(values, seeded_model=SeededModelConfig(path=str(tmp_path / "made"), hf_config=QWEN2, tokenizer=str(named)))
    elif read == "reward.py":
        values = replace(values, reward=replace(values.reward, reward_type=f"{named}:score"))
    with pytest.raises(ConfigError, match=f"holds an earlier run.*reads {re.escape(str(named))} in it"):
        ResultsFolder(values, None)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_metrics_of_another_run_under_a_log_path_of_its_own_are_refused(world, tmp_path) -> None:  # noqa: F811
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text('{"step": 1}\n')
    values = config(world, tmp_path, runner={"logger": {"log_path": str(tmp_path / "logs")}})
    with pytest.raises(ConfigError, match=r"log_path .*logs holds metrics\.jsonl of another run"):
        ResultsFolder(values, None)


def test_two_runs_do_not_share_a_folder(world, tmp_path) -> None:  # noqa: F811
    lock = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "f.write('process 12 on host'); f.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", lock, str(tmp_path / ".run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=r"run is in use by a run \(process 12 on host\)"):
            ResultsFolder(config(world, tmp_path), None)
        assert other.stdin is not None
        other.stdin.close()
    ResultsFolder(config(world, tmp_path), None).close()


def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(world, tmp_path) -> None:  # noqa: F811
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"results cannot be written to .*file: .*; set runner\.output_dir to another folder"):
        ResultsFolder(config(world, tmp_path / "file"), None)


def test_a_full_disk_is_named_before_anything_starts(world, tmp_path, monkeypatch) -> None:  # noqa: F811
    import errno
    import os

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        ResultsFolder(config(world, tmp_path), None)
