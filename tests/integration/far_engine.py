"""An engine on another host, as the actor holds it: calls over a pipe that is not the network under test."""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

import psutil

from rlsync.engine.handles import SyncOrder, sync_in_turn
from rlsync.engine.handles.local import Engine
from tests.integration import hosts


class FarEngine:
    """An EngineHandle by forwarding. ``took_s``: seconds of the last call of each method, measured where the engine is."""

    def __init__(self, engine_id: str, pipe: Connection) -> None:
        self.engine_id, self.num_workers = engine_id, 1
        self.took_s: dict[str, float] = {}
        self._pipe, self._lock = pipe, threading.Lock()
        self._numbers, self._calls = itertools.count(), dict[int, tuple[str, Future]]()
        threading.Thread(target=self._listen, daemon=True).start()

    def call(self, method: str, *arguments: Any, timeout_s: float | None = 120.0) -> Any:
        with self._lock:
            number, future = next(self._numbers), Future[Any]()
            self._calls[number] = method, future
            self._pipe.send((number, method, arguments))
        return future.result(timeout_s)

    def _listen(self) -> None:
        while True:
            try:
                number, took_s, result, error = self._pipe.recv()
            except EOFError:
                return
            method, future = self._calls.pop(number)
            self.took_s[method] = took_s
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        self.call("init_weight_transfer", init_info, timeout_s)

    def sync(self, order: SyncOrder) -> float:
        return sync_in_turn(self, order)

    def pause(self, mode: str, sync: str, timeout_s: float) -> None:
        self.call("pause", mode, sync, timeout_s)

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        self.call("update_weights", update_info, timeout_s)

    def resume(self, version: int, timeout_s: float) -> None:
        self.call("resume", version, timeout_s)

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        self.call("mark_dirty", reason, sync)

    def generate(self, prompts: Any, sampling: Any) -> Any:
        return self.call("generate", prompts, sampling)


class _Host:
    """What can be asked of the far side besides its engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def listeners(self) -> set[tuple[str, int]]:
        return hosts.listeners()

    def worker(self, what: str) -> None:
        """``suspend``, ``resume`` or ``kill`` the engine's worker process."""
        core = psutil.Process(self._engine._llm.engine_core.resources.engine_manager.processes[0].pid)
        getattr(core.children(recursive=True)[0], what)()

    def num_processes(self) -> int:
        """vLLM's processes, of this engine or left behind by it."""
        return sum("VLLM" in "".join(p.cmdline()) for p in psutil.Process().children(recursive=True))


def serve(engine: Engine, pipe: Connection) -> None:
    """Answer calls, each in a thread of its own, until None comes."""
    host, lock = _Host(engine), threading.Lock()

    def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        started_s, result, error = time.monotonic(), None, None
        try:
            result = getattr(host if hasattr(host, method.lstrip("_")) else engine, method)(*arguments)
        except Exception as caught:
            error = _sendable(caught)
        with lock:
            pipe.send((number, time.monotonic() - started_s, result, error))

    while (call := pipe.recv()) is not None:
        threading.Thread(target=answer, args=call, daemon=True).start()


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
