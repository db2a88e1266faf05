"""Ray's workers on a machine without GPUs, forked from processes that have imported what they need: each would import it for seconds.

Ray starts a worker by a command, the ``py_executable`` of its runtime environment. Here that is this file, run as a program: it hands the
worker's arguments, environment and streams to the run, which forks the worker; where it cannot, the program becomes the worker. Where
there are GPUs nothing is forked, because a process that has asked for a GPU cannot be.
"""

from __future__ import annotations

import os
import socket
import sys


def _is_forked(path: str, command: list[str]) -> bool:
    """Whether the run whose socket is ``path`` forks the worker that ``command`` would start."""
    import json

    text = json.dumps({"arguments": command, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    try:
        with socket.socket(socket.AF_UNIX) as run:
            run.connect(path)
            socket.send_fds(run, [text[:1]], [0, 1, 2])
            run.sendall(text[1:])
            run.shutdown(socket.SHUT_WR)
            return run.recv(1) == b"+"
    except OSError:
        return False


if __name__ == "__main__":
    if not _is_forked(sys.argv[1], sys.argv[2:]):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
    sys.exit(0)

# The program does without what follows, and starts in 20 ms.
import contextlib  # noqa: E402
import json  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import ClassVar  # noqa: E402

import psutil  # noqa: E402

from rlsync.engine.forking import EngineProcess, ForkedProcess, set_environment  # noqa: E402
from workers.ray_access import LOCAL, cluster_address  # noqa: E402
from workers.worker_logs import last_lines  # noqa: E402

# Name of a worker among those of its run, in its environment.
NAME_VARIABLE = "RLSYNC_WORKER_NAME"
CPU_ENVIRONMENT: Mapping[str, str] = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": ""}
_IMPORTS_S = 300.0


class ForkedWorker(ForkedProcess):
    """A worker of Ray, which reads from the environment whose worker it is when it is imported: not before ``_be_worker`` has set that."""

    reads_main: ClassVar[bool] = False

    def __init__(self, connection: socket.socket | None = None, folder: Path | None = None) -> None:
        """Without a connection to the program in whose place it is, it ends at once; ``folder`` takes its name and its first output."""
        super().__init__(target=None if connection is None else _be_worker, args=(connection, folder))


class ForkedRank(ForkedWorker):
    """A rank of the actor."""

    preload: ClassVar[tuple[str, ...]] = ("workers.grpo_actor", "workers.sft_actor")


class ForkedEngine(ForkedWorker):
    """Who owns an engine; the engine's core is forked from the same process."""

    preload: ClassVar[tuple[str, ...]] = (*EngineProcess.preload, "rlsync.engine.handles.local", "workers.rollout")


def may_fork(address: str) -> bool:
    """Whether the workers of a run that starts Ray at ``address`` are forked."""
    return address == LOCAL and shutil.which("nvidia-smi") is None


def import_ahead(num_nodes: int, kinds: Sequence[type[ForkedWorker]]) -> None:
    """Have processes begin to import what workers of these kinds need, while this one goes on. Without effect where none are forked."""
    if may_fork(cluster_address(num_nodes)):
        with _environment({**CPU_ENVIRONMENT, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}), _silence():
            for kind in kinds:
                kind.get_ready()


class Forks:
    """Forks the workers of one kind that Ray asks for."""

    def __init__(self, kind: type[ForkedWorker]) -> None:
        self._kind = kind
        self._folder = Path(tempfile.mkdtemp(prefix="rlsync-forks-"))
        self._forked: list[tuple[ForkedWorker, psutil.Process | None]] = []
        self._is_ready = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / "socket"))
        self._listener.listen(128)
        threading.Thread(target=self._serve, name=f"rlsync-{kind.__name__}", daemon=True).start()

    def command(self) -> str:
        """What Ray starts a worker with, ``py_executable``. Waits for the imports, for which Ray has a shorter deadline."""
        self._is_ready.wait(_IMPORTS_S)
        return shlex.join([sys.executable, "-S", "-E", __file__, str(self._folder / "socket")])

    def ended(self, name: str) -> str | None:
        """How the process of the worker with this ``NAME_VARIABLE`` ended, and its last lines; None while it runs, and where none was
        forked. Ray learns of a process that ends before it has reported there only after minutes."""
        for worker, process in tuple(self._forked):
            named, code = self._folder / f"{worker.pid}.name", worker.exitcode
            # Without the process that it was forked from there is a code, too.
            has_ended = code is not None and (process is None or not process.is_running())
            if code is not None and has_ended and named.is_file() and named.read_text() == name:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return f"process {worker.pid} ended ({how}){last_lines(self._folder / f'{worker.pid}.log')}"
        return None

    def close(self) -> None:
        """End the workers that were forked. Idempotent."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for worker, process in self._forked:
            # Not by its number, which may be another's by now: a run takes days.
            with contextlib.suppress(psutil.NoSuchProcess):
                if process is not None:
                    process.kill()
            worker.join()

    def _serve(self) -> None:
        try:
            with contextlib.suppress(OSError, EOFError):
                ready = self._kind()
                ready.start()
                ready.join()
        finally:
            self._is_ready.set()
        # Ends with an OSError when the listener is closed, or when nothing can be forked any more: programs then become the workers.
        with self._listener, contextlib.suppress(OSError, EOFError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    worker = self._kind(connection, self._folder)
                    worker.start()
                    self._forked.append((worker, _process(worker.pid)))


def _process(pid: int | None) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _be_worker(connection: socket.socket, folder: Path) -> None:
    """Runs in the forked process: become the worker that the program at the other end was to be."""
    with connection:
        text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while more := connection.recv(1 << 16):
            text += more
        connection.sendall(b"+")
    asked = json.loads(text)
    # As Ray has it: Ctrl-C in a terminal is for the run alone. A session of its own would be a share of the processors of its own.
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Until Ray, or the worker, gives it a log.
    (folder / f"{os.getpid()}.name").write_text(asked["environment"].get(NAME_VARIABLE, ""))
    first_log = os.open(folder / f"{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, stream in enumerate((*streams[:2], first_log)):
        os.dup2(stream, number)
    for stream in (*streams, first_log):
        os.close(stream)
    set_environment(asked["environment"])
    os.chdir(asked["folder"])
    if "torch" in sys.modules and "OMP_NUM_THREADS" in os.environ:
        # OpenMP has read that of the process which it was imported in.
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    path, *_ = sys.argv = asked["arguments"]
    # Not as the main module: the core of an engine would read it again.
    exec(compile(Path(path).read_bytes(), path, "exec"), {"__name__": "__main__", "__file__": path})


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        set_environment(before)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What is started here prints to nowhere; what is forked from it prints to where it is told."""
    sys.stdout.flush()
    kept, nowhere = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, stream in zip((1, 2), kept, strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)
