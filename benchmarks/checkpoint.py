"""Seconds to save a checkpoint at once and beside training, and to load it, beside plain reads and writes of as many bytes.

``python -m benchmarks.checkpoint --folder DIR``: ranks, each with a GPU where there are some, with a Megatron model in bf16 of random
weights and a distributed optimizer. The floor writes and reads by as many processes side by side, each a file of its own, of a checkpoint's
bytes or of ``_PLAIN_BYTES`` a rank, whose seconds then count as those of all. All writes are on the disk when the clock stops. Every round
is of new processes; what a phase took is said at once, and the disk has one checkpoint at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsync.cli.shapes import SHAPES
from rlsync.layout.topology import Topology
from rlsync.megatron.environment import rank_environment

_PIECE_BYTES = 2**25
_PLAIN_BYTES = 4 * 2**30


def measure(config: Mapping[str, Any], out: Path, axes: Mapping[str, int], *, waits: bool) -> dict[str, float]:
    """On one rank: seconds from barrier to barrier of each way, and GB that all ranks write. Collective.

    ``waits``: also a save that training waits for, which is loaded again.
    """
    import torch.distributed as dist

    from rlsync import AutoBridge
    from rlsync.bridge.checkpoint import begin_checkpoint, load_checkpoint, prepare_saves, save_checkpoint
    from rlsync.copy.writes import HostMemory
    from rlsync.megatron.model import DdpOptions
    from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
    from rlsync.megatron.optimizer_state import allocate_adam_state
    from rlsync.megatron.parallel import initialize_parallel

    began = time.monotonic()
    initialize_parallel(Topology(**axes), seed=1, timeout_s=600)
    bridge = AutoBridge.from_config(config)
    models = bridge.get_model(bf16=True, ddp=DdpOptions(use_distributed_optimizer=True))
    optimizer = build_optimizer(models, OptimizerOptions(lr=1e-3))
    state: dict[str, Any] = {"optimizer": optimizer, "scheduler": build_scheduler(optimizer, SchedulerOptions(max_lr=1e-3))}
    # As after a first step.
    allocate_adam_state(optimizer)
    memory, rank, found = HostMemory(), dist.get_rank(), {}

    def say(name: str, value: float) -> None:
        if rank == 0:
            print(f"{name} {value:.2f}", file=sys.stderr, flush=True)

    def timed(name: str, action: Callable[[], Any], scale: float = 1.0) -> Any:
        dist.barrier()
        began = time.monotonic()
        result = action()
        dist.barrier()
        found[name] = (time.monotonic() - began) * scale
        say(name, found[name])
        return result

    def begin() -> Any:
        return begin_checkpoint(out / "deferred", bridge, models, step=1, memory=memory, **state)

    def remove(path: Path) -> None:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(path)

    say("started_s", time.monotonic() - began)
    if waits:
        timed("save_s", lambda: save_checkpoint(out / "saved", bridge, models, step=1, **state))
        _forget(out)
        timed("load_s", lambda: load_checkpoint(out / "saved", bridge, models, **state))
        remove(out / "saved")
    # As ranks of a run do at their start.
    timed("prepared_s", lambda: prepare_saves(bridge, models, memory, saves_optimizer=True))
    first = timed("first_deferred_s", begin)
    timed("first_written_s", first.finish)
    nbytes = sum(path.stat().st_size for path in (out / "deferred").rglob("*") if path.is_file())
    say("gb", nbytes / 1e9)
    dist.barrier()
    remove(out / "deferred")
    saving = timed("deferred_s", begin)
    timed("written_s", saving.finish)
    remove(out / "deferred")
    own, share = out / f"plain{rank}", nbytes // dist.get_world_size()
    plain = min(share, _PLAIN_BYTES)
    timed("plain_write_s", lambda: _write(own, plain), share / plain)
    _forget(out)
    timed("plain_read_s", lambda: _read(own), share / plain)
    return {"gb": nbytes / 1e9, **found}


def _write(path: Path, nbytes: int) -> None:
    piece = bytes(os.urandom(2**16)) * (_PIECE_BYTES // 2**16)
    with path.open("wb", buffering=0) as stream:
        for begin in range(0, nbytes, _PIECE_BYTES):
            stream.write(piece[: min(_PIECE_BYTES, nbytes - begin)])
        os.fsync(stream.fileno())


def _read(path: Path) -> None:
    piece = bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as stream:
        while stream.readinto(piece):
            pass


def _forget(folder: Path) -> None:
    """Have the next read of the files go to the disk."""
    for path in filter(Path.is_file, folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b", help="shapes, as of rlsync bench; weights are random")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--axes", type=json.loads, default={"dp_size": 2}, help="of the actor, as JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="every round of every rank")
    parser.add_argument("--without-waiting", action="store_true", help="only saves beside training, and none that is loaded again")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        config, out = arguments.child
        print(json.dumps(measure(json.loads(config.read_text()), out, arguments.axes, waits=not arguments.without_waiting)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rounds = _rounds(Path(folder), arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rounds, indent=1) + "\n")
    # Ranks leave a barrier together.
    print(", ".join(f"{name} {statistics.median(ranks[0][name] for ranks in rounds):.2f}" for name in rounds[0][0]))


def _rounds(folder: Path, a: argparse.Namespace) -> list[list[dict[str, float]]]:
    model, out, topology = folder / "config.json", folder / "checkpoint", Topology(**a.axes)
    model.write_text(json.dumps({**SHAPES[a.model], **({} if a.layers is None else {"num_hidden_layers": a.layers})}))
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--axes", json.dumps(a.axes), "--child", str(model), str(out)]
    command += ["--without-waiting"] if a.without_waiting else []
    rounds = []
    for _ in range(a.rounds):
        out.mkdir()
        rounds.append(_run(command, topology))
        shutil.rmtree(out)
    return rounds


def _run(command: Sequence[str], topology: Topology) -> list[dict[str, float]]:
    """What each rank prints."""
    world = topology.world_size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, **rank_environment(topology), "PYTHONWARNINGS": "ignore"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(world)
    ]
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


if __name__ == "__main__":
    main()
