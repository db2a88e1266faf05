"""Claims about ``rlsync bench``, run as users run it: two Megatron ranks, a real engine, and what others do, on CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlsync.bench import spec
from rlsync.bench.worker_group import BenchError, WorkerGroup
from rlsync.cli.bench import add_arguments, plan
from tests.deadlines import HANG_S, ended_before
from tests.integration.engine_source import ENGINE_ENV

REPO = Path(__file__).resolve().parents[2]
SIDES = ["--model", "tiny", "--actor", "tp=2", "--rollout", "tp=1"]


def test_a_bench_measures_every_case_on_the_same_engines(tmp_path: Path) -> None:
    """Of a model with experts: ranks of the actor have some of them each, workers a slice of each. vLLM on CPU computes no other way."""
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    words = [
        "--model",
        "tiny-moe",
        "--actor",
        "dp=2,ep=2",
        "--rollout",
        "tp=2",
        "--sink",
        "auto,loaders",
        "--mode",
        "params,moved",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--deadline-s",
        "700",
    ]
    words += ["--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "rlsync.cli", "bench", *words], capture_output=True, text=True, timeout=HANG_S,
        env={**os.environ, **ENGINE_ENV, "PYTHONPATH": path, "RLSYNC_LOGGING_LEVEL": "DEBUG"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    said = {name: (tmp_path / "logs" / f"{name}.log").read_text() for name in ("actor0", "actor1", "engine0")}
    for text in ("connected 2 actor ranks and 2 workers of 1 engines", "version 1: fill 0 took", "version 1: sync engine0 took"):
        assert text in said["actor0"], said["actor0"][-3000:]
    assert "version 1: fill 0 took" in said["actor1"]
    for text in ("version 1: all peers have joined", "version 1: bucket 0 of", "version 1: all of it is verified", "version 1: committed"):
        # By two workers.
        assert said["engine0"].count(text) >= 2, said["engine0"][-3000:]
    found = json.loads((tmp_path / "bench.json").read_text())
    ours, moved, loaders, loaders_moved, peer = found["cases"]
    names = ["auto params", "auto moved", "loaders params", "loaders moved"]
    assert [(case["name"], case["kind"], case["right"]) for case in found["cases"]] == [
        *((name, "rlsync", True) for name in names), ("gather-broadcast", "peer", True),
    ]  # fmt: skip
    assert loaders["report"]["sinks"] == ["loaders"]
    held = [worker["held_bytes"] for worker in found["workers"]]
    assert held == [worker["same_bytes"] for worker in found["workers"]]
    for case in (ours, moved, loaders, loaders_moved):
        # Loaders are given tensors of their whole shape, and of these what they read.
        assert case["report"]["bytes"] == sum(held) == found["bytes_to_receive"]
        assert list(case["report"]["redundancy"].values()) == [1.0, 1.0]
        assert case["data_over_floor"] == pytest.approx(case["median"]["data"] / found["floors"]["floor_s"])
    assert found["floors"]["floor_s"] == pytest.approx(max(held) / 1e9 / found["floors"]["same_gb_per_s"]["cpu"])
    for case in found["cases"]:
        assert len(case["steps"]) == 3
        for step in case["steps"]:
            # These follow one another. Waiting and copying are of the slowest worker in each, and workers work side by side.
            moving = "data" if case["kind"] == "peer" else "transfer"
            phases = [step[phase] for phase in ("pause", "gather", moving, "commit", "resume") if phase in step]
            assert 0 < sum(phases) <= step["whole"] and step[moving] > 0
        assert sorted(step["whole"] for step in case["steps"])[1] == case["median"]["whole"]
    row = found["comparisons"][0]
    assert (row["case"], row["peer"]) == ("auto params", "gather-broadcast")
    assert row["whole"] == pytest.approx(peer["median"]["whole"] / ours["median"]["whole"])
    assert "gather-broadcast" in done.stdout
    assert "redundancy" in done.stdout
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"
    assert f"--out {tmp_path}" in found["command"]
    assert found["versions"]["torch"]


def test_a_bench_of_training_measures_packed_steps(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    words = ["--model", "tiny", "--train", "--set", "overlap_grad_reduce=True", "--sequence-length", "64"]
    words += ["--lengths", "spread", "--sequences", "5", "--packing", "--chunk-tokens", "32", "--steps", "2", "--warmup", "1"]
    words += ["--score-micro-batch-tokens", "128"]
    done = subprocess.run(
        [sys.executable, "-m", "rlsync.cli", "bench", *words, "--deadline-s", "700", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=HANG_S, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["tokens"] == found["positions"] == sum(map(sum, found["microbatches"]))
    assert len(found["score_microbatches"]) == 1 < len(found["microbatches"])
    assert len(found["found"]["train_s"]) == len(found["found"]["score_s"]) == 2
    assert len(found["found"]["ranks"]) == 1
    assert found["found"]["losses"][1] < found["found"]["losses"][0], "the same sequences, step after step"
    assert found["memory"]["peak_bytes"] > 0
    assert 0 < found["train"]["share_of_matmul"] == found["train"]["tflops_per_rank"] / found["matmul_tflops"]
    assert found["train"]["share_of_peak"] is None
    assert "of a plain product" in done.stdout


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in p.info["cmdline"] or ())]


def watched(folder: Path, limit_s: float, **changes: object) -> int:
    """Start the processes of a bench and wait for their end; the most there were."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    made = replace(plan(parser.parse_args(SIDES), folder), **changes)  # type: ignore[arg-type]
    spec.write(made, folder / "spec.json")
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, len(processes_of(folder)))

    try:
        with WorkerGroup(made, folder / "spec.json", folder / "logs") as group:
            group.start()
            group.wait(time.monotonic() + limit_s, look)
    finally:
        assert most >= 4, "floors, an engine and two actor ranks"
    return most


def test_a_process_that_fails_ends_all_and_is_quoted(tmp_path: Path) -> None:
    """Here the links cannot be measured, as there is no such GPU, while the others would wait for that for minutes."""
    with ended_before(200), pytest.raises(BenchError, match=r"floors ended with exit code 1(.|\n)*Traceback"):
        watched(tmp_path, 200, devices=("none",))
    assert processes_of(tmp_path) == []


def test_nothing_is_left_of_a_bench_that_is_killed(tmp_path: Path) -> None:
    """Its processes import when it happens, and would wait for the engine for minutes then."""
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "rlsync.cli", "bench", *SIDES, "--peers", "none", "--out", str(tmp_path / "out")]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, **ENGINE_ENV, "PYTHONPATH": path, "TMPDIR": str(temporary)}
    bench = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(processes_of(temporary)) >= 4, HANG_S)
        bench.kill()
        wait_until(lambda: not processes_of(temporary), HANG_S)
    finally:
        bench.kill()
        bench.wait()


def wait_until(true: Callable[[], bool], limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_the_deadline_ends_all_and_names_who_was_still_running(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"deadline of the bench passed(.|\n)*engine0 is running"):
        watched(tmp_path, 1)
    assert processes_of(tmp_path) == []
