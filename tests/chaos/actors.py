"""The two actor ranks of a campaign: rank 0 in this process, rank 1 in a process of its own that can be stopped and killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rlsync.engine.handles.local import Engine
from rlsync.sync import SyncConfig, WeightSyncer
from tests.chaos.rank import Ended, serve, timed
from tests.integration.engine_source import FolderSource, read_folder
from tests.ranks import make_process

_READY_S = 300.0


class RankLostError(Exception):
    """Rank 1 did not answer in time although it lives."""


class Actors:
    """A syncer on two ranks, each of which fills every second tensor.

    Attributes:
        syncer: rank 0's, connected or not; None before the first connection. connected: whether it is.
        killed, stopped: what was done to rank 1.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = {letter: str(folder) for letter, folder in folders.items()}
        self._source = FolderSource(read_folder(folders["a"]), rank=0, world_size=2)
        self.syncer: WeightSyncer | None = None
        self.stopped = self.killed = self.connected = False
        self._settings: dict[str, Any] = {}
        self._start()

    def _start(self) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self.process: BaseProcess = make_process(serve, other, self._folders)
        self.process.start()
        other.close()
        # What it imports is no part of the connection that comes next, which has a deadline.
        self.tell("read", next(iter(self._folders)))

    # Faults of rank 1.

    def kill(self) -> None:
        """kill -9; returns when the process is gone."""
        self.killed = True
        self.process.kill()
        self.process.join(5)

    def stop(self) -> None:
        """SIGSTOP, until ``go_on``."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)
        self.stopped = True

    def go_on(self) -> None:
        if self.stopped and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGCONT)
        self.stopped = False

    def restore(self) -> None:
        """Start rank 1 anew where it has died."""
        if not self.process.is_alive():
            self._pipe.close()
            self.process.join()
            self.killed = False
            self._start()

    # Collective calls.

    def read(self, letter: str) -> None:
        """Both ranks take the weights of a checkpoint."""
        self._source.take(read_folder(self._folders[letter]))
        self.tell("read", letter)

    def tell(self, method: str, argument: Any) -> None:
        """A call of rank 1 alone, which must end well."""
        self._pipe.send((method, argument))
        ended = self._answer(_READY_S)
        assert ended is not None and ended.error is None, f"rank 1, {method}: {ended}"

    def connect(self, handles: list[Engine], settings: dict[str, Any], revive: Callable[[], None], limit_s: float) -> list[Ended]:
        """Make a new connection, by the same syncer where the settings are the same; see ``_both``. The former one must be closed."""
        assert not self.connected
        if self.syncer is None or settings != self._settings:
            self.syncer = WeightSyncer(self._source, handles, SyncConfig(**settings), rank=0, world_size=2, broadcast=self._broadcast)
        self._settings, self.connected = settings, True
        return self._both("connect", self.syncer.connect, (handles,), settings, revive, limit_s)

    def sync(self, version: int, version_of_rank_1: int, revive: Callable[[], None], limit_s: float) -> list[Ended]:
        """Sync on both ranks; see ``_both``."""
        assert self.syncer is not None
        return self._both("sync", self.syncer.sync, (version,), version_of_rank_1, revive, limit_s)

    def close(self) -> None:
        """Leave the connection on both ranks, as far as they live."""
        if self.syncer is not None and self.connected:
            self.syncer.close()
            self.connected = False
            if self.process.is_alive():
                self.tell("close", None)

    def _both(
        self, method: str, call: Callable[..., Any], arguments: tuple[Any, ...], other: Any, revive: Callable[[], None], limit_s: float
    ) -> list[Ended]:
        """How a collective call ended on rank 0 and, where it lives, on rank 1.

        ``revive`` is called when rank 0's call has ended, and makes rank 1 go on where it was stopped. Raises RankLostError when rank 1
        has not answered ``limit_s`` after that.
        """
        self._pipe.send((method, other))
        ended = [timed(call, *arguments)]
        revive()
        answer = self._answer(limit_s)
        return ended if answer is None else [*ended, answer]

    def _broadcast(self, payload: bytes) -> bytes:
        self._pipe.send(payload)
        return payload

    def _answer(self, limit_s: float) -> Ended | None:
        """Rank 1's next answer, or None where it has died."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            # A process that is forked while the pipe is open keeps it open when rank 1 dies, so that no end of file comes.
            if self._pipe.poll(0.1):
                with contextlib.suppress(EOFError, ConnectionResetError):
                    return self._pipe.recv()
                self.process.join(5)
                return None
            if not self.process.is_alive() and not self._pipe.poll(0.1):
                return None
        raise RankLostError(f"rank 1 has not answered within {limit_s:g} s")

    def end(self) -> None:
        """Close, and end rank 1."""
        self.go_on()
        self.close()
        if self.process.is_alive():
            with contextlib.suppress(BrokenPipeError):
                self._pipe.send(("end", None))
            self.process.join(10)
        self.process.kill()
        self.process.join()
        self._pipe.close()
