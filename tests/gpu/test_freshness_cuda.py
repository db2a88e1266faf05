"""A sync on GPUs reads the weights that the last step computed, also where the optimizer keeps and steps them on the host."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_freshness import RANKS, trained
from tests.integration.test_offload import DISTRIBUTED, OVERLAPPED, make_models
from tests.ranks import run_ranks

ON_HOST = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}


@pytest.mark.gpu(2)
def test_weights_are_fresh_after_every_step_wherever_the_optimizer_keeps_them(tmp_path):
    cases = [
        trained("qwen2", OVERLAPPED, dp_size=2),
        trained("qwen3", DISTRIBUTED, dp_size=2),
        trained("qwen2", DISTRIBUTED, dp_size=2, optimizer=ON_HOST),
        trained("qwen3", OVERLAPPED, dp_size=2, optimizer={**ON_HOST, "optimizer_offload_fraction": 0.5}),
    ]
    check(cases, tmp_path)


@pytest.mark.gpu(2)
@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="the optimizer is TransformerEngine's")
def test_weights_of_the_precision_aware_optimizer_are_fresh_too(tmp_path):
    precise = {"use_precision_aware_optimizer": True}
    check([trained("qwen2", OVERLAPPED, dp_size=2, optimizer=each) for each in (precise, {**ON_HOST, **precise})], tmp_path)


@pytest.mark.gpu(1)
@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="the optimizer is TransformerEngine's")
def test_optimizers_on_the_host_and_precision_aware_ones_step_and_resume_as_others_do(tmp_path):
    """On one GPU: fresh weights, the steps of the plain optimizer, and a resume that goes on bit for bit."""
    precise = {"use_precision_aware_optimizer": True}
    options = [{}, precise, ON_HOST, {**ON_HOST, **precise}, {**ON_HOST, **precise, "optimizer_offload_fraction": 0.5}]
    cases, models = [trained("qwen2", DISTRIBUTED, optimizer=each) for each in options], make_models(tmp_path)
    (output,) = run_ranks(1, RANKS, "optimizers_agree", cases=cases, models=models)
    print(output)
    assert output.count("AGREED") == len(cases) - 1, output
    (output,) = run_ranks(1, RANKS, "synced_weights_are_those_after_the_step", cases=cases[1:], models=models)
    assert output.count("FRESH") == len(cases) - 1, output
    (output,) = run_ranks(1, "tests.integration.megatron_ranks", "resume_bitwise", cases=cases, models=models, root=str(tmp_path))
    assert output.count("RESUMED") == len(cases), output


@pytest.mark.gpu(2)
def test_a_step_on_the_host_has_the_cores_of_its_rank(tmp_path):
    one = trained("qwen2", DISTRIBUTED, dp_size=2, optimizer=ON_HOST)
    outputs = run_ranks(2, RANKS, "the_step_alone_has_the_cores_of_the_rank", case=one, models=make_models(tmp_path))
    assert all("SHARED" in output for output in outputs), outputs[0]


def check(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    outputs = run_ranks(2, RANKS, "synced_weights_are_those_after_the_step", cases=cases, models=make_models(tmp_path))
    assert outputs[0].count("FRESH") == len(cases), outputs[0]
