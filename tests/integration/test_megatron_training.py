"""Training and scoring through Megatron equal Hugging Face's model under torch's optimizer, whatever the layout."""

from __future__ import annotations

import os
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import VOCAB_SIZE, save_tiny_model, tiny_model
from tests.ranks import run_ranks

RANKS = "tests.integration.megatron_ranks"
TEMPERATURE = 0.7
# A large epsilon keeps Adam from blowing up the rounding differences of gradients near zero.
OPTIMIZER = {"lr": 2e-3, "weight_decay": 0.1, "adam_eps": 1e-3, "adam_beta2": 0.95, "clip_grad": 0.5}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Virtual stages, uneven ones and SmolLM3's pattern need four layers.
MODELS = {
    "llama": {"family": "llama", "tied": True, "num_key_value_heads": 4},
    "qwen2": {"family": "qwen2", "num_hidden_layers": 2},
    "qwen3": {"family": "qwen3", "tied": True, "num_key_value_heads": 1},
    "glm4": {"family": "glm4", "num_hidden_layers": 2},
    "seed_oss": {"family": "seed_oss", "num_hidden_layers": 2},
    "smollm3": {"family": "smollm3", "tied": True},
    "mistral": {"family": "mistral", "num_hidden_layers": 2},
    "yarn": {"family": "qwen2", "num_hidden_layers": 2, "rope_parameters": YARN},
}


