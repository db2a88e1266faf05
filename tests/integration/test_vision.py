"""Vision-language models on Megatron: logits, gradients and training equal transformers', under every layout that text models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.vision_models import FAMILIES, collated, hf_inputs, row, save_tiny_vision_model, tiny_vision_model

RANKS, MEGATRON_RANKS = "tests.integration.vision_ranks", "tests.integration.megatron_ranks"
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SEQUENCE = {"sequence_parallel": True}
# A large epsilon keeps Adam from blowing up the rounding differences of gradients near zero.
OPTIMIZER = {"lr": 2e-3, "weight_decay": 0.1, "adam_eps": 1e-3, "adam_beta2": 0.95, "clip_grad": 0.5}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
LORA = {"r": 4, "lora_alpha": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "qwen2_5_vl-tied": {"family": "qwen2_5_vl", "tied": True},
    # Saved with the names of its modules: experts stacked, and not transposed as released files have them.
    "qwen3_vl_moe": {"family": "qwen3_vl_moe"},
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
    return {name: expectations(root / name, **options) for name, options in OPTIONS.items()}


def test_one_rank_computes_as_transformers(models):
    cases = [
        {"model": "qwen2_5_vl", "topology": {}, "cut": [1]},
        {"model": "qwen2_5_vl", "topology": {}, "cut": [2, 2, 2, 2]},
        {"model": "qwen3_vl", "topology": {}, "cut": [1]},
        {"model": "qwen3_vl", "topology": {}, "cut": [3, 1, 4]},
        {"model": "qwen2_5_vl", "topology": {}, "cut": [8], "packing": True, "chunk_tokens": 7},
        {"model": "qwen3_vl", "topology": {}, "cut": [8], "overrides": RECOMPUTE},
    ]
    _run(1, "compute_as_huggingface", cases, models)


def test_two_ranks_compute_as_transformers(models):
    """TP with and without sequence parallelism, PP even and uneven, DP where one replica has no pictures, CP."""
    cases = [
        {"model": "qwen2_5_vl-tied", "topology": {"tp_size": 2}, "cut": [2, 2, 4]},
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [1]},
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [3, 5], "overrides": SEQUENCE},
        {"model": "qwen2_5_vl", "topology": {"tp_size": 2}, "cut": [1], "overrides": SEQUENCE},
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [2, 6], "overrides": {**SEQUENCE, **RECOMPUTE}, "packing": True},
        {"model": "qwen2_5_vl-tied", "topology": {"pp_size": 2}, "cut": [2, 2, 2, 2]},
        {"model": "qwen3_vl", "topology": {"pp_size": 2}, "cut": [1, 2, 1, 2, 2]},
        {
            "model": "qwen3_vl",
            "topology": {"pp_size": 2, "first_stage_layers": 3, "last_stage_layers": 1},
            "cut": [3, 1, 4],
            "packing": True,
        },
        {
            "model": "qwen2_5_vl",
            "topology": {"pp_size": 2, "first_stage_layers": 1, "last_stage_layers": 3},
            "cut": [2, 2, 2, 2],
            "overrides": RECOMPUTE,
        },
        {"model": "qwen2_5_vl", "topology": {"pp_size": 2, "vpp_size": 2}, "cut": [2, 2, 2, 2]},
        {
            "model": "qwen3_vl-deep",
            "topology": {"pp_size": 2, "vpp_size": 2},
            "cut": [1, 3, 1, 2, 1],
            "overrides": RECOMPUTE,
            "packing": True,
        },
        {"model": "qwen3_vl_moe", "topology": {"tp_size": 2, "ep_size": 2}, "cut": [3, 5], "overrides": SEQUENCE},
        {"model": "qwen3_vl_moe", "topology": {"pp_size": 2}, "cut": [1, 2, 1, 2, 2], "packing": True},
        {"model": "qwen2_5_vl", "topology": {"dp_size": 2}, "cut": [1, 3]},
        {"model": "qwen2_5_vl", "topology": {"cp_size": 2}, "cut": [1]},
        {"model": "qwen3_vl", "topology": {"cp_size": 2}, "cut": [3, 5], "overrides": RECOMPUTE, "packing": True},
        {"model": "qwen3_vl", "topology": {"cp_size": 2}, "cut": [2, 6], "lora": LORA},
        {"model": "qwen3_vl", "topology": {"dp_size": 2}, "cut": [2, 1, 1], "ddp": {"overlap_grad_reduce": True}, "packing": True},
        # Adapters of the language model, beside a tower that is frozen with all the rest.
        {"model": "qwen3_vl", "topology": {"tp_size": 2}, "cut": [2, 6], "overrides": {**SEQUENCE, **RECOMPUTE}, "lora": LORA},
        {"model": "qwen2_5_vl", "topology": {"pp_size": 2}, "cut": [2, 2, 2, 2], "lora": LORA},
    ]
    _run(2, "compute_as_huggingface", cases, models)


def test_one_rank_trains_as_transformers(models):
    _run(1, "train_as_huggingface", [_training("qwen2_5_vl", [3, 5]), _training("qwen3_vl", [8], ddp=DISTRIBUTED)], models, MEGATRON_RANKS)


def test_two_ranks_train_as_transformers(models):
    """Whole steps of the optimizer; under data parallelism the replicas' microbatches have pictures and none by turns."""
    cases = [
        _training("qwen3_vl", [3, 5], {"tp_size": 2}, overrides=SEQUENCE),
        _training("qwen2_5_vl-tied", [1, 3, 4], {"pp_size": 2}),
        _training("qwen2_5_vl", [1, 1, 2], {"dp_size": 2}, ddp={**OVERLAPPED, "bucket_size": 5000}),
        _training("qwen3_vl", [1, 1, 1, 1], {"dp_size": 2}, ddp=OVERLAPPED),
        _training("qwen3_vl_moe", [1, 3], {"dp_size": 2, "ep_size": 2}, ddp=DISTRIBUTED),
    ]
    _run(2, "train_as_huggingface", cases, models, MEGATRON_RANKS)


