"""A bench from its start to its table: measure the links, start both sides, run every case on them, say what came out.

Each process has a module: ``floors``, ``host`` (an engine), ``rank`` (an actor rank). Several cases run on the same processes, one after
the other.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rlsync.bench import chart, result, screen, training
from rlsync.bench import spec as specs
from rlsync.bench.memory import Watch
from rlsync.bench.spec import Measured
from rlsync.bench.worker_group import BenchError, WorkerGroup
from rlsync.errors import RlsyncError


def measure(spec: specs.Spec, out: Path, deadline_s: float) -> bool:
    """Run a bench, print its tables, and write bench.json, bench.png and logs/ into ``out``.

    Args:
        deadline_s: by the monotonic clock; then all processes are killed.

    Returns:
        Whether every process and case ended well, and every case left the same weights.
    """
    logs = out / "logs"
    # Those of an earlier bench would be taken for this one's.
    shutil.rmtree(logs, ignore_errors=True)
    failure: BenchError | None = None
    watch: Watch | None = None
    try:
        watch = _run(spec, logs, deadline_s)
    except BenchError as error:
        failure = error
    found = _found(spec)
    right = bool(found) and _tell(spec, found, watch, out)
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    return right and failure is None


def measure_training(spec: training.TrainSpec, out: Path, deadline_s: float, peak_tflops: float | None) -> bool:
    """Run a bench of training, print its table, and write bench.json and logs/ into ``out``. Returns whether every process ended well.

    Args:
        deadline_s: by the monotonic clock; then all processes are killed.
        peak_tflops: of a rank's device, in 10^12 operations a second; None for what is known of it.
    """
    logs, spec_path = out / "logs", Path(spec.folder, "spec.json")
    shutil.rmtree(logs, ignore_errors=True)
    spec_path.write_bytes(msgspec.json.encode(spec))
    try:
        with WorkerGroup(spec, spec_path, logs) as group:
            group.start()
            group.wait(deadline_s, lambda: None)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    found = msgspec.json.decode(spec.outcome_path.read_bytes(), type=training.TrainFound)
    gpus = [{"name": rank.device} for rank in found.ranks if spec.on_gpu]
    whole = training.summary(spec, found, result.describe({"gpus": gpus}), peak_tflops)
    (out / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
    training.show(whole)
    print(f"written: {out / 'bench.json'}")
    return True


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
    """A watch on the memory of the GPUs. Without NVML the bench runs, says so, and has no numbers of the driver."""
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
    whole = result.summary(spec, floors, found, memory, result.describe(floors))
    (out / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
    screen.show(whole)
    excuse = chart.draw(whole, out / "bench.png")
    print(excuse or f"written: {out / 'bench.json'}, {out / 'bench.png'}")
    return all(case["right"] for case in whole["cases"])
