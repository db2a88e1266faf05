"""Processes of engines on CPU, forked from one that has imported vLLM: each that vLLM spawns would import it anew, for ten seconds.

vLLM spawns them because of the number of OpenMP threads, which a forked process cannot choose any more. With
``VLLM_CPU_OMP_THREADS_BIND=nobind``, as runs without GPUs have it, there is nothing to choose. Imports no vLLM.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, ClassVar


def is_asked_for() -> bool:
    """Whether engines that this process starts on CPU are forked."""
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"


def set_environment(variables: Mapping[str, str]) -> None:
    """Give this process these variables and no others. Those that it has stay where they are: a process's title is written beside them."""
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in variables.items() if os.environ.get(name) != value})


class _Output:
    """One of the descriptors of standard output and error, on its way to a process that is being started."""

    def __init__(self, number: int, sent: Any = None) -> None:
        self._number, self._sent = number, sent

    def __reduce__(self) -> tuple[Any, ...]:
        return _Output, (self._number, reduction.DupFd(self._number))

    def take_over(self) -> None:
        """In that process."""
        descriptor = self._sent.detach()
        os.dup2(descriptor, self._number)
        os.close(descriptor)


class ForkedProcess(ForkServerProcess):
    """Forked from a process that has imported ``preload``, and has no threads. It has the environment and the output of whoever starts it.

    What is read from the environment when it is imported is that of the first start.
    """

    preload: ClassVar[tuple[str, ...]] = ()
    # Whether it imports the main module of whoever starts it, as multiprocessing has it.
    reads_main: ClassVar[bool] = True

    @classmethod
    def get_ready(cls) -> None:
        """Start the process that others will be forked from, which then imports; returns at once. Idempotent."""
        _server(cls.preload).ensure_running()

    def start(self) -> None:
        self._environment, self._outputs = dict(os.environ), (_Output(1), _Output(2))
        super().start()

    def run(self) -> None:
        # What was imported stays. Collections that look at it copy its pages, for more than a second in an engine's start.
        gc.freeze()
        for output in self._outputs:
            output.take_over()
        set_environment(self._environment)
        super().run()

    @staticmethod
    def _Popen(process: Any) -> Any:
        return _Popen(process)


class EngineProcess(ForkedProcess):
    """An engine's core."""

    preload: ClassVar[tuple[str, ...]] = ("rlsync.engine.compat.warm",)

    def run(self) -> None:
        from rlsync.engine.compat.engine import skip_imports_in_last_collection

        # Ctrl-C in a terminal is for whoever owns the engine. No session of its own: Linux shares processors out between sessions
        # (sched_autogroup), so that engines which poll would leave their owner one share of many.
        os.setpgid(0, 0)
        skip_imports_in_last_collection()
        super().run()


class EngineContext(ForkServerContext):
    """The multiprocessing context by which vLLM starts an engine's core."""

    Process = EngineProcess  # type: ignore[assignment]


_launching = threading.Lock()


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        server = _server(process.preload)

        def without_main(name: str) -> dict[str, Any]:
            return {key: value for key, value in prepare(name).items() if not key.startswith("init_main")}

        # The standard library has one server in a process, and connects to that.
        with _launching:
            connect, prepare = forkserver.connect_to_new_process, spawn.get_preparation_data
            forkserver.connect_to_new_process = server.connect_to_new_process
            if not process.reads_main:
                spawn.get_preparation_data = without_main
            try:
                super()._launch(process)  # type: ignore[misc]
            finally:
                forkserver.connect_to_new_process, spawn.get_preparation_data = connect, prepare


class _OwnServer(forkserver.ForkServer):
    """The server that this process was itself forked from."""

    def __init__(self) -> None:
        super().__init__()
        own: Any = forkserver._forkserver  # type: ignore[attr-defined]
        self._forkserver_address, self._forkserver_alive_fd = own._forkserver_address, own._forkserver_alive_fd

    def ensure_running(self) -> None:
        """Start nothing: the server runs as long as a process lives that was forked from it."""
        resource_tracker.ensure_running()


@functools.cache
def _server(preload: tuple[str, ...]) -> forkserver.ForkServer:
    if forkserver._forkserver._forkserver_address is not None and all(name in sys.modules for name in preload):  # type: ignore[attr-defined]
        return _OwnServer()
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(preload))
    return server
