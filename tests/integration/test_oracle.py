"""The oracle: after several syncs an engine answers like a fresh engine started from the ``hf_model`` of that version."""

from __future__ import annotations

import pytest

from rlsync.engine.handles.adapters import lora_arguments
from tests.integration.engine_source import ENGINE_ENV
from tests.models import LATENT_SIZES, LATENT_YARN, add_further_layer, save_tiny_model
from tests.ranks import run_ranks

OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Adapters on some of the projections that a parameter packs, and on experts.
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")}
# And on what has one only where it is named.
NAMED = {**LORA, "target_modules": (*LORA["target_modules"], "lm_head", "embed_tokens", "gate")}
# Family, whether its head is tied, the layout of the actor, and its adapters.
CASES = (
    ("llama", False, {"tp_size": 2}, None),
    ("qwen2", True, {"pp_size": 2}, None),
    ("qwen3", True, {"dp_size": 2}, None),
    ("qwen3_moe", False, {"dp_size": 2, "ep_size": 2}, None),
    ("glm4_moe", False, {"dp_size": 2, "ep_size": 2}, None),  # the router's bias is a buffer, in float32 whatever the model is in
    ("deepseek_v3", False, {"dp_size": 2, "ep_size": 2}, None),  # engines keep products of projections beside them
    # Their adapters alone are trained; engines get weights into which these are merged.
    ("qwen2", False, {"tp_size": 2}, LORA),
    ("qwen3_moe", False, {"dp_size": 2, "ep_size": 2}, NAMED),
    # The same beside a base that is sent once, to workers that each hold a part of them.
    ("llama", True, {"tp_size": 2}, {**LORA, "lora_alpha": 10}),
)
# What a case is besides, by its number.
OPTIONS = {
    # Two replicas, each of which answers some of the prompts.
    1: {"options": {"data_parallel_size": 2}},
    # Without a word engines get merged weights.
    len(CASES) - 1: {
        "lora_sync": "adapter",
        "pause_mode": "keep",
        "fresh": False,
        "serves_adapters": True,
        "options": {"tensor_parallel_size": 2, **lora_arguments(LORA["r"]), "max_model_len": 256},
    },
}
# Engines that are held to their actor alone: that what vLLM computes with the weights is what Megatron does.
BY_ACTOR = (
    ("glm4", False, {"tp_size": 2}),
    ("seed_oss", False, {"pp_size": 2}),
    ("smollm3", True, {"tp_size": 2}),
    ("mistral", False, {"pp_size": 2}),
    ("mixtral", False, {"dp_size": 2, "ep_size": 2}),
    ("qwen2_moe", False, {"tp_size": 2, "etp_size": 2}),
    ("moonlight", False, {"dp_size": 2, "ep_size": 2}),
)
# vLLM's kernel on CPU turns queries of latent attention rightly with yarn alone.
SIZES = {"deepseek_v3": LATENT_SIZES, "moonlight": {**LATENT_SIZES, "rope_parameters": LATENT_YARN}}


@pytest.mark.slow
def test_synced_engines_answer_like_fresh_ones(tmp_path, monkeypatch):
    """Token for token, and within 1e-4 log-probability for log-probability (greedy, fp32). The synced ones start without weights."""
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    cases = [
        {
            "folder": str(save_tiny_model(tmp_path / str(number) / "hf", family, tied=tied, **SIZES.get(family, {}))),
            "topology": topology,
            "out_dir": str(tmp_path / str(number)),
            "ddp": OVERLAPPED if "dp_size" in topology else {},  # stale without a gather before each sync
            "lora": lora,
            "serves_adapters": lora is not None and family == "qwen2",
            **OPTIONS.get(number, {}),
        }
        for number, (family, tied, topology, lora) in enumerate(CASES)
    ]
    # Nobody trains it, no engine reads it, and the exported folder has it.
    add_further_layer(tmp_path / str([family for family, *_ in CASES].index("deepseek_v3")) / "hf")
    outputs = run_ranks(2, "tests.integration.oracle_ranks", "compare_each", cases=cases)
    assert outputs[0].count("ORACLE") == len(CASES), outputs[0]


@pytest.mark.slow
def test_synced_engines_answer_with_the_log_probabilities_of_their_actor(tmp_path, monkeypatch):
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    cases = [
        {
            "folder": str(save_tiny_model(tmp_path / family / "hf", family, tied=tied, **SIZES.get(family, {}))),
            "topology": topology,
            "out_dir": str(tmp_path / family),
            "fresh": False,
            "actor_overrides": {"sequence_parallel": "etp_size" in topology},
        }
        for family, tied, topology in BY_ACTOR
    ]
    outputs = run_ranks(2, "tests.integration.oracle_ranks", "compare_each", cases=cases)
    assert outputs[0].count("ORACLE of the actor") == len(BY_ACTOR), outputs[0]


@pytest.mark.slow
def test_workers_that_share_the_experts_of_an_engine_hold_what_those_of_a_fresh_one_do(tmp_path, monkeypatch):
    """vLLM's expert parallelism, seven experts by two workers: each gets its own, once. Workers on CPU of vLLM 0.32 end at the first
    request of such an engine, so that it is not asked."""
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    case = {
        "folder": str(save_tiny_model(tmp_path / "hf", "qwen3_moe", num_experts=7, num_hidden_layers=2)),
        "topology": {"pp_size": 2},
        "out_dir": str(tmp_path / "out"),
        "options": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        "asked": False,
    }
    outputs = run_ranks(2, "tests.integration.oracle_ranks", "sync_and_compare", **case)
    assert outputs[0].count("ORACLE") == 1, outputs[0]


VISION_CASES: tuple[tuple[str, bool, dict[str, int], tuple[str, ...]], ...] = (
    ("qwen2_5_vl", False, {"tp_size": 2}, ()),
    # In the form of released files, the only one that vLLM loads.
    ("qwen3_vl_moe", False, {"dp_size": 2, "ep_size": 2}, ()),
    # Its language model alone is trained: the tower is sent once.
    ("qwen3_vl", True, {"pp_size": 2}, ("vision_model", "vision_projection")),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_synced_engines_that_take_pictures_answer_like_fresh_ones(tmp_path, monkeypatch):
    """The same of tower and language model, trained and asked with pictures; log-probabilities are those of the actor, too."""
    pytest.importorskip("torchvision", reason="transformers' processors need it; make setup installs it")
    from tests.vision_folders import save_vision_folder

    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    cases = [
        {
            "folder": str(save_vision_folder(tmp_path / family / "hf", family, tied=tied, transposed=family == "qwen3_vl_moe")),
            "topology": topology,
            "out_dir": str(tmp_path / family),
            "sees": True,
            "frozen": frozen,
        }
        for family, tied, topology, frozen in VISION_CASES
    ]
    outputs = run_ranks(2, "tests.integration.oracle_ranks", "compare_each", cases=cases)
    assert outputs[0].count("ORACLE") == len(VISION_CASES), outputs[0]
