"""The actor of a run, rank by rank, without Ray and engines: its updates, initial weights, precisions, resume and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deadlines import HANG_S
from tests.integration.actor_reference import make_samples, write_samples
from tests.models import save_tiny_model
from tests.ranks import run_ranks, said
from tests.vision_models import save_tiny_vision_model

REPO = Path(__file__).resolve().parents[2]
RANKS = "tests.integration.actor_ranks"
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
KL = {"kl_beta": 0.3, "kl_penalty_type": "low_var_kl"}
DYNAMIC = {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 40}
PACKED = {**DYNAMIC, "packing": True}
SEEING_DYNAMIC = {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 80}
MANY = {"logprob_forward_max_tokens": 100}
EARLY = {"early_scoring_prompts": 1}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A model folder and a file of samples."""
    root = tmp_path_factory.mktemp("actor")
    return sampled(save_tiny_model(root / "hf", "qwen2", tied=True, seed=3, num_hidden_layers=2))


def sampled(folder: Path) -> dict[str, str]:
    """A model folder, and a file of samples beside it."""
    path = folder.with_suffix(".pt")
    write_samples(path, make_samples(str(folder)))
    return {"folder": str(folder), "samples": str(path)}


def train(world_size: int, given: dict[str, str], *cases: dict[str, Any]) -> None:
    outputs = run_ranks(world_size, RANKS, "train_as_reference", cases=cases, **given)
    assert outputs[0].count("EQUAL") == len(cases), outputs[0]


def test_updates_equal_a_plain_reference_however_the_samples_are_cut(given):
    """One rank: every term of the loss, microbatches of one, two and all samples, and by tokens; scored together, or prompt by prompt."""
    train(
        1, given,
        {},
        {"algorithm": {"training_batch_size_per_gpu": 8, "n_minibatches": 1, "loss_agg_func": "seq-mean-token-sum"}},
        {"runner": DYNAMIC, "algorithm": {"loss_agg_func": "seq-mean-token-mean", "calculate_entropy": True}},
        {"runner": PACKED, "actor.model": {"logits_chunk_tokens": 7}, "algorithm": {**KL, **MANY, "entropy_bonus": 0.02}},
        {"algorithm": {**KL, "entropy_bonus": 0.02, "training_batch_size_per_gpu": 1}},
        {"algorithm": {**KL, "kl_penalty_type": "k1", "shuffle_rollout": True}},
        {"algorithm": {**KL, "kl_penalty_type": "k2"}},
        {"algorithm": {"importance_sampling_fix": True, "importance_sampling_clip": 1.05, "early_scoring_prompts": 2}},
        {"algorithm": {"recompute_logprobs": False, "clip_ratio_c": 3.0}},
        {"actor.lr_sched": {"lr_warmup_iters": 0}, "actor.optim": {"use_distributed_optimizer": False}},
    )  # fmt: skip


