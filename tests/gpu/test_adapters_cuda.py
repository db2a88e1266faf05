"""Adapters alone on their way to engines on GPUs: slots and kernels of vLLM, with CUDA graphs, out of sleep, of experts too, in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsync.engine.handles.adapters import lora_arguments
from tests.models import save_tiny_model
from tests.ranks import run_ranks

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
