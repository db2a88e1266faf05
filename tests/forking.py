"""Processes that are forked from one that has imported what they need. Each that is spawned imports Megatron for 5 s, and vLLM for 10."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, ClassVar
from unittest.mock import patch

# A process that was forked from one that asked for GPUs has none.
CAN_FORK = shutil.which("nvidia-smi") is None


class ForkedProcess(ForkServerProcess):
    """Forked from a process that has imported ``preload``, and has no threads. Its environment is that of whoever starts it.

    What is read from the environment when it is imported is that of the first start.
    """

    preload: ClassVar[tuple[str, ...]] = ()

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()

    @staticmethod
    def _Popen(process: Any) -> Any:
        return _Popen(process)


_launching = threading.Lock()


class _Popen(popen_forkserver.Popen):
    def _launch(self, process: Any) -> None:
        server = _server(process.preload)
        # The standard library has one server in a process. Patches of two threads at a time would leave one of them in place.
        with _launching, patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            super()._launch(process)  # type: ignore[misc]


@functools.cache
def _server(preload: tuple[str, ...]) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(preload))
    return server


class EngineProcess(ForkedProcess):
    """An engine's core, which forks its workers."""

    preload = ("tests.integration.warm_vllm",)


class _EngineContext(ForkServerContext):
    Process = EngineProcess  # type: ignore[assignment]


@contextlib.contextmanager
def forked_engines() -> Iterator[None]:
    """Engines that this process starts meanwhile. Nothing changes where there are GPUs.

    vLLM spawns the processes of an engine on CPU, and forks them on CUDA. Tests of ``vllm serve``, Ray, ``rlsync bench`` and whole runs
    leave that to it.
    """
    if not CAN_FORK:
        yield
        return
    from vllm.v1.engine import utils

    with patch.object(utils, "get_mp_context", _EngineContext):
        yield
