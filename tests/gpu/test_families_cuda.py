"""Families with experts and with pictures on two GPUs: the oracle in bf16, and what a vision-language actor computes in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.engines import LAYERS
from tests.models import save_tiny_model
from tests.ranks import run_ranks
from tests.vision_models import save_tiny_vision_model

pytestmark = [pytest.mark.gpu(2), pytest.mark.timeout(550)]

EXPERT_PARALLEL = {"dp_size": 2, "ep_size": 2}


def oracle(tmp_path: Path, folder: Path, topology: dict[str, int], spec: str, **options: object) -> None:
    outputs = run_ranks(
        2, "tests.integration.oracle_ranks", "sync_and_compare", timeout_s=500, folder=str(folder), topology=topology,
        out_dir=str(tmp_path), dtype="bfloat16", spec=spec, **options,
    )  # fmt: skip
    print(outputs[0][outputs[0].index("ORACLE") :].splitlines()[0])


@pytest.mark.parametrize("spec", LAYERS)
@pytest.mark.parametrize("gpus", [None, ["0,1"]], ids=["one-worker", "two-workers"])
@pytest.mark.parametrize(
    ("family", "topology"),
    [
        ("qwen3_moe", EXPERT_PARALLEL),
        ("mixtral", {"tp_size": 2, "etp_size": 2}),
        ("qwen2_moe", {"tp_size": 2, "ep_size": 2}),
        ("glm4_moe", EXPERT_PARALLEL),
    ],
)
def test_a_synced_engine_with_experts_answers_like_a_fresh_one(tmp_path, family, topology, gpus, spec):
    """The engine cuts its experts over two workers, or holds all of them in one, as its kernels want them."""
    # Kernels of experts take whole tiles of 64; what a worker of two holds is such a tile.
    folder = save_tiny_model(tmp_path / "hf", family, hidden_size=128, **({} if family == "mixtral" else {"moe_intermediate_size": 128}))
    overrides = {} if topology is EXPERT_PARALLEL else {"actor_overrides": {"sequence_parallel": True}}
    oracle(tmp_path, folder, topology, spec, gpus=gpus, **overrides)


@pytest.mark.parametrize("spec", LAYERS)
@pytest.mark.parametrize(
    ("family", "topology"),
    [("qwen2_5_vl", {"tp_size": 2}), ("qwen3_vl", {"pp_size": 2}), ("qwen3_vl_moe", EXPERT_PARALLEL)],
)
def test_a_synced_engine_that_takes_pictures_answers_like_a_fresh_one(tmp_path, family, topology, spec):
    pytest.importorskip("torchvision", reason="transformers' processors need it")
    from tests.vision_folders import save_processor

    folder = save_tiny_vision_model(tmp_path / "hf", family, transposed=family == "qwen3_vl_moe")
    save_processor(folder, family)
    oracle(tmp_path, folder, topology, spec, sees=True)
