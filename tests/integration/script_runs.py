"""Whole runs by their scripts: started, struck by a signal at a certain step, and ended with everything that they started."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil

from rlsync.engine.forking import ForkedProcess
from tests.deadlines import HANG_S
from tests.ranks import CAN_FORK, WITH_VLLM, Forked, begin_anew
from workers.metrics_log import read_metrics

REPO = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Of a script: without the token that the tests' own Ray has, since a run makes one of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**own, "PYTHON": sys.executable, "PYTHONPATH": path}


def by_itself(main: str, configs: str, config: str) -> list[str]:
    """The command of an entry point without its script."""
    return [main, "--config-path", str(REPO / configs), "--config-name", config]


class Run(Protocol):
    """As much of a Popen as is needed."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def start(command: list[str], folder: Path, *overrides: str) -> Run:
    """A script of ``examples`` (``bash`` and its path), or a Python file or module by itself, and its arguments. The latter, and all
    that it starts, are forked from a process of this session that has imported what they need."""
    arguments = [*command, f"runner.output_dir={folder}", "runner.experiment_name=run", *overrides]
    log = folder / "output.log"
    log.touch()
    if command[0] != "bash" and CAN_FORK:
        process = _ForkedRun(target=_be_run, args=(arguments, environment(), str(log)))
        process.start()
        return Forked(process)
    with log.open("a") as file:
        return subprocess.Popen(
            arguments if command[0] == "bash" else [sys.executable, *arguments],
            cwd=REPO, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            # Whoever runs the tests in the background ignores SIGINT, and so would the run.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip


class _ForkedRun(ForkedProcess):
    preload = WITH_VLLM
    reads_main = False


def _be_run(arguments: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    # As Python has it; whoever runs the tests in the background ignores it, and so would the run.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    begin_anew(environment, log)
    sys.path.insert(0, str(REPO))
    is_module = arguments[0] == "-m"
    sys.argv = arguments[1:] if is_module else arguments
    (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")


def run(command: list[str], folder: Path, *overrides: str) -> str:
    folder.mkdir(exist_ok=True)
    with started(command, folder, *overrides) as process:
        code = process.wait(500)
    output = (folder / "output.log").read_text()
    assert code == 0, output[-6000:]
    return output


def strike(
    process: Run,
    folder: Path,
    steps: int,
    victim: Callable[[list[psutil.Process]], psutil.Process],
    number: int,
    *,
    when: Callable[[dict[str, Any]], bool] = lambda line: True,
) -> list[psutil.Process]:
    """Send a signal to one process of a run when at least ``steps`` lines are in its metrics and the last one is as ``when`` says; all
    processes that it had started by then."""

    def is_time() -> bool:
        lines = read_metrics(folder / "run")
        return len(lines) >= steps and when(lines[-1])

    deadline = time.monotonic() + 400
    while not is_time() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    assert process.poll() is None and is_time(), (folder / "output.log").read_text()[-4000:]
    root = psutil.Process(process.pid)
    family = root.children(recursive=True)
    if isinstance(process, Forked):  # what it starts is forked as itself is
        family = [p for p in root.parent().children(recursive=True) if p.create_time() >= root.create_time() and p != root]
    assert len(family) > 4
    victim([root, *family]).send_signal(number)
    return family


def exit_code(process: Run, family: list[psutil.Process]) -> int:
    """That of a run that was struck, once nothing of it is left."""
    # More than a phase of a sync may take: a process that is lost in the middle of one may be found by its deadline only.
    code = process.wait(90)
    _, alive = psutil.wait_procs(family, timeout=HANG_S)
    assert not alive, [p.cmdline() for p in alive]
    assert rings_of(family) == []
    return code


@contextmanager
def started(command: list[str], folder: Path, *overrides: str) -> Iterator[Run]:
    """A run whose processes end with the block at the latest."""
    process = start(command, folder, *overrides)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rings_of(family: list[psutil.Process]) -> list[str]:
    """Rings in shared memory that bear the number of one of these processes."""
    return [ring.name for ring in Path("/dev/shm").glob("*rlsync-ring-*") if int(ring.name.split("-")[2]) in {p.pid for p in family}]


def title(process: psutil.Process) -> str:
    """The command line of a process; empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or waits for its parent to take note
        return ""


def output_of(process: psutil.Process) -> str:
    """Where a process prints to; empty for one that has ended."""
    try:
        return os.readlink(f"/proc/{process.pid}/fd/1")
    except OSError:
        return ""


def engine_core(family: list[psutil.Process]) -> psutil.Process:
    titles = {p: title(p) for p in family}
    found = [p for p, title in titles.items() if "EngineCore" in title]
    assert found, sorted(titles.values())
    return found[0]
