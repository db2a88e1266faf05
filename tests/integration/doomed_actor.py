"""An actor in a process of its own that stands still in the midst of a sync over HTTP, to be killed. Imports no vLLM."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from rlsync.engine.handles.http import HttpEngine
from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder

BUCKET_BYTES = 100_000
_SIGN = "in bucket 2"


def start_doomed_actor(url: str, api_key: str, folder: Path, timeout_s: float) -> subprocess.Popen[str]:
    """Returns when it is in the midst of its sync. Whoever calls kills it."""
    command = [sys.executable, "-m", __name__, url, api_key, str(folder), str(timeout_s)]
    actor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    assert actor.stdout.readline() == f"{_SIGN}\n"
    return actor


def main(url: str, api_key: str, folder: str, timeout_s: str) -> None:
    def stand_still(bucket: int) -> None:
        if bucket == 2:
            print(_SIGN, flush=True)
            time.sleep(600)

    engine = HttpEngine(url, engine_id="served", api_key=api_key)
    config = SyncConfig(bucket_bytes=BUCKET_BYTES, timeout_s=float(timeout_s))
    with WeightSyncer(FolderSource(read_folder(folder)), [engine], config) as syncer:
        syncer.connect()
        call_on_fill(syncer, stand_still)
        syncer.sync(99)


if __name__ == "__main__":
    main(*sys.argv[1:])
