"""Seconds to save and to load a checkpoint, with and without large pages for tensors of the host, beside a plain write of the bytes.

``python -m benchmarks.checkpoint --folder DIR``: one rank, a Megatron Qwen2 of ``--layers`` layers of Qwen2.5-0.5B in bf16 with a
distributed optimizer, on the CPU. Both ways alternate, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import QWEN25_05B

ENVIRONMENT = {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    "PYTHONWARNINGS": "ignore",
}  # fmt: skip


def save_and_load(model: Path, out: Path) -> dict[str, float]:
    """In a process of its own: seconds of one save, one load and one plain write, and what was saved in GB."""
    import torch

    from rlsync import AutoBridge
    from rlsync.bridge.checkpoint import load_checkpoint, save_checkpoint
    from rlsync.layout.topology import Topology
    from rlsync.megatron.model import DdpOptions
    from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
    from rlsync.megatron.parallel import initialize_parallel

    initialize_parallel(Topology(), seed=1, timeout_s=600)
    bridge = AutoBridge.from_pretrained(model)
    models = bridge.get_model(model, topology=Topology(), bf16=True, ddp=DdpOptions(use_distributed_optimizer=True))
    optimizer = build_optimizer(models, OptimizerOptions(lr=1e-3))
    scheduler = build_scheduler(optimizer, SchedulerOptions(max_lr=1e-3))

    def timed(action: Callable[[], object]) -> float:
        began = time.monotonic()
        action()
        return time.monotonic() - began

    save_s = timed(lambda: save_checkpoint(out, bridge, models, step=1, optimizer=optimizer, scheduler=scheduler))
    load_s = timed(lambda: load_checkpoint(out, bridge, models, optimizer=optimizer, scheduler=scheduler))
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    piece = torch.ones(2**26, dtype=torch.uint8).numpy().data

    def write() -> None:
        with (out / "plain").open("wb") as stream:
            for _ in range(-(-nbytes // 2**26)):
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())

    return {"save_s": save_s, "load_s": load_s, "plain_write_s": timed(write), "gb": nbytes / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(save_and_load(*arguments.child)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _compare(Path(folder), arguments.layers, arguments.rounds)


def _compare(folder: Path, num_layers: int, rounds: int) -> None:
    from workers.synthetic import make_seeded_model

    model, out = folder / "model", folder / "checkpoint"
    make_seeded_model(model, {**QWEN25_05B, "num_hidden_layers": num_layers, "max_position_embeddings": 2048}, seed=0)
    results: dict[str, list[dict[str, float]]] = {"0": [], "1": []}
    for _ in range(rounds):
        for large, found in results.items():
            environment = {**os.environ, **ENVIRONMENT, "THP_MEM_ALLOC_ENABLE": large}
            command = [sys.executable, "-m", "benchmarks.checkpoint", "--child", str(model), str(out)]
            found.append(json.loads(subprocess.check_output(command, env=environment, text=True).splitlines()[-1]))
            shutil.rmtree(out)
    for large, found in results.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        print(f"large pages {'on ' if large == '1' else 'off'}: " + ", ".join(f"{key} {value:.2f}" for key, value in medians.items()))


if __name__ == "__main__":
    main()
