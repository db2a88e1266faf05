"""Actor rank 1 of the engine tests, in a process of its own: it does what it is told over a pipe, and can be stopped or killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder


def _curse() -> None:
    raise ZeroDivisionError("the second is cursed")


# What it does to itself before it fills a bucket. Whoever does it from outside does not know how far this rank is.
FAULTS: dict[str, Callable[[], None]] = {
    "curse": _curse,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def serve(pipe: Connection, folder: str, settings: dict[str, Any]) -> None:
    """Answer ``(method, argument)`` with ``("ok", None)`` or ``("error", text)`` until told to ``end``."""
    source = FolderSource(read_folder(folder), rank=1, world_size=2)
    syncer = WeightSyncer(source, (), SyncConfig(**settings), rank=1, world_size=2, broadcast=lambda payload: pipe.recv())

    while True:
        method, argument = pipe.recv()
        try:
            if method == "end":
                syncer.close()
                return
            if method == "connect":
                syncer.connect()
            elif method == "sync":
                syncer.sync(argument)
            elif method == "close":
                syncer.close()
            elif method == "read":
                source.take(read_folder(argument))
            elif method == "fault":
                name, at = argument
                call_on_fill(syncer, lambda bucket, name=name, at=at: FAULTS[name]() if bucket == at else None)
            elif method == "no fault":
                call_on_fill(syncer, lambda bucket: None)
            pipe.send(("ok", None))
        except Exception as error:
            pipe.send(("error", str(error)))
