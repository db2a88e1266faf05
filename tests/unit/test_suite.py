"""Claims about the tests themselves: what they are held to, and that the lists that order them name files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST, SHARED

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
    assert all((REPO / file).is_file() for file in (*LONGEST, *SHARED, *SHARED.values()))
