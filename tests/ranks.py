"""Runs a function on several ranks, each a process of its own with the environment that torchrun would give it."""

from __future__ import annotations

import atexit
import faulthandler
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, Protocol

from rlsync.engine.forking import ForkedProcess, set_environment
from tests.deadlines import HANG_S
from workers.forked_workers import ForkedEngine, ForkedRank

REPO = Path(__file__).resolve().parents[1]
# Ranks of these modules import Megatron and not vLLM. They are forked from one process that has done so.
_WITH_MEGATRON = tuple(
    f"tests.integration.{name}_ranks"
    for name in (
        "actor", "sft_actor", "agreement", "bridge", "checkpoint", "convert", "freshness", "lora", "megatron", "offload", "replay",
        "reshard", "vision", "vision_parts",
    )
)  # fmt: skip
# These import vLLM, and Megatron or not, in the environment of ``ENGINE_ENV``, which vLLM reads when it is imported.
_WITH_VLLM = (
    *(f"tests.integration.{name}" for name in ("gloo_hosts", "oracle_ranks", "paper_workers", "recorder_claims", "sink_engines")),
    "tests.chaos.campaign",
)
# So are engines of a session, and the processes of whole runs, from the same process.
WITH_VLLM = (*ForkedEngine.preload, *ForkedRank.preload, "workers.entry", "workers.preparation", *_WITH_VLLM)
# A process that was forked from one that asked for GPUs has none.
CAN_FORK = shutil.which("nvidia-smi") is None
_ENTRY = "import json, sys; from importlib import import_module as m; getattr(m(sys.argv[1]), sys.argv[2])(**json.load(open(sys.argv[3])))"


def free_port() -> int:
    """A port that nobody listens at, below those that systems give to sockets that ask for any: ranks take it seconds later."""
    while True:
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", random.SystemRandom().randrange(15_000, 32_000)))
            return s.getsockname()[1]


def said(output: str) -> Any:
    """What a rank has printed behind ``SAID``, in JSON."""
    return json.loads(output.split("SAID ")[1].splitlines()[0])


def run_ranks(world_size: int, module: str, function: str, *, timeout_s: float = HANG_S, **kwargs: Any) -> list[str]:
    """Call ``module.function(**kwargs)`` (JSON-able arguments) on every rank; returns the output of each.

    A rank that fails or a deadline that passes kills all ranks and raises with their output.
    """
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    start = _fork if CAN_FORK and module in (*_WITH_MEGATRON, *_WITH_VLLM) else _execute
    with ExitStack() as stack:
        arguments = stack.enter_context(NamedTemporaryFile("w", suffix=".json"))
        json.dump(kwargs, arguments)
        arguments.flush()
        logs = [stack.enter_context(NamedTemporaryFile("w+", suffix=".log")) for _ in range(world_size)]
        ranks = [
            start((module, function, arguments.name), {**environment, "RANK": str(r), "LOCAL_RANK": str(r)}, log)
            for r, log in enumerate(logs)
        ]
        return _collect(ranks, logs, time.monotonic() + timeout_s)


class _Rank(Protocol):
    """As much of a Popen as is needed."""

    @property
    def returncode(self) -> int | None: ...
    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> Any: ...


def _execute(entry: tuple[str, str, str], environment: dict[str, str], log: IO[str]) -> _Rank:
    command = [sys.executable, "-c", _ENTRY, *entry]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPO)


class Forked:
    """As a Popen."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.kill = process.kill

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if timeout is not None and self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        assert self._process.exitcode is not None
        return self._process.exitcode


def _fork(entry: tuple[str, str, str], environment: dict[str, str], log: IO[str]) -> _Rank:
    kind = _MegatronRank if entry[0] in _WITH_MEGATRON else _VllmRank
    process = kind(target=_be_rank, args=(entry, environment, log.name))
    process.start()
    return Forked(process)


class _MegatronRank(ForkedProcess):
    preload = _WITH_MEGATRON


class _VllmRank(ForkedProcess):
    preload = WITH_VLLM


def make_process(target: Callable[..., None], *arguments: Any, daemon: bool = True) -> BaseProcess:
    """A process to be started, forked from the one that has imported vLLM where that can be. As a ``daemon`` it has no children."""
    kind: Any = _VllmRank if CAN_FORK else multiprocessing.get_context("spawn").Process
    return kind(target=target, args=arguments, daemon=daemon)


def begin_anew(environment: dict[str, str], log: str) -> None:
    """In a process that was forked: as if it had been started in the repository, with an environment and a file for its output."""
    set_environment(environment)
    os.chdir(REPO)
    for name, flags, numbers in ((os.devnull, os.O_RDONLY, (0,)), (log, os.O_WRONLY | os.O_APPEND, (1, 2))):
        opened = os.open(name, flags)
        for number in numbers:
            os.dup2(opened, number)
        os.close(opened)


def _be_rank(entry: tuple[str, str, str], environment: dict[str, str], log: str) -> None:
    begin_anew(environment, log)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    module, function, arguments = entry
    try:
        getattr(import_module(module), function)(**json.loads(Path(arguments).read_text()))
    except BaseException:
        traceback.print_exc()
        # multiprocessing would wait for the engines that a failed rank has left open, and what closes them is called where an
        # interpreter ends, which a forked process does not. One that ends the process, as of one with vLLM, would say that all is well.
        atexit.unregister(os._exit)
        atexit._run_exitfuncs()
        os._exit(1)


def _collect(ranks: list[_Rank], logs: list[IO[str]], deadline: float) -> list[str]:
    try:
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        # The others of a failed rank say more when they have a moment to notice.
        settle = min(deadline, time.monotonic() + 5)
        while any(r.poll() is None for r in ranks) and time.monotonic() < settle:
            time.sleep(0.05)
    except KeyboardInterrupt:
        print(*(f"\n--- rank {i} until it was interrupted\n{Path(log.name).read_text(errors='replace')}" for i, log in enumerate(logs)))
        raise
    finally:
        late = [i for i, r in enumerate(ranks) if r.poll() is None]
        said = [os.fstat(log.fileno()).st_size for log in logs]
        for i in late:
            # It says where its threads are.
            os.kill(ranks[i].pid, signal.SIGABRT)
        settle = time.monotonic() + 2
        while any(r.poll() is None for r in ranks) and time.monotonic() < settle:
            time.sleep(0.05)
        for r in ranks:
            r.kill()
            r.wait()
    outputs = []
    for log in logs:
        log.seek(0)
        outputs.append(log.read())
    if late or any(r.returncode for r in ranks):
        ends = [_end(log, size) for log, size in zip(logs, said, strict=True)]
        text = "\n".join(f"--- rank {i} (exit {r.returncode})\n{end}" for i, (r, end) in enumerate(zip(ranks, ends, strict=True)))
        raise AssertionError(f"ranks {late} did not end in time\n{text}" if late else text)
    return outputs


def _end(log: IO[str], said: int) -> str:
    """The end of what a rank has said in ``said`` bytes, and where its threads were after that."""
    written = Path(log.name).read_bytes()
    dump = written[said:].decode(errors="replace")
    # The end of a dump of threads lists modules.
    return written[:said].decode(errors="replace")[-6000:] + re.sub(r"\nExtension modules:[^\n]*", "", dump)[-12000:]
