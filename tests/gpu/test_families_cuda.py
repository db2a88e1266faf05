"""Families with experts and with pictures on GPUs: after syncs an engine answers like a fresh one, in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.engines import LAYERS
from tests.integration.test_oracle import NAMED
from tests.models import LATENT_SIZES, save_tiny_model
from tests.ranks import run_ranks
from tests.vision_models import save_tiny_vision_model

pytestmark = pytest.mark.timeout(550)

EXPERT_PARALLEL = {"dp_size": 2, "ep_size": 2}
# The actor's layout on two GPUs; on one it has none.
EXPERTS = {
    "qwen3_moe": EXPERT_PARALLEL,
    "mixtral": {"tp_size": 2, "etp_size": 2},
    "qwen2_moe": {"tp_size": 2, "ep_size": 2},
    "glm4_moe": EXPERT_PARALLEL,
    "deepseek_v3": EXPERT_PARALLEL,
    "moonlight": {"tp_size": 2, "ep_size": 2},
}
PICTURES = {"qwen2_5_vl": {"tp_size": 2}, "qwen3_vl": {"pp_size": 2}, "qwen3_vl_moe": EXPERT_PARALLEL}
ON_ONE_AND_TWO = pytest.mark.parametrize("num_gpus", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)])


def oracle(tmp_path: Path, folder: Path, num_gpus: int, topology: dict[str, int], spec: str, **options: object) -> None:
    topology = topology if num_gpus > 1 else {}
    if topology.get("tp_size", 1) > 1:
        options["actor_overrides"] = {"sequence_parallel": True}  # which Megatron asks for beside experts
    outputs = run_ranks(
        num_gpus, "tests.integration.oracle_ranks", "sync_and_compare", timeout_s=500, folder=str(folder), topology=topology,
        out_dir=str(tmp_path), dtype="bfloat16", spec=spec, **options,
    )  # fmt: skip
    print(outputs[0][outputs[0].index("ORACLE") :].splitlines()[0])


def expert_folder(folder: Path, family: str) -> Path:
    """What a worker of two holds of an expert is a multiple of 64, as kernels want it."""
    sizes = {} if family == "mixtral" else {"moe_intermediate_size": 128}
    sizes |= LATENT_SIZES if family in ("deepseek_v3", "moonlight") else {}
    return save_tiny_model(folder, family, hidden_size=128, **sizes)


@ON_ONE_AND_TWO
@pytest.mark.parametrize("spec", LAYERS)
@pytest.mark.parametrize("family", EXPERTS)
def test_a_synced_engine_with_experts_answers_like_a_fresh_one(tmp_path, family, spec, num_gpus):
    """On two GPUs the engine cuts its experts over two workers."""
    folder = expert_folder(tmp_path / "hf", family)
    oracle(tmp_path, folder, num_gpus, EXPERTS[family], spec, gpus=["0,1"] if num_gpus > 1 else None)


@ON_ONE_AND_TWO
def test_an_engine_gets_merged_adapters_of_all_that_can_be_named(tmp_path, num_gpus):
    """Embedding, head, routers and experts; the fresh engine starts from the folder into which they were merged."""
    folder = expert_folder(tmp_path / "hf", "qwen3_moe")
    oracle(tmp_path, folder, num_gpus, EXPERTS["qwen3_moe"], LAYERS[-1], gpus=["0,1"] if num_gpus > 1 else None, lora=NAMED)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("parallel", [{}, {"tensor_parallel_size": 1, "data_parallel_size": 2}], ids=["two-workers", "two-replicas"])
@pytest.mark.parametrize("family", ["qwen3_moe", "moonlight"])
def test_a_synced_engine_that_shares_experts_answers_like_a_fresh_one(tmp_path, family, parallel):
    """Two workers cut all but the experts, two replicas have it whole; either has half of the experts, and gets no others."""
    folder = expert_folder(tmp_path / "hf", family)
    options = {"enable_expert_parallel": True, **parallel}
    oracle(tmp_path, folder, 2, EXPERTS[family], LAYERS[-1], gpus=["0,1"], options=options)


@ON_ONE_AND_TWO
@pytest.mark.parametrize("spec", LAYERS)
@pytest.mark.parametrize("family", PICTURES)
def test_a_synced_engine_that_takes_pictures_answers_like_a_fresh_one(tmp_path, family, spec, num_gpus):
    pytest.importorskip("torchvision", reason="transformers' processors need it")
    from tests.vision_folders import save_processor

    folder = save_tiny_vision_model(tmp_path / "hf", family, transposed=family == "qwen3_vl_moe")
    save_processor(folder, family)
    oracle(tmp_path, folder, num_gpus, PICTURES[family], spec, sees=True)
