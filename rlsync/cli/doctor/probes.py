"""Questions that only a framework can answer, each asked in a process of its own: imports are slow, may hang and may crash.

A probe is a module that prints one JSON object as the last line of its output. It imports the rlsync that asks, not what lies in the
working directory: a folder called rlsync there, as a clone in its parent, would be taken for the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

# Module of this package by what it asks about.
NAMES = {"cuda": "cuda_facts", "megatron": "megatron_facts", "engine": "engine_facts"}
TIMEOUT_S = 180.0

# Facts by name, or a sentence on why there are none.
Facts = dict[str, Any] | str


class Probe:
    """A probe that runs. Use as a context manager: it is ended at the latest there."""

    def __init__(self, name: str, timeout_s: float = TIMEOUT_S) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._said = TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", f"{__package__}.{NAMES[name]}"],
            env=_environment(), stdin=subprocess.DEVNULL, stdout=self._said, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def facts(self) -> Facts:
        """What it found out; waits for it."""
        try:
            self._process.wait(max(0.0, self._deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"no answer within {self._timeout_s:g} s"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "no output"
        if self._process.returncode != 0:
            return last if self._process.returncode > 0 else f"ended by signal {-self._process.returncode}: {last}"
        facts: dict[str, Any] = json.loads(last)
        return facts

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()


def package_root() -> Path:
    """The folder that holds the package rlsync."""
    return Path(__file__).resolve().parents[3]


def _environment() -> dict[str, str]:
    """Puts a rlsync that is used from its sources first; site-packages has its place, which is behind the standard library."""
    if str(package_root()) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(package_root()), os.environ.get("PYTHONPATH"))))}
