"""Seconds to load, export and save a model beside mbridge, from the same Megatron shards, in turns.

    pip install --no-deps --target DIR mbridge==0.15.1
    python -m benchmarks.beside_mbridge --mbridge DIR --out benchmarks/raw/NAME.json

Qwen2.5-0.5B's shapes in bf16 on the CPU, gloo, one process a rank. mbridge expects TransformerEngine's names; here it is told those of
Megatron's local spec, and is given the models that ``AutoBridge.get_model`` built. Both exports are first compared bit by bit. An
export counts as done when every tensor was yielded; what was yielded is not read, as mbridge yields views where it can.
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
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.paper import QWEN25_05B

# Names of Megatron's local spec that mbridge's tables lack, in the tables where it looks for them.
_LOCAL_NAMES = {
    "_MLP_MAPPING": {"pre_mlp_layernorm.weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"]},
    "_OTHER_MAPPING": {"input_layernorm.weight": ["model.layers.{layer_number}.input_layernorm.weight"]},
}


def measure(model: Path, mbridge: Path, out: Path, rounds: int) -> dict[str, Any]:
    """On every rank: seconds of each operation of both, ours first in even rounds. Collective."""
    import torch
    import torch.distributed as dist

    from rlsync import AutoBridge
    from rlsync.layout.topology import Topology
    from rlsync.megatron.parallel import initialize_parallel

    initialize_parallel(Topology(tp_size=int(os.environ["WORLD_SIZE"])), seed=1, timeout_s=900)
    ours = AutoBridge.from_pretrained(model)
    models = ours.get_model(model, bf16=True, wrap_with_ddp=False)
    sys.path.append(str(mbridge))
    from mbridge import AutoBridge as MBridge

    theirs = MBridge.from_pretrained(str(model))
    for table, rows in _LOCAL_NAMES.items():
        setattr(theirs, table, getattr(theirs, table) | rows)
    with torch.no_grad():
        theirs.load_weights(models, str(model))
        exported = {name: tensor.clone() for name, tensor in theirs.export_weights(models)}
        for name, tensor in ours.export_weights(models):
            assert torch.equal(tensor, exported.pop(name)), name
        assert not exported, sorted(exported)

        def timed(action: Callable[[], object]) -> float:
            dist.barrier()
            began = time.perf_counter()
            action()
            dist.barrier()
            return time.perf_counter() - began

        def consume(bridge: Any) -> None:
            for _ in bridge.export_weights(models):
                pass

        operations: dict[str, Callable[[Any], object]] = {
            "load": lambda bridge: bridge.load_weights(models, str(model)),
            "export": consume,
            "save": lambda bridge: bridge.save_weights(models, str(out / type(bridge).__module__)),
        }
        seconds: dict[str, dict[str, list[float]]] = {name: {"rlsync": [], "mbridge": []} for name in operations}
        for turn in range(rounds):
            for name, operation in operations.items():
                pair = [("rlsync", ours), ("mbridge", theirs)]
                for side, bridge in pair if turn % 2 == 0 else reversed(pair):
                    seconds[name][side].append(timed(lambda o=operation, b=bridge: o(b)))  # type: ignore[misc]
    return seconds


def _ranks(tp_size: int, arguments: argparse.Namespace, model: Path, out: Path) -> dict[str, Any]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.beside_mbridge", "--mbridge", str(arguments.mbridge), "--rounds", str(arguments.rounds)]
    environment = {**os.environ, "WORLD_SIZE": str(tp_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    children = [
        subprocess.Popen(
            [*command, "--child", str(model), str(out)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(tp_size)
    ]
    output = children[0].communicate()[0]
    if any(child.wait() for child in children):
        raise SystemExit(f"a rank of TP={tp_size} failed")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbridge", type=Path, required=True, help="folder that mbridge was installed into")
    parser.add_argument("--tp", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--layers", type=int, default=QWEN25_05B["num_hidden_layers"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="file for all seconds of all rounds")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child[0], arguments.mbridge, arguments.child[1], arguments.rounds)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _compare(Path(folder), arguments)


def _compare(folder: Path, arguments: argparse.Namespace) -> None:
    from workers.synthetic import make_seeded_model

    model = folder / "model"
    make_seeded_model(model, {**QWEN25_05B, "num_hidden_layers": arguments.layers, "max_position_embeddings": 2048}, seed=0)
    began, load_before = datetime.now(UTC), os.getloadavg()[0]
    results: dict[str, Any] = {}
    for tp_size in arguments.tp:
        results[f"tp{tp_size}"] = found = _ranks(tp_size, arguments, model, folder / "saved")
        shutil.rmtree(folder / "saved")
        for name, sides in found.items():
            rlsync, mbridge = (statistics.median(sides[side]) for side in ("rlsync", "mbridge"))
            print(f"TP={tp_size} {name}: rlsync {rlsync:.3f} s, mbridge {mbridge:.3f} s, {mbridge / rlsync:.2f} x as fast as mbridge")
    if arguments.out is not None:
        facts = {"began": began.isoformat(), "cores": os.cpu_count(), "load_before": load_before, "load_after": os.getloadavg()[0]}
        facts |= {"layers": arguments.layers, "rounds": arguments.rounds, "tp": arguments.tp}
        arguments.out.write_text(json.dumps({"facts": facts, "seconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
