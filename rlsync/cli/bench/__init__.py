"""``rlsync bench``: how long a sync takes on this machine, beside what the links allow and what others do, in one run.

Owns arguments, and the order: measure the links, start both sides, run every case on them, say what came out. Each process has a
module: ``floors``, ``host`` (an engine), ``rank`` (an actor rank). Several cases run on the same processes, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rlsync.cli.bench import chart, machine, result, screen, work
from rlsync.cli.bench import spec as specs
from rlsync.cli.bench.measured import Measured
from rlsync.cli.bench.memory import Watch
from rlsync.cli.bench.worker_group import BenchError, WorkerGroup
from rlsync.cli.shapes import SHAPES, shape_of
from rlsync.errors import ConfigError, RlsyncError
from rlsync.layout.topology import Topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(SHAPES)}, or a config.json; weights are random, nothing is downloaded")
    add("--actor", default="tp=1", help="sizes of the actor's axes, as tp=2,pp=1; also vpp, cp, dp, ep, etp")
    add("--rollout", default="tp=1", help="the engines, as tp=2,engines=2")
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
        spec = plan(arguments, Path(name))
        logs = arguments.out / "logs"
        # Those of an earlier bench would be taken for this one's.
        shutil.rmtree(logs, ignore_errors=True)
        failure: BenchError | None = None
        watch: Watch | None = None
        try:
            watch = _run(spec, logs, deadline_s)
        except BenchError as error:
            failure = error
        found = _found(spec)
        right = bool(found) and _tell(spec, found, watch, arguments.out)
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    return 0 if right and failure is None else 1


def plan(arguments: argparse.Namespace, folder: Path) -> specs.Spec:
    """All that the bench will do, and config.json in ``folder``. Raises ConfigError or PlacementError for what cannot be."""
    for option in ("steps", "warmup"):
        if getattr(arguments, option) < 1:
            raise ConfigError(f"--{option} is {getattr(arguments, option)}; it must be at least 1")
    config = {**shape_of(arguments.model), "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    axes = specs.sizes(arguments.actor, specs.AXES, "--actor")
    engines = {"tp_size": 1, "num_engines": 1, **specs.sizes(arguments.rollout, specs.ENGINES, "--rollout")}
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


def _run(spec: specs.Spec, logs: Path, deadline_s: float) -> Watch | None:
    """All processes, from start to end. Returns what was seen of the GPUs' memory. Raises BenchError."""
    spec_path = Path(spec.folder, "spec.json")
    specs.write(spec, spec_path)
    watch: Watch | None = None
    unwatched, told = spec.on_gpu, 0

    def look() -> None:
        nonlocal watch, unwatched, told
        if unwatched and spec.floors_path.exists():
            unwatched = False
            watch = _watch(json.loads(spec.floors_path.read_text())["gpus"])
        found = _found(spec)
        for one in found[told:]:
            print(f"{one.kind} {one.name}: {one.error or 'done'}", file=sys.stderr, flush=True)
        told = len(found)

    try:
        with WorkerGroup(spec, spec_path, logs) as group:
            group.start()
            group.wait(deadline_s, look)
    finally:
        if watch is not None:
            watch.stop()
    return watch


def _watch(gpus: Sequence[Mapping[str, Any]]) -> Watch | None:
    """Of the GPUs' memory. Without NVML there is a bench and a word about it, but no numbers of the driver."""
    try:
        return Watch({str(gpu["index"]): gpu["uuid"] for gpu in gpus})
    except RlsyncError as error:
        print(f"warning: {error}; extra memory is what torch and the workers say", file=sys.stderr)
        return None


def _found(spec: specs.Spec) -> list[Measured]:
    """What rank 0 has written so far."""
    return msgspec.json.decode(spec.outcome_path.read_bytes(), type=list[Measured]) if spec.outcome_path.exists() else []


def _tell(spec: specs.Spec, found: Sequence[Measured], watch: Watch | None, out: Path) -> bool:
    """Table, JSON and chart; whether every case is right."""
    floors = json.loads(spec.floors_path.read_text())
    memory = {}
    if watch is not None:
        memory = {i: watch.most_more(one.begin_s, one.end_s) for i, one in enumerate(found) if one.steps}
    whole = result.summary(spec, floors, found, memory, machine.describe(floors))
    (out / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
    screen.show(whole)
    excuse = chart.draw(whole, out / "bench.png")
    print(excuse or f"written: {out / 'bench.json'}, {out / 'bench.png'}")
    return all(case["right"] for case in whole["cases"])
