"""A process that owns a real engine, to be killed."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

from rlsync.engine.handles.local import Engine
from tests.integration.engine_source import NUM_BLOCKS


def main(pipe: Connection, folder: str) -> None:
    """Sends the pids of the engine's processes when it has started."""
    args = {"model": folder, "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    engine = Engine("owned", {**args, "num_gpu_blocks_override": NUM_BLOCKS})
    engine.start()
    pipe.send([process.pid for process in engine._processes.seen])
    time.sleep(600)
