"""Actor rank 1 of the engine tests, in a process of its own: it does what it is told over a pipe, and can be stopped or killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder


def serve(pipe: Connection, folder: str, settings: dict[str, Any]) -> None:
    """Answer ``(method, argument)`` with ``("ok", None)`` or ``("error", text)`` until told to ``end``."""
    source = FolderSource(read_folder(folder), rank=1, world_size=2)
    syncer = WeightSyncer(source, (), SyncConfig(**settings), rank=1, world_size=2, broadcast=lambda payload: pipe.recv())

    def boom(bucket: int) -> None:
        if bucket == 2:
            raise ZeroDivisionError("the second is cursed")

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
            elif method == "curse":
                call_on_fill(syncer, boom if argument else lambda bucket: None)
            pipe.send(("ok", None))
        except Exception as error:
            pipe.send(("error", str(error)))
