"""Adapters alone on their way to engines on GPUs: slots and kernels of vLLM, with CUDA graphs, out of sleep, of experts too, in bf16."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsync.engine.handles.adapters import lora_arguments
from tests.models import save_tiny_model
from tests.ranks import run_ranks
from workers.metrics_log import read_metrics

pytestmark = pytest.mark.timeout(550)

ON_ONE_AND_TWO = pytest.mark.parametrize("num_gpus", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)])
# Half precision has no rounding where the scaling is a power of two: vLLM multiplies what is rounded, and rlsync rounds the product.
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
# Room for an answer that takes longer than a sync.
LENGTH = 4096
# Of the actor on two GPUs. What a worker of two holds of an expert is a multiple of 64, as kernels want it.
MODELS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "qwen2": ({"tp_size": 2}, {}),
    "qwen3_moe": ({"dp_size": 2, "ep_size": 2}, {"hidden_size": 128, "moe_intermediate_size": 128}),
}


@ON_ONE_AND_TWO
@pytest.mark.parametrize("family", MODELS)
def test_engines_that_get_adapters_alone_hold_and_answer_what_those_do_that_load_them_from_a_folder(tmp_path: Path, family, num_gpus):
    """After a sync that failed in the middle, beside a request that ends on the version of its beginning, and after sleep level 2."""
    topology, sizes = MODELS[family]
    folder = save_tiny_model(tmp_path / "hf", family, max_position_embeddings=LENGTH, **sizes)
    outputs = run_ranks(
        num_gpus, "tests.integration.oracle_ranks", "sync_and_compare", timeout_s=500, folder=str(folder),
        topology=topology if num_gpus > 1 else {}, out_dir=str(tmp_path), dtype="bfloat16", enforce_eager=False,
        gpus=["0,1"] if num_gpus > 1 else None, lora=LORA, lora_sync="adapter", serves_adapters=True, fresh=False, pause_mode="keep",
        options={**lora_arguments(LORA["r"]), "max_model_len": LENGTH, "enable_sleep_mode": True}, transport="ipc", verify="full",
    )  # fmt: skip
    print(f"ADAPTERS {family}: " + outputs[0][outputs[0].index("ORACLE") :].splitlines()[0])


RUN = (
    "actor.model.precision=bf16", "actor.model.tensor_model_parallel_size=1", "actor.lora.r=16", "weight_sync.lora=adapter",
    "weight_sync.verify=full", "runner.max_steps=4", "runner.save_interval=-1", "runner.val_before_train=False", "data.val_data_paths=[]",
    "rollout.gpu_memory_utilization=0.2", "warm_start.num_steps=60", "actor.offload_weight=True",
)  # fmt: skip


@pytest.mark.gpu(1)
def test_a_collocated_run_sends_its_base_once_although_engines_sleep(tmp_path: Path):
    """At level 1, which keeps it in host memory; the log-probabilities of engines are those of the actor within what bf16 resolves."""
    command = [
        sys.executable, "-m", "tests.integration.grpo_run", "none", "--placement", '{"actor,rollout,reward": "0"}',
        f"runner.output_dir={tmp_path}", "runner.experiment_name=run", *RUN,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [line for line in read_metrics(tmp_path / "run") if line["step"]]
    print("RUN", [(line["sync/bytes"], line["sync/held_bytes"], line["rollout/logprob_diff_mean"]) for line in lines], flush=True)
    assert lines[0]["sync/held_bytes"] == 0
    assert all(line["sync/bytes"] + line["sync/held_bytes"] == lines[0]["sync/bytes"] for line in lines)
    assert all(0 < line["sync/bytes"] < line["sync/held_bytes"] for line in lines[1:])
    assert all(line["time/engine_sleep"] > 0 for line in lines)
    assert all(line["rollout/logprob_diff_mean"] <= 0.02 for line in lines)
