"""``rlsync bench`` on GPUs: every way of rlsync and of its peers leaves the same weights in the same engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.engines import LAYERS

REPO = Path(__file__).resolve().parents[2]


def bench(out: Path, *words: str) -> dict:
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    command = [
        sys.executable,
        "-m",
        "rlsync.cli",
        "bench",
        "--model",
        "qwen2.5-0.5b",
        "--steps",
        "5",
        "--warmup",
        "2",
        "--deadline-s",
        "250",
    ]
    done = subprocess.run([*command, *words, "--out", str(out)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]
    found: dict = json.loads((out / "bench.json").read_text())
    return found


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("words", "peers"),
    [
        (
            ["--actor", "tp=2", "--rollout", "tp=2", "--mode", "params,ring", "--sink", "auto,layerwise,loaders"],
            ["gather-broadcast", "vllm-ipc"],
        ),
        (["--actor", "tp=1", "--rollout", "tp=1", "--placement", "disaggregated"], ["gather-broadcast", "vllm-nccl"]),
        pytest.param(
            ["--actor", "tp=2", "--rollout", "tp=2", "--layers", "te", "--peers", "gather-broadcast"],
            ["gather-broadcast"],
            marks=pytest.mark.skipif("te" not in LAYERS, reason="TransformerEngine is not installed"),
        ),
    ],
    ids=["collocated", "disaggregated", "transformer-engine"],
)
def test_every_way_leaves_the_same_weights(tmp_path: Path, words: list[str], peers: list[str]) -> None:
    found = bench(tmp_path, *words)
    assert all(case["right"] for case in found["cases"])
    assert found["layers"] == ("te" if "te" in LAYERS else "local"), "of the actor: TransformerEngine's where it is installed"
    assert [case["name"] for case in found["cases"] if case["kind"] == "peer"] == peers
    for case in found["cases"]:
        # The driver counts what torch does not. Peers keep more with each transfer.
        assert case["kind"] == "peer" or max(case["extra_memory"]["gpu_bytes"].values()) < 8 * 2**30
        assert case["data_over_floor"] > 0.8, "nothing is faster than a plain copy of the same bytes"
