"""An engine in a process of its own, as rank 0 holds it: calls over a socket file, several at a time.

Knows the methods of an engine and no vLLM. Both ends are processes of one bench, which share a secret; what arrives is unpickled.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from rlsync.engine.handles import PauseMode, SyncOrder
from rlsync.errors import RlsyncError

_POLL_S = 0.05
_DEPTH = 16


def serve(engine: Any, path: str, token: str) -> None:
    """Answer calls to ``engine`` until its ``close`` was called, or whoever connected first has gone."""
    ended = threading.Event()
    listener = Listener(path, family="AF_UNIX", backlog=_DEPTH, authkey=token.encode())

    def accept() -> None:
        lifeline = True
        while not ended.is_set():
            connection = listener.accept()
            threading.Thread(target=_answer, args=(connection, engine, ended, lifeline), daemon=True).start()
            lifeline = False

    threading.Thread(target=accept, daemon=True).start()
    ended.wait()
    engine.close()


def _answer(connection: Connection, engine: Any, ended: threading.Event, lifeline: bool) -> None:
    try:
        while True:
            name, arguments = connection.recv()
            connection.send(_outcome(engine, name, arguments))
            if name == "close":
                ended.set()
    except (EOFError, OSError):
        # Of a caller that is gone nothing more is to be heard; without the first one, nobody is left to close the engine.
        if lifeline:
            ended.set()


def _outcome(engine: Any, name: str, arguments: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    try:
        member = getattr(engine, name)
        return (member(*arguments) if callable(member) else member), None
    except RlsyncError as error:
        return None, error
    except Exception as error:
        # Its class may not be importable over there.
        return None, RlsyncError("".join(traceback.format_exception(error)).strip())


class RemoteEngine:
    """An EngineHandle whose engine is served by another process. Any thread may call."""

    def __init__(self, engine_id: str, path: str, token: str, timeout_s: float) -> None:
        """Wait until the engine has started. Raises RlsyncError after ``timeout_s``."""
        self.engine_id = engine_id
        self._path, self._token = path, token
        self._lock = threading.Lock()
        self._lifeline = self._first(time.monotonic() + timeout_s, timeout_s)
        self._idle: list[Connection] = []
        self.num_workers: int = self._call("num_workers")

    def _first(self, deadline_s: float, timeout_s: float) -> Connection:
        while True:
            try:
                return self._connect()
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline_s:
                    raise RlsyncError(f"engine {self.engine_id} did not start within {timeout_s:g} s; see its log") from None
                time.sleep(_POLL_S)

    def _connect(self) -> Connection:
        return Client(self._path, family="AF_UNIX", authkey=self._token.encode())

    def _call(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = self._connect() if connection is None else connection
        try:
            connection.send((name, arguments))
            result, error = connection.recv()
        except (EOFError, OSError) as cause:
            raise RlsyncError(f"the process of engine {self.engine_id} is gone: {cause!r}; see its log") from None
        with self._lock:
            self._idle.append(connection)
        if error is not None:
            raise error
        return result

    @property
    def state(self) -> str:
        return str(self._call("state"))

    @property
    def version(self) -> int | None:
        version: int | None = self._call("version")
        return version

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        self._call("init_weight_transfer", init_info, timeout_s)

    def sync(self, order: SyncOrder) -> float:
        seconds: float = self._call("sync", order)
        return seconds

    def pause(self, mode: PauseMode, sync: str, timeout_s: float) -> None:
        self._call("pause", mode, sync, timeout_s)

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        self._call("update_weights", update_info, timeout_s)

    def reset_caches(self, timeout_s: float) -> None:
        self._call("reset_caches", timeout_s)

    def resume(self, version: int | None, timeout_s: float) -> None:
        self._call("resume", version, timeout_s)

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        self._call("mark_dirty", reason, sync)

    def call_workers(self, method: str, arguments: Sequence[Any], timeout_s: float) -> list[Any]:
        result: list[Any] = self._call("call_workers", method, tuple(arguments), timeout_s)
        return result

    def close(self) -> None:
        """End the engine and its process."""
        self._call("close")
