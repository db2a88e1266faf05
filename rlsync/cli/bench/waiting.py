"""Waiting for a file that another process of the bench writes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rlsync.errors import RlsyncError

_POLL_S = 0.02


def await_file(path: Path, timeout_s: float) -> str:
    """Its text, as soon as it is there. Raises RlsyncError after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise RlsyncError(f"{path.name} was not written within {timeout_s:g} s; the process that writes it has failed")
        time.sleep(_POLL_S)
    return path.read_text(encoding="utf-8")


def write_file(path: Path, text: str) -> None:
    """So that nobody sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
