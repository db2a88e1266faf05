"""``rlsync bench``: how long a sync takes on this machine, beside what the links allow and what others do, in one run."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import tempfile
import time
from pathlib import Path

from rlsync.bench import run as bench
from rlsync.bench import spec as specs
from rlsync.bench import work
from rlsync.cli.scene import AXES, ENGINES, sizes
from rlsync.cli.shapes import SHAPES, shape_of
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology

# Of an engine whose data-parallel ranks are processes of their own there is no measurement.
_ENGINES = {name: field for name, field in ENGINES.items() if name != "dp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(SHAPES)}, or a config.json; weights are random, nothing is downloaded")
    add("--actor", default="tp=1", help="sizes of the actor's axes, as tp=2,pp=1; also vpp, cp, dp, ep, etp")
    add("--rollout", default="tp=1", help="the engines, as tp=2,engines=2; ep=tp for expert parallelism")
    add("--placement", choices=specs.PLACEMENTS, default="collocated", help="engines on the actor's GPUs, or on the ones after them")
    add("--transport", help="weight_sync.transport; this and the next four may be lists, as direct,loaders: every combination is run")
    add("--sink", help="weight_sync.sink")
    add(
        "--mode",
        help="params: straight from the actor's parameters where that can be; ring: always through staging buckets; "
        "moved: as params, with the weights away between syncs",
    )
    add("--bucket-bytes", help="weight_sync.bucket_bytes")
    add("--num-slots", help="weight_sync.num_slots")
    add("--verify", help="weight_sync.verify")
    add("--peers", help=f"of {', '.join(specs.PEERS)}; none; default: all that can be on this placement and device")
    add("--steps", type=int, default=10, help="measured steps of each case")
    add("--warmup", type=int, default=3, help="steps before them")
    add(
        "--layers",
        choices=("auto", "local", "te"),
        default="auto",
        help="of the actor: Megatron-Core's local ones, TransformerEngine's, or auto: TransformerEngine's where it is installed",
    )
    add("--cuda-graphs", action="store_true", help="let the engines compile and capture, which takes a minute more to start")
    add("--timeout-s", type=float, default=120.0, help="weight_sync.timeout_s, and of each call of an engine")
    add("--deadline-s", type=float, default=1200.0, help="of the whole bench; then all processes are killed")
    add("--out", type=Path, default=Path("rlsync-bench"), help="folder for bench.json, bench.png and logs/")


def run(arguments: argparse.Namespace) -> int:
    """Run the bench and print its tables; 1 where a process or a case failed, or a case left other weights than the rest.

    Raises ConfigError or PlacementError before anything starts.
    """
    deadline_s = time.monotonic() + arguments.deadline_s
    with tempfile.TemporaryDirectory(prefix="rlsync-bench-") as name:
        return 0 if bench.measure(plan(arguments, Path(name)), arguments.out, deadline_s) else 1


def plan(arguments: argparse.Namespace, folder: Path) -> specs.Spec:
    """All that the bench will do, and config.json in ``folder``. Raises ConfigError or PlacementError for what cannot be."""
    for option in ("steps", "warmup"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option} is {getattr(arguments, option)}; it must be at least 1")
    config = {**shape_of(arguments.model), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    axes = sizes(arguments.actor, AXES, "--actor")
    engines = {"tp_size": 1, "ep_size": 1, "num_engines": 1, **sizes(arguments.rollout, _ENGINES, "--rollout")}
    devices = _devices()
    common = {"timeout_s": arguments.timeout_s, "verify": arguments.verify}
    num_actors = Topology(**axes).world_size
    actor_gpus, engine_gpus = specs.devices_of(arguments.placement, num_actors, engines["num_engines"], engines["tp_size"], devices)
    spec = specs.Spec(
        model=arguments.model,
        config=config,
        axes=axes,
        num_engines=engines["num_engines"],
        engine_tp=engines["tp_size"],
        engine_ep=engines["ep_size"],
        placement=arguments.placement,
        cases=specs.cases(
            {option: getattr(arguments, option.replace("-", "_")) for option in specs.LISTS},
            {key: value for key, value in common.items() if value is not None},
        ),
        peers=specs.peers(arguments.peers, specs.scene(arguments.placement, devices, actor_gpus, engine_gpus)),
        steps=arguments.steps,
        warmup=arguments.warmup,
        timeout_s=arguments.timeout_s,
        start_s=arguments.deadline_s,
        folder=str(folder),
        actor_gpus=actor_gpus,
        engine_gpus=engine_gpus,
        devices=devices,
        cuda_graphs=arguments.cuda_graphs,
        layers=specs.layers_of(arguments.layers, devices),
        token=secrets.token_hex(16),
    )
    # Both sides on paper: what does not fit is said before anything starts.
    work.lay_out(spec)
    (folder / "config.json").write_text(json.dumps(config))
    return spec


def _devices() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may name, in torch's order; none on CPU. Makes no context."""
    import torch

    count = torch.cuda.device_count()
    named = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word]
    return tuple(named[:count]) if named else tuple(map(str, range(count)))
