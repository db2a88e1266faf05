"""Runs a function on several ranks, each a process of its own, as torchrun would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO, Any

REPO = Path(__file__).resolve().parents[1]
_ENTRY = "import json, sys; from importlib import import_module as m; getattr(m(sys.argv[1]), sys.argv[2])(**json.load(open(sys.argv[3])))"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world_size: int, module: str, function: str, *, timeout_s: float = 240, **kwargs: Any) -> list[str]:
    """Call ``module.function(**kwargs)`` (JSON-able arguments) on every rank; returns the output of each.

    A rank that fails or a deadline that passes kills all ranks and raises with their output.
    """
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    with ExitStack() as stack:
        arguments = stack.enter_context(NamedTemporaryFile("w", suffix=".json"))
        json.dump(kwargs, arguments)
        arguments.flush()
        command = [sys.executable, "-c", _ENTRY, module, function, arguments.name]
        logs = [stack.enter_context(TemporaryFile("w+")) for _ in range(world_size)]
        ranks = [
            subprocess.Popen(
                command, env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdin=subprocess.DEVNULL, stdout=logs[r], stderr=subprocess.STDOUT, cwd=REPO,
            )
            for r in range(world_size)
        ]  # fmt: skip
        return _collect(ranks, logs, time.monotonic() + timeout_s)


def _collect(ranks: list[subprocess.Popen], logs: list[IO[str]], deadline: float) -> list[str]:
    try:
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        # The others of a failed rank say more when they have a moment to notice.
        settle = min(deadline, time.monotonic() + 5)
        while any(r.poll() is None for r in ranks) and time.monotonic() < settle:
            time.sleep(0.05)
    finally:
        late = [i for i, r in enumerate(ranks) if r.poll() is None]
        for r in ranks:
            r.kill()
            r.wait()
    outputs = []
    for log in logs:
        log.seek(0)
        outputs.append(log.read())
    if late or any(r.returncode for r in ranks):
        text = "\n".join(f"--- rank {i} (exit {r.returncode})\n{o[-6000:]}" for i, (r, o) in enumerate(zip(ranks, outputs, strict=True)))
        raise AssertionError(f"ranks {late} did not end in time\n{text}" if late else text)
    return outputs
