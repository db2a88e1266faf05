"""Questions that only a framework can answer, each asked in a process of its own: imports are slow, may hang and may crash.

A probe is this module as a program: ``python -m rlsync.cli.doctor.probes NAME`` prints one JSON object as the last line of its output. It
imports the rlsync that asks, not what lies in the working directory: a folder called rlsync there, as a clone in its parent, would be
taken for the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

TIMEOUT_S = 180.0
_TRIAL_S = 60.0
_TRIAL_SIZE = 1000

# Facts by name, or a sentence on why there are none.
Facts = dict[str, Any] | str


class Probe:
    """A probe that runs. Use as a context manager: it is ended at the latest there."""

    def __init__(self, name: str, timeout_s: float = TIMEOUT_S) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._said = TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", __spec__.name, name],
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


def megatron_facts() -> dict[str, Any]:
    """What Megatron-Core supports here."""
    from rlsync.megatron.support import supported

    return supported()


def engine_facts() -> dict[str, Any]:
    """What the installed vLLM supports, after loading its plug-ins as a worker would."""
    from rlsync.engine.compat.engine import supported
    from rlsync.engine.plugin import BACKEND
    from rlsync.engine.worker import RlsyncTransferEngine

    assert callable(RlsyncTransferEngine)
    return supported(BACKEND)


def cuda_facts() -> dict[str, Any]:
    """``torch``, ``cuda`` and ``nccl``: versions, None for a CPU build; ``devices``; ``no_peers``: pairs that cannot reach each
    other's memory; ``ipc``: None, or what went wrong when another process opened memory of GPU 0."""
    import torch

    with_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = torch.cuda.nccl.version() if with_nccl else None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "devices": [_device(i) for i in range(count)],
        "no_peers": [(i, j) for i in range(count) for j in range(count) if i < j and not torch.cuda.can_device_access_peer(i, j)],
        "ipc": _ipc_trial(count) if count else None,
    }


def _device(index: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return {"name": found.name, "uuid": str(found.uuid), "free_bytes": free_bytes, "total_bytes": total_bytes}


def _ipc_trial(count: int) -> str | None:
    """Another process reads memory of GPU 0, on the last GPU where there are several."""
    import torch

    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=read_shared, args=(there, count - 1), daemon=True)
    child.start()
    there.close()
    memory = torch.arange(_TRIAL_SIZE, device="cuda:0")
    try:
        here.send(memory)
        if not here.poll(_TRIAL_S):
            return f"the other process did not answer within {_TRIAL_S:g} s"
        answer: str | int = here.recv()
        return None if answer == sum(range(_TRIAL_SIZE)) else f"the other process says {answer}"
    except (RuntimeError, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        child.kill()
        child.join()


def read_shared(connection: Any, index: int) -> None:
    """The other process: answers with the sum of the memory it was given, or with what went wrong."""
    try:
        connection.send(int(connection.recv().to(f"cuda:{index}").sum()))
    except RuntimeError as error:
        connection.send(f"{type(error).__name__}: {error}")


# What a probe asks, by its name.
PROBES: Mapping[str, Callable[[], dict[str, Any]]] = {"cuda": cuda_facts, "megatron": megatron_facts, "engine": engine_facts}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
