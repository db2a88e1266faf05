"""Logs of worker processes: where one prints to, and the first error that it printed. Imports no Ray, as workers are forked before."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rlsync import logs

LOG_VARIABLE = "RLSYNC_WORKER_LOG"
# What vLLM's processes put before each line of theirs.
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s+)?(?:ERROR [^\]]*\]\s?)?")
# "ValueError: text", or the bare name of an error that says nothing.
_ERROR = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception)(?:: .+)?")
# The end of a log that is looked at for its last lines.
_LAST_BYTES = 4096
# These only say that something above them failed.
_POINTS_ELSEWHERE = ("root cause above", "See stack trace", "Engine core initialization failed", "WorkerProc initialization failed")


def keep_own_log() -> None:
    """Redirect output of this process and its children to the log that its launcher named; called first in every worker."""
    path = os.environ.get(LOG_VARIABLE)
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    logs.set_up("INFO")


def own_log() -> Path:
    """The file, pipe or terminal that this process writes errors to."""
    return Path(os.readlink("/proc/self/fd/2"))


def log_size(path: Path) -> int:
    """Bytes of a log so far; 0 for what is not a file."""
    return path.stat().st_size if path.is_file() else 0


def last_lines(path: Path, count: int = 8) -> str:
    """The end of a log, indented below a line of its own, for the end of a message; nothing where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, log_size(path) - _LAST_BYTES))
        lines = stream.read().decode(errors="replace").split("\n")
    return "".join(f"\n    {line}" for line in [line for line in lines if line.strip()][-count:])


def first_error(path: Path, since: int = 0) -> str | None:
    """The first error printed to a log after ``since`` bytes, as ``Type: message``; None where there is none.

    Of nested failures the first one printed is the cause of the others.
    """
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        stream.seek(since)
        lines = [_PREFIX.sub("", line) for line in stream.read().decode(errors="replace").splitlines()]
    for number, line in enumerate(lines):
        if _ERROR.fullmatch(line) is not None and not any(text in line for text in _POINTS_ELSEWHERE):
            # An error without a message is told by the line of code that raised it.
            return line if ": " in line or number == 0 else f"{line}: {lines[number - 1].strip()}"
    return None
