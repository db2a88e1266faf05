"""Claims about folders that are made locally from a recipe."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from rlsync.errors import ConfigError
from workers.synthetic import make_once


def _make(folder: str, results: Any) -> None:
    def slowly(inside: Path) -> None:
        assert not any(inside.iterdir())
        (inside / "first").touch()
        time.sleep(0.3)
        (inside / "last").touch()

    results.put(make_once(Path(folder), {"seed": 1}, slowly, key="x.path"))
    assert {path.name for path in Path(folder).iterdir()} >= {"first", "last"}


def test_processes_that_want_the_same_folder_make_it_once_and_all_find_it_complete(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path / "new" / "model"), results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [False, False, False, True]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_what_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"x.path .* was not made by rlsync"):
        make_once(tmp_path, {}, lambda inside: None, key="x.path")
    assert (tmp_path / "mine").read_text() == "mine"