def test_training_resumes_bitwise(models, tmp_path):
    cases = [
        _training("qwen3_vl", [1, 3], {"dp_size": 2}, ddp=DISTRIBUTED),
        _training("qwen2_5_vl", [4, 4], {"tp_size": 2}, overrides=SEQUENCE),
    ]
    _run(2, "resume_bitwise", cases, models, MEGATRON_RANKS, root=str(tmp_path))


def test_training_goes_on_bitwise_after_offloading(models):
    _run(1, "goes_on_bitwise", [_training("qwen3_vl", [3, 5])], models, "tests.integration.offload_ranks")


def test_bfloat16_trains(models):
    cases = [{**_training("qwen3_vl", [8]), "precision": "bf16", "skipped": [0], "scale": [1, 1]}]
    _run(1, "train_in_half_precision", cases, models, MEGATRON_RANKS)


def _training(model: str, cut: list[int], topology: dict[str, int] | None = None, **options: Any) -> dict[str, Any]:
    return {"model": model, "topology": topology or {}, "cut": cut, "optimizer": OPTIMIZER, **options}


def _run(world_size: int, function: str, cases: list[dict], models: dict, module: str = RANKS, **kwargs: Any) -> None:
    outputs = run_ranks(world_size, module, function, cases=cases, models=models, **kwargs)
    done = [line for line in outputs[0].splitlines() if line.startswith(("COMPUTED", "TRAINED", "RESUMED", "OFFLOADED"))]
    print(*done, sep="\n")
    assert len(done) == len(cases), outputs[0]


def expectations(folder: Path, **options: Any) -> dict[str, Any]:
    """A saved model, and for each batch the file of its rows with HF's logits, loss and gradients."""
    save_tiny_vision_model(folder, seed=3, **options)
    model = tiny_vision_model(seed=3, **options).train()
    paths = {}
    for number, (name, layout) in enumerate(BATCHES.items()):
        rows = [_weighted(row(model.config, parts, seed=10 * number + i), seed=i) for i, parts in enumerate(layout)]
        paths[name] = str(folder / f"{name}.pt")
        torch.save({"rows": rows, **_computed(model, rows)}, paths[name])
    return {"folder": str(folder), "batches": paths, "batch": paths["mixed"], **_trained(model, paths["mixed"], folder / "trained.bin")}


def _trained(model: torch.nn.Module, batch: str, path: Path, *, steps: int = 3) -> dict[str, Any]:
    """Scores of a batch, and what torch's AdamW makes of the model on it; its weights then are in ``path``."""
    rows = torch.load(batch)["rows"]
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": OPTIMIZER["weight_decay"]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=OPTIMIZER["lr"], eps=OPTIMIZER["adam_eps"], betas=(0.9, OPTIMIZER["adam_beta2"]),
    )  # fmt: skip
    losses, norms = [], []
    with torch.no_grad():
        log_probs, entropy = _scores(model(**hf_inputs(rows)).logits, rows)
    for _ in range(steps):
        model.zero_grad()
        loss = _loss(model(**hf_inputs(rows)).logits, rows)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"]).item())
        adam.step()
        losses.append(loss.item())
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    torch.save(state, path)
    return {
        "trained": str(path), "temperature": 1.0, "tokens": sum(int(found["weights"].ne(0).sum()) for found in rows),
        "log_probs": log_probs.tolist(), "entropy": entropy.tolist(), "losses": losses, "grad_norms": norms,
    }  # fmt: skip


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
    log_probs, entropy = _scores(logits, rows)
    weights = collated(rows)["weights"]
    return -(log_probs * weights).sum() - 0.1 * (entropy * weights.abs()).sum()


def _scores(logits: torch.Tensor, rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``TokenScores`` holds."""
    distribution = logits.float().log_softmax(dim=-1)[:, :-1]
    log_probs = distribution.gather(-1, collated(rows)["tokens"][:, 1:, None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(dim=-1)
    return torch.nn.functional.pad(log_probs, (1, 0)), torch.nn.functional.pad(entropy, (1, 0))
