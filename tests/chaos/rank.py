"""Actor rank 1 of a campaign, in a process of its own, which can be stopped and killed. Does what it is told over a pipe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import setproctitle

from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder


@dataclass(frozen=True, slots=True)
class Ended:
    """How a collective call ended on one rank: its error or None, and when (``time.monotonic``, the same clock in all processes)."""

    error: BaseException | None
    at_s: float

    @property
    def text(self) -> str | None:
        return None if self.error is None else str(self.error)


def timed(call: Any, *arguments: Any) -> Ended:
    """Make a call, whatever it raises."""
    try:
        call(*arguments)
    except Exception as error:
        return Ended(error, time.monotonic())
    return Ended(None, time.monotonic())


class Cursed(RuntimeError):
    """What a source raises when it is told to."""


def serve(pipe: Connection, folders: dict[str, str]) -> None:
    """Answer each ``(method, argument)`` with how it ended, until told to ``end`` or the other side is gone."""
    # Or it would go by the name of the process that it was forked from, whose likes are no strays.
    setproctitle.setproctitle("actor rank 1")
    source = FolderSource(read_folder(folders["a"]), rank=1, world_size=2)
    syncer: WeightSyncer | None = None
    settings: dict[str, Any] = {}
    while True:
        try:
            method, argument = pipe.recv()
        except EOFError:
            return
        if method == "end":
            return
        if method == "connect":
            if syncer is None or argument != settings:
                syncer = WeightSyncer(source, (), SyncConfig(**argument), rank=1, world_size=2, broadcast=lambda payload: pipe.recv())
            settings = argument
            ended = timed(syncer.connect)
        elif method == "read":
            ended = timed(source.take, read_folder(folders[argument]))
        elif syncer is None:
            ended = Ended(None, time.monotonic())
        elif method == "curse":
            ended = timed(call_on_fill, syncer, lambda bucket, cursed=argument: _raise_at(bucket, cursed))
        else:
            ended = timed(getattr(syncer, method), *(() if argument is None else (argument,)))
        pipe.send(_portable(ended))


def _raise_at(bucket: int, cursed: int) -> None:
    if bucket == cursed:
        raise Cursed(f"bucket {cursed} is cursed")


def _portable(ended: Ended) -> Ended:
    """Errors of ours cross by pickling; of others only the text has to."""
    error = ended.error
    return ended if error is None or isinstance(error, WeightSyncError) else Ended(RuntimeError(str(error)), ended.at_s)