MOE_MODELS = {
    "mixtral": {"family": "mixtral", "num_hidden_layers": 2},
    "qwen2_moe": {"family": "qwen2_moe", "num_hidden_layers": 2, "mlp_only_layers": [0]},
    "qwen3_moe": {"family": "qwen3_moe", "num_hidden_layers": 2, "tied": True, "mlp_only_layers": [1]},
    "glm4_moe": {"family": "glm4_moe", "num_hidden_layers": 2},
    "deepseek_v3": {"family": "deepseek_v3", "num_hidden_layers": 2},
    "moonlight": {"family": "moonlight", "num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    return {name: _expectations(root / name, **options) for name, options in MODELS.items()}


@pytest.fixture(scope="module")
def moe_models(tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("moe")
    return {name: _expectations(root / name, **options) for name, options in MOE_MODELS.items()}


# Sequences one after the other; logits of a few positions at once.
PACKED: dict[str, Any] = {"packing": True}
CHUNKED = {"chunk_tokens": 7}


def _case(model: str, cut: list[int], *, sequence_parallel: bool = False, ddp: dict | None = None, **topology: int) -> dict[str, Any]:
    overrides = {"sequence_parallel": sequence_parallel}
    return {"model": model, "topology": topology, "cut": cut, "optimizer": OPTIMIZER, "ddp": ddp or {}, "overrides": overrides}


def recomputing(*args: Any, **options: Any) -> dict[str, Any]:
    case = _case(*args, **options)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {**case, "overrides": {**case["overrides"], **full}}


def test_scores_over_a_split_vocabulary_equal_softmax():
    run_ranks(2, RANKS, "scores_equal_softmax", tp_size=2)


def test_one_rank_trains_as_huggingface(models):
    cases = [
        _case("llama", [8]),
        recomputing("qwen2", [8]) | PACKED,
        _case("qwen2", [3, 5], ddp=DISTRIBUTED) | {"optimizer": {**OPTIMIZER, "log_num_zeros_in_grad": True}},
        _case("llama", [3, 5], ddp=DISTRIBUTED) | CHUNKED,
        _case("qwen3", [3, 5], ddp=DISTRIBUTED) | PACKED | CHUNKED,
        _case("qwen2", [8]) | PACKED | {"overrides": {"recompute_granularity": "selective"}},
    ]
    _run(1, "train_as_huggingface", cases, models)


def test_two_ranks_train_as_huggingface(models):
    cases = [
        _case("llama", [8], tp_size=2),
        _case("qwen3", [3, 5], tp_size=2, sequence_parallel=True),  # one key-value head on two ranks
        _case("qwen2", [2, 6], pp_size=2),
        _case("llama", [3, 3, 2], pp_size=2, vpp_size=2, ddp=OVERLAPPED),  # three microbatches, which the schedule has to fill up
        _case("qwen3", [1, 7], pp_size=2, first_stage_layers=1, last_stage_layers=3, ddp=DISTRIBUTED) | PACKED,
        _case("qwen2", [4], dp_size=2),
        _case("qwen3", [2, 2], dp_size=2, ddp=DISTRIBUTED),
        _case("llama", [2, 2], dp_size=2, ddp=OVERLAPPED) | CHUNKED,
        _case("glm4", [4, 4], tp_size=2, sequence_parallel=True) | PACKED,
        _case("seed_oss", [4, 4], tp_size=2, sequence_parallel=True) | CHUNKED,
        _case("smollm3", [2, 6], pp_size=2) | PACKED | CHUNKED,
        _case("mistral", [8], tp_size=2, sequence_parallel=True) | PACKED,
        _case("yarn", [2, 6], pp_size=2) | PACKED,
        _case("qwen2", [3, 5], cp_size=2, ddp=OVERLAPPED) | CHUNKED,
        recomputing("qwen3", [8], cp_size=2) | PACKED,
    ]
    _run(2, "train_as_huggingface", cases, models)


def test_four_ranks_train_as_huggingface(models):
    cases = [
        _case("llama", [4, 4], tp_size=2, pp_size=2, sequence_parallel=True),
        _case("qwen2", [2, 2], tp_size=2, dp_size=2, sequence_parallel=True, ddp=OVERLAPPED) | PACKED | CHUNKED,
        _case("qwen3", [3, 1], pp_size=2, vpp_size=2, dp_size=2, ddp=DISTRIBUTED) | PACKED,
        _case("llama", [4, 4], tp_size=2, cp_size=2, sequence_parallel=True) | PACKED,
        _case("qwen3", [3, 5], pp_size=2, cp_size=2, ddp=DISTRIBUTED),
        _case("llama", [3, 3, 2], pp_size=2, vpp_size=2, cp_size=2) | PACKED,
        _case("smollm3", [4], cp_size=2, dp_size=2, ddp=DISTRIBUTED),
    ]
    _run(4, "train_as_huggingface", cases, models)


def test_experts_train_as_huggingface(moe_models):
    """Gradients of experts are reduced over other ranks than those of the rest, and the norm is that of all of them."""
    cases = [
        _case("qwen3_moe", [2, 2], dp_size=2, ep_size=2),
        _case("qwen3_moe", [2, 2], dp_size=2, ep_size=2, ddp=DISTRIBUTED),
        _case("mixtral", [4], dp_size=2, ddp=OVERLAPPED),
        _case("qwen3_moe", [4, 4], tp_size=2, ep_size=2, sequence_parallel=True, ddp=DISTRIBUTED) | PACKED | CHUNKED,
        _case("qwen2_moe", [4, 4], tp_size=2, etp_size=2, sequence_parallel=True),
        # Both ranks hold all experts whole, which see other tokens on each.
        _case("qwen3_moe", [4, 4], tp_size=2, sequence_parallel=True) | PACKED,
        _case("deepseek_v3", [4, 4], tp_size=2, sequence_parallel=True, ddp=OVERLAPPED),
        _case("mixtral", [2, 2], dp_size=2, etp_size=2, ddp=DISTRIBUTED),
        _case("qwen2_moe", [2, 6], pp_size=2, ddp=DISTRIBUTED) | PACKED,
        _case("glm4_moe", [4, 4], tp_size=2, ep_size=2, sequence_parallel=True, ddp=DISTRIBUTED),
        # The rotary key of all heads gets gradients from those of both ranks.
        _case("deepseek_v3", [4, 4], tp_size=2, ep_size=2, sequence_parallel=True, ddp=DISTRIBUTED) | PACKED | CHUNKED,
        _case("moonlight", [2, 2], dp_size=2, ep_size=2) | PACKED,
        _case("qwen3_moe", [3, 5], cp_size=2, ep_size=2, ddp=DISTRIBUTED),
        _case("deepseek_v3", [4, 4], cp_size=2) | PACKED,
    ]
    _run(2, "train_as_huggingface", cases, moe_models)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(models, tmp_path):
    cases = [
        _case("llama", [4], tp_size=2),
        _case("qwen3", [2, 2], dp_size=2, ddp=DISTRIBUTED),
        _case("qwen2", [2, 2], dp_size=2, ddp=OVERLAPPED),
        _case("llama", [4, 4], pp_size=2, vpp_size=2, ddp=DISTRIBUTED),
        _case("qwen2", [4, 4], cp_size=2, ddp=OVERLAPPED),
        {**_case("qwen3", [2, 2], dp_size=2, ddp=DISTRIBUTED), "precision": "bf16"},
        {**_case("llama", [8], tp_size=2, sequence_parallel=True), "precision": "bf16"},
        # Every step so far was skipped, so the optimizer has no state yet.
        {**_case("qwen3", [8], tp_size=2, ddp=DISTRIBUTED), "precision": "fp16", "steps_before": 1}
        | {"optimizer": {**OPTIMIZER, "initial_loss_scale": 2.0**32}},
    ]
    cases[0]["cut"] = [4, 4]
    _run(2, "resume_bitwise", cases, models, root=str(tmp_path))


def test_a_resumed_run_with_experts_is_the_uninterrupted_one_bit_for_bit(moe_models, tmp_path):
    """Each expert rank has weights, moments and masters of its own, which lie in folders of their own."""
    cases = [
        _case("qwen3_moe", [2, 2], dp_size=2, ep_size=2),
        {**_case("qwen3_moe", [2, 2], dp_size=2, ep_size=2, ddp=OVERLAPPED), "precision": "bf16"},
        _case("qwen2_moe", [4, 4], tp_size=2, ep_size=2, sequence_parallel=True, ddp=DISTRIBUTED),
        _case("mixtral", [4, 4], tp_size=2, etp_size=2, sequence_parallel=True, ddp=DISTRIBUTED),
        _case("qwen2_moe", [4, 4], pp_size=2, ddp=DISTRIBUTED),
        _case("qwen3_moe", [4, 4], tp_size=2, sequence_parallel=True, ddp=DISTRIBUTED),
        # Its routers' bias moves with every step, and decides where tokens go in the next.
        {**_case("deepseek_v3", [2, 2], dp_size=2, ep_size=2, ddp=DISTRIBUTED), "overrides": {"moe_router_bias_update_rate": 0.05}},
    ]
    _run(2, "resume_bitwise", cases, moe_models, root=str(tmp_path))
    assert {path.name for path in tmp_path.glob("1/iter_*/*")} == {"checksums.json", "mp_rank_00_000", "mp_rank_00_001"}


def test_foreign_and_truncated_states_are_refused(models, tmp_path):
    run_ranks(1, RANKS, "refuse_foreign_state", models=models, root=str(tmp_path))


def test_half_precision_lowers_the_loss(models):
    base = _case("qwen3", [4, 4])
    high, fixed = ({**OPTIMIZER, "initial_loss_scale": 2.0**24}, {**OPTIMIZER, "loss_scale": 1024.0})
    cases = [
        {**base, "precision": "bf16", "skipped": [0], "scale": [1.0, 1.0]},
        # Gradients overflow at a scale of 2**24, which is then lowered.
        {**base, "precision": "fp16", "optimizer": high, "skipped": list(range(1, 12)), "scale": [1.0, 2.0**23]},
        {**base, "precision": "fp16", "optimizer": fixed, "skipped": [0], "scale": [1024.0, 1024.0]},
    ]
    _run(1, "train_in_half_precision", cases, models)


def test_a_gradient_that_is_not_finite_changes_nothing(models):
    """Also where nothing is clipped, and where each rank has a shard of the gradients."""
    unchecked = {"check_for_nan_in_grad": False}
    cases = [
        {**_case("qwen2", [4], ddp=unchecked, dp_size=2), "precision": "fp32", "optimizer": {**OPTIMIZER, "clip_grad": 0.0}},
        {**_case("qwen2", [4], ddp={**OVERLAPPED, **unchecked}, dp_size=2), "precision": "bf16"},
        {**_case("qwen2", [8], ddp=unchecked, tp_size=2), "precision": "bf16"},
    ]
    _run(2, "stop_before_a_nan", cases, models)


def test_the_rank_whose_gradients_are_not_finite_is_named(models):
    run_ranks(1, RANKS, "name_the_rank_of_a_nan", models=models)


@pytest.mark.skipif("RLSYNC_OTHER_MEGATRON" not in os.environ, reason="RLSYNC_OTHER_MEGATRON names no other release of Megatron-Core")
@pytest.mark.parametrize("saved_by_other", [False, True])
def test_a_checkpoint_of_one_release_of_megatron_is_gone_on_with_by_another_bit_for_bit(models, moe_models, tmp_path, saved_by_other):
    folder = os.environ["RLSYNC_OTHER_MEGATRON"]
    (other,) = distributions(name="megatron-core", path=[folder])
    cases = [
        _case("qwen3", [2, 2], dp_size=2, ddp=DISTRIBUTED),
        _case("qwen2", [4, 4], tp_size=2, sequence_parallel=True, ddp=DISTRIBUTED),
        _case("qwen2", [4, 4], pp_size=2, ddp=DISTRIBUTED),
        _case("qwen3_moe", [2, 2], dp_size=2, ep_size=2, ddp=DISTRIBUTED),
    ]
    for is_other in (saved_by_other, not saved_by_other):
        with pytest.MonkeyPatch.context() as patch:
            if is_other:
                patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
            outputs = run_ranks(
                2,
                "tests.integration.other_release_ranks",
                "go_on",
                cases=cases,
                models={**models, **moe_models},
                root=str(tmp_path),
                release=other.version if is_other else version("megatron-core"),
                saves=is_other == saved_by_other,
            )
        assert outputs[0].count("TRAINED") == len(cases), outputs[0]


def test_parameters_are_stale_until_gathered(models):
    run_ranks(2, RANKS, "gather_before_reading", models=models)


def _run(world_size: int, function: str, cases: list[dict], models: dict, **kwargs: Any) -> None:
    if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices; torch sees {torch.cuda.device_count()}")
    outputs = run_ranks(world_size, RANKS, function, cases=cases, models=models, **kwargs)
    done = [line for line in outputs[0].splitlines() if line.startswith(("TRAINED", "RESUMED"))]
    assert len(done) == len(cases), outputs[0]


def _expectations(folder: Path, *, steps: int = 3, **options: Any) -> dict[str, Any]:
    """A saved model, a batch, and what HF's implementation and torch's AdamW make of it."""
    save_tiny_model(folder, seed=3, **options)
    model, batch = tiny_model(seed=3, **options).train(), _batch()
    log_probs, entropy = _scores(model, batch["tokens"])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"], eps=OPTIMIZER["adam_eps"], betas=(0.9, OPTIMIZER["adam_beta2"]),
    )  # fmt: skip
    losses, norms, zeros = [], [], []
    for _ in range(steps):
        now, spread = _scores(model, batch["tokens"])
        loss = -(now * batch["weights"]).sum() - 0.1 * (spread * batch["weights"].abs()).sum()
        adam.zero_grad()
        loss.backward()
        zeros.append(sum(int((parameter.grad == 0).sum()) for parameter in model.parameters()))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"]).item())
        adam.step()
        losses.append(loss.item())
    # As files have them: transformers holds the experts of a layer as one tensor.
    model.save_pretrained(folder / "trained")
    torch.save(load_file(folder / "trained" / "model.safetensors"), folder / "trained.pt")
    return {
        "folder": str(folder), "trained": str(folder / "trained.pt"), "temperature": TEMPERATURE,
        "batch": {name: tensor.tolist() for name, tensor in batch.items()}, "tokens": int(batch["weights"].ne(0).sum()),
        "log_probs": log_probs.tolist(), "entropy": entropy.tolist(), "losses": losses, "grad_norms": norms,
        "zeros": zeros,
    }  # fmt: skip


def _batch() -> dict[str, torch.Tensor]:
    """Eight right-padded sequences; the weights cover a response each, and sum over the batch to something like a mean."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.tensor([23, 9, 17, 12, 6, 21, 14, 19])
    # HF's embedding takes no gradient for the padding token, Megatron's does: keep it out of the sequences.
    tokens = torch.randint(1, VOCAB_SIZE, (8, 24), generator=generator)
    position = torch.arange(24)
    response = (position >= 3) & (position < lengths[:, None])
    weights = torch.randn(8, 1, generator=generator) * response / response.sum()
    return {"tokens": torch.where(position < lengths[:, None], tokens, 0), "weights": weights}


def _scores(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = (model(tokens).logits.float() / TEMPERATURE).log_softmax(dim=-1)
    log_probs = distribution[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    entropy = -(distribution.exp() * distribution).sum(dim=-1)[:, :-1]
    return tuple(torch.nn.functional.pad(values, (1, 0)) for values in (log_probs, entropy))
