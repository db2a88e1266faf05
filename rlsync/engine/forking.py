"""Processes of engines on CPU, forked from one that has imported vLLM: each that vLLM spawns would import it anew, for ten seconds.

vLLM spawns them because of the number of OpenMP threads, which a forked process cannot choose any more. With
``VLLM_CPU_OMP_THREADS_BIND=nobind``, as runs without GPUs have it, there is nothing to choose. Imports no vLLM.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, ClassVar


def is_asked_for() -> bool:
    """Whether engines that this process starts on CPU are forked."""
    return os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"


@contextlib.contextmanager
def imports_without_collection() -> Iterator[None]:
    """For the imports of a whole framework: nothing of them is garbage, and looking for some takes a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class ForkedProcess(ForkServerProcess):
    """Forked from a process that has imported ``preload``, and has no threads. Its environment is that of whoever starts it.

    What is read from the environment when it is imported is that of the first start.
    """

    preload: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def get_ready(cls) -> None:
        """Start the process that others will be forked from, which then imports; returns at once. Idempotent."""
        _server(cls.preload).ensure_running()

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        # What was imported stays. Collections that look at it copy its pages, for more than a second in an engine's start.
        gc.freeze()
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()

    @staticmethod
    def _Popen(process: Any) -> Any:
        return _Popen(process)


class EngineProcess(ForkedProcess):
    """An engine's core, which forks its workers."""

    preload: ClassVar[tuple[str, ...]] = ("rlsync.engine.compat.warm",)

    def run(self) -> None:
        from rlsync.engine.compat.engine import end_without_collection, fork_workers, wait_without_spinning

        fork_workers()
        end_without_collection()
        wait_without_spinning()
        super().run()


class EngineContext(ForkServerContext):
    """What vLLM starts an engine's core with."""

    Process = EngineProcess  # type: ignore[assignment]


_launching = threading.Lock()


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        server = _server(process.preload)
        # The standard library has one server in a process, and connects to that.
        with _launching:
            connect = forkserver.connect_to_new_process
            forkserver.connect_to_new_process = server.connect_to_new_process
            try:
                super()._launch(process)  # type: ignore[misc]
            finally:
                forkserver.connect_to_new_process = connect


class _OwnServer(forkserver.ForkServer):
    """The server that this process was itself forked from."""

    def __init__(self) -> None:
        super().__init__()
        own: Any = forkserver._forkserver  # type: ignore[attr-defined]
        self._forkserver_address, self._forkserver_alive_fd = own._forkserver_address, own._forkserver_alive_fd

    def ensure_running(self) -> None:
        """It runs as long as a process lives that was forked from it."""
        resource_tracker.ensure_running()


@functools.cache
def _server(preload: tuple[str, ...]) -> forkserver.ForkServer:
    if forkserver._forkserver._forkserver_address is not None and all(name in sys.modules for name in preload):  # type: ignore[attr-defined]
        return _OwnServer()
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(preload))
    return server
