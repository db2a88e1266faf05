"""A sync reads the weights that the last step computed, however the optimizer spreads, delays and stores them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.test_offload import DISTRIBUTED, OVERLAPPED, case, make_models
from tests.ranks import run_ranks

RANKS = "tests.integration.freshness_ranks"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    return make_models(tmp_path_factory.mktemp("models"))


def trained(model: str, ddp: dict[str, Any], *, precision: str = "bf16", optimizer: dict[str, Any] | None = None, **topology: int) -> dict:
    """``stale``: without a forced gather replicas lack what the others have computed."""
    base = case(model, ddp=ddp, precision=precision, **topology)
    stale = bool(ddp.get("overlap_param_gather")) and topology.get("dp_size", 1) > 1
    return {**base, "optimizer": {**base["optimizer"], **(optimizer or {})}, "stale": stale}


def test_weights_are_fresh_after_every_step(models):
    cases = [
        trained("qwen2", OVERLAPPED, dp_size=2),
        trained("qwen3", OVERLAPPED, dp_size=2, precision="fp16"),
        trained("qwen2", OVERLAPPED, dp_size=2, precision="fp32"),
        trained("qwen3", DISTRIBUTED, dp_size=2),
        trained("qwen2", OVERLAPPED, pp_size=2),
    ]
    outputs = run_ranks(2, RANKS, "synced_weights_are_those_after_the_step", cases=cases, models=models)
    assert outputs[0].count("FRESH") == len(cases), outputs[0]


def test_a_step_on_the_host_has_the_cores_of_its_rank(models):
    outputs = run_ranks(2, RANKS, "the_step_alone_has_the_cores_of_the_rank", case=trained("qwen2", DISTRIBUTED, dp_size=2), models=models)
    assert all("SHARED" in output for output in outputs), outputs[0]