def test_updates_equal_the_reference_in_every_layout(given, tmp_path):
    """Also of models that take pictures, some samples of which have one, several or none."""
    deep = sampled(save_tiny_model(tmp_path / "deep", "qwen2", tied=True, seed=3))
    qwen2_5_vl, qwen3_vl = (sampled(save_tiny_vision_model(tmp_path / family, family)) for family in ("qwen2_5_vl", "qwen3_vl"))
    train(
        2, given,
        {**qwen2_5_vl, "actor.model": {**TP2, "sequence_parallel": True}, "algorithm": {**KL, "shuffle_rollout": True}},
        {**qwen3_vl, "actor.model": PP2, "runner": SEEING_DYNAMIC, "algorithm": {**KL}},
        {"actor.model": {**TP2, "sequence_parallel": True}, "algorithm": {**KL, "entropy_bonus": 0.02}},
        {"actor.model": PP2, "runner": PACKED, "algorithm": {**KL, "shuffle_rollout": True, **EARLY}},
        {**deep, "actor.model": {**PP2, "decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3}},
        {**deep, "actor.model": {**PP2, "virtual_pipeline_model_parallel_size": 2}, "algorithm": {**KL}, "runner": PACKED},
        {"actor": {"enable_dp_load_balance": True}, "runner": DYNAMIC, "algorithm": {**KL, **MANY, **EARLY, "shuffle_rollout": True}},
        {"actor.model": CP2, "runner": PACKED, "algorithm": {**KL, "entropy_bonus": 0.02, **EARLY}},
        {"actor.optim": OVERLAPPED, "algorithm": {**KL, "loss_agg_func": "seq-mean-token-mean", "early_scoring_prompts": 2}},
        {"actor.optim": {"use_distributed_optimizer": False}, "algorithm": {"recompute_logprobs": False}},
    )  # fmt: skip


def test_a_resumed_actor_goes_on_bit_for_bit(given, tmp_path):
    """Weights, optimizer, schedule (in its warm-up and its decay) and KL reference."""
    schedule = {
        "lr_decay_style": "cosine", "lr_decay_iters": 9, "lr_warmup_iters": 3, "min_lr": 1e-4, "start_weight_decay": 0.1,
        "end_weight_decay": 0.1,
    }  # fmt: skip
    cases = [
        {"actor.optim": DISTRIBUTED, "algorithm": KL, "actor.lr_sched": schedule},
        {"actor.optim": OVERLAPPED, "actor.model": {"precision": "bf16"}, "actor.lr_sched": {"lr_warmup_iters": 6}},
        {"actor.optim": DISTRIBUTED, "actor.model": {**TP2, "precision": "fp16"}, "algorithm": KL},
    ]
    outputs = run_ranks(2, RANKS, "resume", cases=cases, root=str(tmp_path), **given)
    assert outputs[0].count("RESUMED") == len(cases), outputs[0]


def test_checkpoints_without_optimizer_are_resumed_where_asked_and_refused_where_not(given, tmp_path):
    (output,) = run_ranks(1, RANKS, "resume_without_optimizer", root=str(tmp_path), **given)
    assert "optimizer" in said(output) and "no_load_optim" in said(output)


def test_a_warm_start_is_cut_as_the_training_is(given):
    outputs = run_ranks(2, RANKS, "warm_start_cuts", **given)
    assert all("CUT" in output for output in outputs)


def test_grpo_starts_from_the_warm_started_weights(given):
    """Also the float32 copies of half-precision optimizers, and the KL reference."""
    cases = [
        {"algorithm": KL, "actor.optim": OVERLAPPED},
        {"algorithm": KL, "actor.model": {"precision": "bf16"}, "actor.optim": DISTRIBUTED},
        {"algorithm": KL, "actor.model": {"precision": "bf16"}, "actor.optim": {"use_distributed_optimizer": False}},
        {"algorithm": KL, "actor.model": {**TP2, "precision": "fp16"}, "actor.optim": {"loss_scale": 1024.0}},
    ]
    outputs = run_ranks(2, RANKS, "warm_start", cases=cases, **given)
    assert outputs[0].count("WARM") == len(cases), outputs[0]


def test_the_reference_of_the_kl_term_is_the_first_policy_where_routers_have_a_bias(tmp_path):
    biased = {"moe_router_bias_update_rate": 0.3}
    moonlight = sampled(save_tiny_model(tmp_path / "moonlight", "moonlight", num_hidden_layers=2))
    run_ranks(2, RANKS, "keep_reference", case={"algorithm": KL, "actor.model": biased, "actor.optim": OVERLAPPED}, **moonlight)


def test_a_microbatch_far_off_the_old_policy_adds_nothing(given):
    run_ranks(1, RANKS, "stop_early", **given)


def test_engines_and_actor_are_compared_by_the_samples_that_have_log_probabilities_of_both(given):
    run_ranks(1, RANKS, "compare_some", **given)


def test_initial_weights_are_the_same_from_every_source_and_converted_once(given, tmp_path):
    """Read from HF; converted, also where a conversion was killed; from that conversion under other replicas and layouts."""
    other = str(save_tiny_model(tmp_path / "other", "qwen2", tied=True, seed=4, num_hidden_layers=2))
    once = {"actor.megatron": {"mbridge": False}, "actor.megatron.ckpt_convertor": {"save_path": str(tmp_path / "converted")}}
    with pytest.raises(AssertionError, match="exit -9"):
        run_ranks(1, RANKS, "die_while_converting", case=once, folder=given["folder"])
    killed, direct, second, changed = begin(1, given, once, {}, once, {**once, "folder": other})
    assert killed["digest"] == direct["digest"] == second["digest"] != changed["digest"]
    assert [one["converted"] for one in (killed, direct, second)] == [True, False, False]
    assert changed["converted"], "other weights must not be taken for those converted before"
    named = {"actor.megatron": {"use_hf_ckpt": False}, "actor.model": {"megatron_checkpoint": str(tmp_path / "converted")}}
    replicas, layout = begin(2, given, named, {**once, "actor.model": TP2, "folder": other})
    assert replicas["digest"] == layout["digest"] == changed["digest"]
    assert layout["converted"], "each layout needs a conversion of its own"


def test_copies_of_the_weights_with_other_times_are_converted_once(given, tmp_path):
    """Nodes that each have the HF files on their own disk."""
    copies = [str(shutil.copytree(given["folder"], tmp_path / f"node-{rank}", copy_function=shutil.copy)) for rank in range(2)]
    megatron = {"mbridge": False, "distributed_timeout_minutes": 0.5}
    case = {"actor.megatron": megatron, "actor.megatron.ckpt_convertor": {"save_path": str(tmp_path / "converted")}}
    run_ranks(2, RANKS, "convert_own_copies", case=case, folders=copies)


def test_a_conversion_of_another_padding_or_another_build_is_made_anew(given, tmp_path):
    """Such a conversion cannot be loaded, and it stays where it is from run to run."""
    once = {"actor.megatron": {"mbridge": False}, "actor.megatron.ckpt_convertor": {"save_path": str(tmp_path / "converted")}}
    padded = {**once, "actor.model": {"make_vocab_size_divisible_by": 128}}
    first, other, again = begin(1, given, once, padded, padded)
    assert first["digest"] == other["digest"] == again["digest"]
    assert [one["converted"] for one in (first, other, again)] == [True, True, False]
    (shard,) = (tmp_path / "converted").rglob("model_optim_rng.pt")
    state = torch.load(shard, weights_only=True)
    assert set(state) == {"checkpoint_version", "iteration", "topology", "rng_state", "options", "model"}, (
        "raise STATE_FORMAT with the keys"
    )
    del state["options"]
    torch.save(state, shard)
    origin = tmp_path / "converted" / "origin.json"
    made_from = json.loads(origin.read_text())
    del made_from["state_format"]
    origin.write_text(json.dumps(made_from))
    (renewed,) = begin(1, given, padded)
    assert renewed["converted"] and renewed["digest"] == first["digest"]


def test_ranks_meet_at_the_address_that_is_named_and_nobody_listens_elsewhere(given):
    """torch's own store for MASTER_ADDR=127.0.0.1 would listen on every address of the host."""
    found = said(run_ranks(2, RANKS, "meet", folder=given["folder"])[0])
    assert found["listens"] == ["127.0.0.1"]
    assert found["refusal"].startswith("actor rank 0 cannot listen at 192.0.2.1, where the other ranks would look for it: ")


def test_a_rank_comes_up_without_asking_for_a_gpu():
    """Ranks come up while engines on the same GPUs measure what these have left; so nothing may touch one before ``setup``."""
    lines = (
        "import torch; asked = []",
        "def spy(name): return lambda *a, **k: (asked.append(name), False)[1]",
        "for name in ('is_available', 'device_count', 'current_device', '_lazy_init'): setattr(torch.cuda, name, spy(name))",
        "import workers.grpo_actor, workers.sft_actor",
        "print('ASKED', asked)",
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)], cwd=REPO, capture_output=True, text=True, timeout=HANG_S
    )
    assert "ASKED []" in done.stdout, done.stdout + done.stderr


def begin(world_size: int, given: dict[str, str], *cases: dict[str, Any]) -> list[dict[str, Any]]:
    return said(run_ranks(world_size, RANKS, "begin_with", cases=cases, **given)[0])
