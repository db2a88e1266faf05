"""Mixtures of experts on real Megatron ranks: logits equal transformers', and experts survive load, export and save bit for bit."""

from __future__ import annotations

import shutil
from itertools import cycle
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.hf_models import make_models
from tests.models import MOE_FAMILIES, STACKED_FAMILIES, add_further_layer
from tests.ranks import run_ranks

RANKS = "tests.integration.bridge_ranks"
SP = {"sequence_parallel": True}
UNEVEN = {"first_stage_layers": 1, "last_stage_layers": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    names = (*MOE_FAMILIES, "qwen3_moe-tied", *(f"{family}-stacked" for family in STACKED_FAMILIES))
    return make_models(tmp_path_factory.mktemp("hf"), names)


def test_logits_and_experts_agree_with_huggingface_on_four_ranks(models, tmp_path):
    """EP, ETP, TP x EP, PP with a dense layer among those with experts, uneven PP, VPP, sequence parallelism, DP beside EP."""
    cases = [
        {**models["qwen3_moe"], "topology": {"dp_size": 4, "ep_size": 4}},
        {**models["qwen3_moe"], "topology": {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}, "overrides": SP},
        {**models["qwen3_moe"], "topology": {"tp_size": 2, "pp_size": 2, "ep_size": 2}, "overrides": SP},
        {**models["qwen3_moe-tied"], "topology": {"pp_size": 2, "vpp_size": 2, "dp_size": 2, "ep_size": 2}},
        {**models["qwen2_moe"], "topology": {"tp_size": 2, "pp_size": 2, "etp_size": 2, **UNEVEN}},
        {**models["qwen2_moe"], "topology": {"tp_size": 4, "ep_size": 4}, "overrides": SP},
        {**models["mixtral"], "topology": {"tp_size": 2, "dp_size": 2, "ep_size": 4}, "overrides": SP},
        {**models["mixtral"], "topology": {"pp_size": 4}},
        {**models["glm4_moe"], "topology": {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}, "overrides": SP},
        {**models["glm4_moe"], "topology": {"pp_size": 2, "vpp_size": 2, "dp_size": 2, "ep_size": 2}},
        {**models["deepseek_v3"], "topology": {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}, "overrides": SP},
        {**models["deepseek_v3"], "topology": {"pp_size": 2, "vpp_size": 2, "dp_size": 2, "ep_size": 2}},
        {**models["moonlight"], "topology": {"tp_size": 2, "pp_size": 2, "ep_size": 2, **UNEVEN}, "overrides": SP},
        {**models["moonlight"], "topology": {"dp_size": 4, "ep_size": 4}},
        {**models["mixtral"], "topology": {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}, "overrides": SP},
        {**models["mixtral"], "topology": {"pp_size": 2, "vpp_size": 2, "dp_size": 2, "ep_size": 2}},
        {**models["qwen2_moe"], "topology": {"pp_size": 2, "vpp_size": 2, "dp_size": 2, "ep_size": 2}},
        {**models["moonlight"], "topology": {"tp_size": 2, "pp_size": 2, "vpp_size": 2, "etp_size": 2}, "overrides": SP},
    ]
    outputs = run_ranks(4, RANKS, "agree_with_huggingface", cases=cases, out_dir=str(tmp_path))
    assert outputs[3].count("LOGITS") == len(cases), "the last rank is on the last stage of every case"


def test_logits_and_experts_agree_with_huggingface_on_eight_ranks(models, tmp_path):
    """Every axis that cuts experts or layers at once."""
    axes = {"tp_size": 2, "pp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2}
    case = {**models["deepseek_v3"], "topology": axes, "overrides": SP}
    outputs = run_ranks(8, RANKS, "agree_with_huggingface", cases=[case], out_dir=str(tmp_path))
    assert outputs[7].count("LOGITS") == 1


def test_stacked_experts_of_every_family_are_read_and_restored_in_that_form(models, tmp_path):
    """As transformers 5 writes the tensors of its modules. Names and bits of export and save are those of the files."""
    topologies = (
        {"tp_size": 2, "etp_size": 2},
        {"dp_size": 2, "ep_size": 2},
        {"pp_size": 2},
        {"dp_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"pp_size": 2},
    )
    cases = [{**models[f"{family}-stacked"], "topology": axes} for family, axes in zip(STACKED_FAMILIES, cycle(topologies))]
    for case in cases:
        names = load_file(Path(case["folder"], "model.safetensors"))
        assert any(name.endswith("experts.gate_up_proj") for name in names) and not any(".experts.0." in name for name in names)
    outputs = run_ranks(2, RANKS, "agree_with_huggingface", cases=cases, out_dir=str(tmp_path))
    assert outputs[1].count("LOGITS") == len(cases)


def test_layers_that_predict_further_tokens_are_saved_bit_for_bit_and_computed_without(models, tmp_path):
    """In whatever dtypes and under whatever names. Logits are those of the model without them."""
    cases = []
    for family, axes in (("glm4_moe", {"tp_size": 2, "etp_size": 2}), ("deepseek_v3", {"pp_size": 2})):
        folder = add_further_layer(shutil.copytree(models[family]["folder"], tmp_path / family))
        cases.append({**models[family], "folder": str(folder), "topology": axes, "kept": "model.layers.4."})
    outputs = run_ranks(2, RANKS, "agree_with_huggingface", cases=cases, out_dir=str(tmp_path / "out"))
    assert outputs[1].count("LOGITS") == len(cases)
    assert outputs[0].count("(MTP) are neither trained nor sent to engines: saved folders have their 4 tensors as") >= len(cases)


def test_transformer_engine_names_of_experts_and_latent_attention_do_not_mislead(models):
    folders = [models[name]["folder"] for name in ("qwen3_moe", "glm4_moe", "deepseek_v3", "moonlight")]
    run_ranks(2, RANKS, "survive_transformer_engine_names", folders=folders)


def test_experts_lie_in_whichever_module_of_megatrons_holds_them(models):
    outputs = run_ranks(2, RANKS, "hold_experts_in_other_modules", folder=models["qwen3_moe"]["folder"])
    assert all("HELD" in output for output in outputs)
