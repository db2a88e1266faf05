"""All processes of a bench: started together, watched, and gone at the end, however it ends. Knows commands and logs, no frameworks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlsync.bench import host
from rlsync.bench.spec import Spec
from rlsync.bench.training import TrainSpec
from rlsync.engine.plugin import declare_owner
from rlsync.errors import RlsyncError
from rlsync.megatron.environment import rank_environment

_POLL_S = 0.05
# The others of a process that failed say more when they have a moment to notice.
_SETTLE_S = 3.0
_END_S = 10.0
_TAIL_LINES = 60
_MODULES = "rlsync.bench"


@dataclass(slots=True)
class Member:
    """One process. ``log`` has its output, and that of the processes it starts."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])


class BenchError(RlsyncError):
    """A process of the bench failed, or the deadline passed; carries what the process said last."""


class WorkerGroup:
    """The processes of one bench; a context, at whose end none is left."""

    def __init__(self, spec: Spec | TrainSpec, spec_path: Path, logs: Path) -> None:
        self._spec, self._path, self._logs = spec, str(spec_path), logs
        self.members: list[Member] = []

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_all()

    def start(self) -> None:
        """Start them all. Those of syncs import while the links are measured, and touch no GPU before."""
        self._logs.mkdir(parents=True, exist_ok=True)
        # All of them end by themselves when this process is killed (``bench.member``).
        declare_owner()
        if isinstance(self._spec, TrainSpec):
            self._start_ranks("train_rank")
            return
        self._start("floors", [f"{_MODULES}.floors", self._path], self._visible(dict(os.environ)))
        for index in range(len(self._spec.hosts)):
            environment = host.environment(self._spec, index)
            self._start(f"engine{index}", [f"{_MODULES}.host", self._path, str(index)], environment)
        self._start_ranks("rank")

    def _start_ranks(self, module: str) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        size = self._spec.topology.world_size
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        common |= rank_environment(self._spec.topology)
        for rank in range(size):
            environment = self._visible({**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            self._start(f"actor{rank}", [f"{_MODULES}.{module}", self._path], environment)

    def _visible(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(self._spec.devices)} if self._spec.on_gpu else dict(environment)

    def _start(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        log = self._logs / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{_MODULES}.member", *arguments],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.members.append(Member(name, process, log))

    def wait(self, deadline_s: float, watch: Callable[[], None]) -> None:
        """Return when all have ended well; ``watch`` is called now and then. Raises BenchError where one failed or time is up."""
        while any(m.process.poll() is None for m in self.members):
            watch()
            if any(m.process.poll() for m in self.members):
                break
            if time.monotonic() > deadline_s:
                late = [m for m in self.members if m.process.poll() is None]
                raise BenchError("\n".join(["the deadline of the bench passed (--deadline-s); still running:", *map(_told, late)]))
            time.sleep(_POLL_S)
        settle_s = time.monotonic() + _SETTLE_S
        while any(m.process.poll() is None for m in self.members) and time.monotonic() < settle_s:
            time.sleep(_POLL_S)
        failed = [m for m in self.members if m.process.poll()]
        if failed:
            raise BenchError("\n".join(map(_told, failed)))

    def _end_all(self) -> None:
        """Kill what is left, with all that it started. Engine processes whose parent went before end by themselves (``engine.plugin``)."""
        left = []
        for member in self.members:
            with suppress(psutil.NoSuchProcess):
                own = psutil.Process(member.process.pid)
                left += [*own.children(recursive=True), own]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for member in self.members:
            member.process.wait(_END_S)
        psutil.wait_procs(left, timeout=_END_S)


def _told(member: Member) -> str:
    code = member.process.poll()
    state = "is running" if code is None else f"ended with exit code {code}"
    return f"--- {member.name} {state}; the end of {member.log}:\n{member.tail()}"
