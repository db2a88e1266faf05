"""Claims about the tests themselves: what they are held to, and that the lists that order them name files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST, SHARED, WAITING

REPO = Path(__file__).resolve().parents[2]
CLOCKS = {"monotonic", "perf_counter", "process_time", "thread_time", "time"}


def asserted_durations(source: str) -> Iterator[int]:
    """Lines of asserts on a time that passed: a difference with what a clock says now. A deadline of a loop is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and any(isinstance(d, ast.BinOp) and _asks_a_clock(d) for d in ast.walk(node.test)):
            yield node.lineno


def _asks_a_clock(node: ast.AST) -> bool:
    calls = [c.func for c in ast.walk(node) if isinstance(c, ast.Call)]
    return any(isinstance(f, ast.Attribute) and f.attr in CLOCKS and isinstance(f.value, ast.Name) and f.value.id == "time" for f in calls)


# A GPU host has nothing else to do, and what is found there is written down.
@pytest.mark.parametrize("folder", ["unit", "integration", "chaos"])
def test_no_test_asserts_on_seconds(folder: str) -> None:
    files = sorted((REPO / "tests" / folder).glob("*.py"))
    found = [f"{file.name}:{line}" for file in files for line in asserted_durations(file.read_text(encoding="utf-8"))]
    assert files and not found, f"count the work, or use tests/deadlines.py: {found}"


def test_an_assert_on_seconds_would_be_found() -> None:
    assert list(asserted_durations("x = 1\nassert time.monotonic() - began_s < 1 and x")) == [2]
    assert list(asserted_durations("assert time.monotonic() < deadline_s, 'no tokens'")) == []


def test_files_that_share_or_come_first_exist() -> None:
    assert all((REPO / file).is_file() for file in (*LONGEST, *SHARED, *SHARED.values(), *WAITING))


def test_what_waits_has_the_third_lane_for_itself(tmp_path: Path) -> None:
    others = [f"tests/unit/test_{name}.py" for name in "abcd"]
    for file in (*WAITING[:2], *others):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(
            "import os, pathlib, pytest, time\n"
            "@pytest.mark.parametrize('number', range(4))\n"
            "def test_it(number):\n"
            "    time.sleep(0.1)\n"
            "    with open(pathlib.Path(__file__).parents[2] / 'ran', 'a') as ran:\n"
            f"        print(os.environ['PYTEST_XDIST_WORKER'], '{file}', file=ran)\n"
        )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = ("-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--import-mode=importlib", "--numprocesses=3")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "pytest", *arguments, "--no-loadscope-reorder", "tests"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert len(ran) == 4 * 6
    waiting = {lane for lane, file in ran if file in WAITING}
    assert len(waiting) == 1 and not waiting & {lane for lane, file in ran if file in others}
