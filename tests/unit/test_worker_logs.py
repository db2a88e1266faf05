"""Claims about the errors found in what worker processes printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.worker_logs import first_error, log_size

CORE = "(EngineCore pid=4242) ERROR 11-21 09:09:39 [core.py:1234] "


def logged(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "engine.log"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_first_error_is_the_cause_of_those_that_only_point_at_it(tmp_path: Path) -> None:
    path = logged(
        tmp_path, "INFO starting", f"{CORE}EngineCore failed to start.", f"{CORE}Traceback (most recent call last):",
        f"{CORE}torch.OutOfMemoryError: no room for 3 GiB", "RuntimeError: Engine core initialization failed. See root cause above.",
    )  # fmt: skip
    assert first_error(path) == "torch.OutOfMemoryError: no room for 3 GiB"


def test_an_error_without_a_message_is_told_by_its_line_of_code(tmp_path: Path) -> None:
    path = logged(tmp_path, f"{CORE}    assert size % tp_size == 0", f"{CORE}AssertionError")
    assert first_error(path) == "AssertionError: assert size % tp_size == 0"


def test_older_errors_are_left_out(tmp_path: Path) -> None:
    path = logged(tmp_path, "ValueError: of the last call")
    assert first_error(path, since=log_size(path)) is None


@pytest.mark.parametrize("text", ["INFO no Error: here", "loss: 0.1", "ERRORS: none found in ValueErrors"])
def test_other_lines_are_no_errors(tmp_path: Path, text: str) -> None:
    assert first_error(logged(tmp_path, text)) is None


def test_what_is_not_a_file_holds_no_error() -> None:
    assert first_error(Path("pipe:[123]")) is None and log_size(Path("pipe:[123]")) == 0
