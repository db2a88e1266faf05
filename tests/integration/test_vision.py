"""Vision-language models on Megatron: logits, gradients and training equal transformers', under every layout that text models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vision_models import FAMILIES, collated, hf_inputs, row, save_tiny_vision_model, tiny_vision_model

RANKS = "tests.integration.vision_ranks"
OPTIONS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "qwen2_5_vl-tied": {"family": "qwen2_5_vl", "tied": True},
    # Virtual stages of two layers each: deepstack features go into the first two.
    "qwen3_vl-deep": {"family": "qwen3_vl", "num_hidden_layers": 8},
}
# Parts of each row: a number of text tokens, or height and width of a picture.
BATCHES: dict[str, list[list[int | tuple[int, int]]]] = {
    "one": [[5, (56, 84), 7]],
    "several": [[3, (56, 56), 2, (140, 84), 4, (28, 112), 6]],
    "none": [[19]],
    # Rows of other lengths, with pictures of other sizes; two at a time, one microbatch has none.
    "mixed": [[4, (140, 56), 6], [9], [2, (28, 28), 5], [13], [(84, 84), 1, (56, 112), 9], [7], [3, (112, 84), 4], [8]],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("hf")
    return {name: _expectations(root / name, **options) for name, options in OPTIONS.items()}


def test_one_rank_computes_as_transformers(models):
    cases = [
        {"model": "qwen2_5_vl", "topology": {}, "cut": [1]},
        {"model": "qwen2_5_vl", "topology": {}, "cut": [2, 2, 2, 2]},
        {"model": "qwen3_vl", "topology": {}, "cut": [1]},
        {"model": "qwen3_vl", "topology": {}, "cut": [3, 1, 4]},
        {"model": "qwen3_vl", "topology": {}, "cut": [8], "overrides": RECOMPUTE},
    ]
    _run(1, "compute_as_huggingface", cases, models)


RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SEQUENCE = {"sequence_parallel": True}


def test_two_ranks_compute_as_transformers(models):
    """TP with and without sequence parallelism, PP even and uneven, DP where one replica has no pictures."""
    cases = [
        {"model": "qwen2_5_vl-tied", "topology": {"tp_size": 2}, "cut": [2, 2, 4]},
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [1]},
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [3, 5], "overrides": SEQUENCE},
        {"model": "qwen2_5_vl", "topology": {"tp_size": 2}, "cut": [1], "overrides": SEQUENCE},
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [2, 6], "overrides": {**SEQUENCE, **RECOMPUTE}},
        {"model": "qwen2_5_vl-tied", "topology": {"pp_size": 2}, "cut": [2, 2, 2, 2]},
        {"model": "qwen3_vl", "topology": {"pp_size": 2}, "cut": [1, 2, 1, 2, 2]},
        {"model": "qwen3_vl", "topology": {"pp_size": 2, "first_stage_layers": 3, "last_stage_layers": 1}, "cut": [3, 1, 4]},
        {"model": "qwen2_5_vl", "topology": {"pp_size": 2, "vpp_size": 2}, "cut": [2, 2, 2, 2]},
        {"model": "qwen3_vl-deep", "topology": {"pp_size": 2, "vpp_size": 2}, "cut": [1, 3, 1, 2, 1], "overrides": RECOMPUTE},
        {"model": "qwen2_5_vl", "topology": {"dp_size": 2}, "cut": [1, 3]},
        {"model": "qwen3_vl", "topology": {"dp_size": 2}, "cut": [2, 1, 1], "ddp": {"overlap_grad_reduce": True}},
    ]
    _run(2, "compute_as_huggingface", cases, models)


def _run(world_size: int, function: str, cases: list[dict], models: dict, **kwargs: Any) -> None:
    outputs = run_ranks(world_size, RANKS, function, cases=cases, models=models, **kwargs)
    done = [line for line in outputs[0].splitlines() if line.startswith(("COMPUTED", "TRAINED"))]
    print(*done, sep="\n")
    assert len(done) == len(cases), outputs[0]


def _expectations(folder: Path, **options: Any) -> dict[str, Any]:
    """A saved model, and for each batch the file of its rows with HF's logits, loss and gradients."""
    save_tiny_vision_model(folder, seed=3, **options)
    model = tiny_vision_model(seed=3, **options).train()
    paths = {}
    for number, (name, layout) in enumerate(BATCHES.items()):
        rows = [_weighted(row(model.config, parts, seed=10 * number + i), seed=i) for i, parts in enumerate(layout)]
        paths[name] = str(folder / f"{name}.pt")
        torch.save({"rows": rows, **_computed(model, rows)}, paths[name])
    return {"folder": str(folder), "batches": paths}


def _weighted(found: dict[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """A row with weights of its last tokens, which a loss reads."""
    weights = torch.randn(len(found["tokens"]), generator=torch.Generator().manual_seed(seed)) / 20
    weights[: len(weights) // 2] = 0.0
    return {**found, "weights": weights}


def _computed(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    model.zero_grad()
    logits = model(**hf_inputs(rows)).logits.float()
    loss = _loss(logits, rows)
    loss.backward()
    tied = model.config.tie_word_embeddings
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if not (tied and name == "lm_head.weight")
    }
    return {
        "logits": [part[: len(found["tokens"])].detach().clone() for part, found in zip(logits, rows, strict=True)],
        "loss": loss.item(),
        "gradients": gradients,
    }


def _loss(logits: torch.Tensor, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What ``megatron_ranks.loss`` is."""
    batch = collated(rows)
    distribution = logits.log_softmax(dim=-1)[:, :-1]
    log_probs = distribution.gather(-1, batch["tokens"][:, 1:, None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    weights = batch["weights"][:, 1:]
    return -(log_probs * weights).sum() - 0.1 * (entropy * weights.abs()).sum()
