"""vLLM on CUDA kept equal to a Megatron actor on CUDA: the oracle on one and two GPUs, and the GRPO loop on two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlsync import Topology
from tests.gpu.engines import KV_CACHE_BYTES, LAYERS
from tests.models import save_tiny_model
from tests.ranks import run_ranks
from workers.metrics_log import read_metrics

# Weights are stale after a step, until a sync gathers them.
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(450)


@pytest.mark.parametrize("spec", LAYERS)
@pytest.mark.parametrize(
    ("family", "tied", "topology", "enforce_eager"),
    [
        pytest.param("qwen2", True, {}, True, marks=pytest.mark.gpu(1)),
        pytest.param("qwen3", False, {}, False, marks=pytest.mark.gpu(1)),
        pytest.param("qwen2", False, {"tp_size": 2}, True, marks=pytest.mark.gpu(2)),
        pytest.param("llama", True, {"pp_size": 2}, True, marks=pytest.mark.gpu(2)),
        pytest.param("qwen3", True, {"dp_size": 2}, False, marks=pytest.mark.gpu(2)),
    ],
)
def test_a_synced_engine_answers_like_a_fresh_one(tmp_path, family, tied, topology, enforce_eager, spec):
    """bf16, with and without CUDA graphs; actor rank 0 and the engine share a GPU."""
    folder = save_tiny_model(tmp_path / "hf", family, tied=tied)
    ddp = OVERLAPPED if "dp_size" in topology else {}
    outputs = run_ranks(
        Topology(**topology).world_size, "tests.integration.oracle_ranks", "sync_and_compare", timeout_s=400, folder=str(folder),
        topology=topology, out_dir=str(tmp_path), dtype="bfloat16", enforce_eager=enforce_eager, ddp=ddp, spec=spec,
    )  # fmt: skip
    print(outputs[0][outputs[0].index("ORACLE") :].splitlines()[0])


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("placement", "tp_size"),
    [({"actor": "0", "rollout,reward": "1"}, 1), ({"actor,rollout,reward": "0-1"}, 2)],
    ids=["disaggregated", "collocated"],
)
def test_reward_rises_in_bf16(tmp_path, placement, tp_size):
    command = [
        sys.executable, "-m", "tests.integration.grpo_run", "none", "--placement", json.dumps(placement), f"runner.output_dir={tmp_path}",
        "runner.experiment_name=run", f"arithmetic.path={tmp_path}/world", "runner.max_steps=20", "runner.save_interval=20",
        "actor.model.precision=bf16", f"actor.model.tensor_model_parallel_size={tp_size}", "rollout.gpu_memory_utilization=0.2",
        f"rollout.vllm.kv_cache_memory_bytes={KV_CACHE_BYTES}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    print(done.stdout)
    lines = read_metrics(tmp_path / "run")
    rewards = [line["rollout/reward_scores"] for line in lines]
    assert sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 >= 0.2, rewards
    # What bf16 kernels of two programs differ by; without a sync the difference grows past it within a few steps.
    assert all(line["rollout/logprob_diff_mean"] <= 3e-2 for line in lines)
