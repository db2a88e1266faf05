"""A process that owns a real engine, to be killed."""

from __future__ import annotations

import sys
import time

from rlsync.engine.handles.local import Engine


def main(folder: str) -> None:
    args = {"model": folder, "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    engine = Engine("owned", args)
    engine.start()
    print("started", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
