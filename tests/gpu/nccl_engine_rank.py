"""Actor rank 1 of ``test_nccl_sync``, in a process and on a GPU of its own; it stays in its fills, where it can be killed."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from rlsync.sync import SyncConfig, WeightSyncer
from tests.integration.engine_source import FolderSource, call_on_fill, read_folder


def serve(pipe: Connection, folder: str, gpu: int, settings: dict[str, Any], slow_s: float) -> None:
    """Connect and take part in two syncs; the second stays in each fill for ``slow_s``."""
    torch.cuda.set_device(gpu)
    tensors = {name: t.cuda() for name, t in read_folder(folder).items()}
    syncer = WeightSyncer(
        FolderSource(tensors, rank=1, world_size=2), (), SyncConfig(**settings), rank=1, world_size=2, broadcast=lambda payload: pipe.recv()
    )
    syncer.connect()
    syncer.sync(0)
    call_on_fill(syncer, lambda bucket: time.sleep(slow_s))
    syncer.sync(1)
