"""Router replay with routes of a real engine: under R3 the actor routes as the engine did, and its log-probabilities stay as close to it.

Two runs of the tiny model with experts in bf16, with the same weights, which differ in ``actor.megatron.router_replay`` alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.metrics_log import read_metrics

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(900)]

REPO = Path(__file__).resolve().parents[2]
# The engine on a GPU of its own where there are two.
PLACEMENT = '{"actor": "0", "rollout,reward": "1"}' if torch.cuda.device_count() > 1 else '{"actor,rollout,reward": "0"}'
# More experts and layers than the CPU default has, in bf16: near ties, which the two sides break differently.
OVERRIDES = (
    "actor.model.precision=bf16", "actor.model.expert_model_parallel_size=1", "arithmetic.num_experts=32", "arithmetic.num_layers=4",
    "runner.max_steps=6", "runner.save_interval=-1", "runner.val_before_train=False", "data.val_data_paths=[]",
    "rollout.gpu_memory_utilization=0.2", "rollout.enable_return_routed_experts=True", "warm_start.num_steps=60",
)  # fmt: skip


def metrics(root: Path, mode: str) -> list[dict[str, Any]]:
    command = [
        sys.executable, "-m", "tests.integration.grpo_run", "none", "--placement", PLACEMENT,
        "--config", "arithmetic-grpo-moe-megatron", f"runner.output_dir={root}", f"runner.experiment_name={mode}",
        f"actor.megatron.router_replay={mode}", *OVERRIDES,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [line for line in read_metrics(root / mode) if line["step"]]


def test_with_r3_no_token_is_routed_differently_and_log_probabilities_come_no_farther(tmp_path):
    found = {mode: metrics(tmp_path, mode) for mode in ("off", "R3")}
    for mode, lines in found.items():
        print(mode, [(line["moe/route_mismatch"], line["rollout/logprob_diff_mean"]) for line in lines], flush=True)
    assert all(line["moe/route_mismatch"] == 0 for line in found["R3"])
    # The control: left to itself the actor takes other ways, and the engine's routes are not its own read back.
    assert any(line["moe/route_mismatch"] > 0 for line in found["off"])
    # At the first step both runs have the same weights and answers. What is left is what bf16 resolves, on a model that is sure of them.
    first = {mode: lines[0]["rollout/logprob_diff_mean"] for mode, lines in found.items()}
    assert first["R3"] <= first["off"] <= 0.01, first
