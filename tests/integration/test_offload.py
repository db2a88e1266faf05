"""Weights, gradients and optimizer state that were in host memory for a while change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import save_tiny_model
from tests.ranks import run_ranks

RANKS = "tests.integration.offload_ranks"
OPTIMIZER = {"lr": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 0.5, "loss_scale": 256.0}  # the scale is for fp16 only
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
BATCH = {
    "tokens": [[(7 * row + 3 * i * i) % 130 + 1 for i in range(12)] for row in range(4)],
    "weights": [[0.0, 0.0] + [0.05] * 10] * 4,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return make_models(tmp_path_factory.mktemp("models"))


def make_models(root: Path) -> dict[str, dict[str, Any]]:
    return {
        family: {"folder": str(save_tiny_model(root / family, family, num_hidden_layers=2)), "batch": BATCH}
        for family in ("qwen2", "qwen3")
    }


def case(model: str, *, ddp: dict | None = None, precision: str = "bf16", **topology: int) -> dict[str, Any]:
    replicas = topology.get("dp_size", 1)
    return {
        "model": model, "topology": topology, "cut": [4 // replicas], "optimizer": OPTIMIZER, "ddp": ddp or {}, "precision": precision,
    }  # fmt: skip


def test_training_goes_on_bit_for_bit_after_everything_was_away(models):
    cases = [
        case("qwen2", ddp=OVERLAPPED, dp_size=2),
        case("qwen3", ddp=DISTRIBUTED, dp_size=2, precision="fp16"),
        case("qwen2", ddp=DISTRIBUTED, dp_size=2, precision="fp32"),  # main parameters are views of the weights
        case("qwen3", tp_size=2),  # parameters with memory of their own
        case("qwen2", ddp=OVERLAPPED, pp_size=2),
    ]
    outputs = run_ranks(2, RANKS, "goes_on_bitwise", cases=cases, models=models)
    assert outputs[0].count("OFFLOADED") == len(cases), outputs[0]
