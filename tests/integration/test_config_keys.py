"""A config.json as transformers reads it: logits of Megatron against transformers for what is accepted, and what refusals prevent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsync.models import check_config
from tests.models import VOCAB_SIZE, save_tiny_model
from tests.ranks import run_ranks

# name -> family, changes of the tiny model, changes of its config.json (None removes a key), topology.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "swish": ("qwen3", {}, {"hidden_act": "swish"}, {"tp_size": 2}),
    "no epsilon": ("llama", {}, {"rms_norm_eps": None}, {"tp_size": 2}),
    "another epsilon": ("qwen3", {"rms_norm_eps": 0.1}, {}, {"tp_size": 2}),
    "one key-value head a head": ("llama", {"num_key_value_heads": 4}, {"num_key_value_heads": None}, {"tp_size": 2}),
    "linear, as transformers 4 spells it": (
        "qwen2", {}, {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 3.0}}, {"tp_size": 2},
    ),
    "the same twice": (
        "qwen2",
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"tp_size": 2},
    ),
    "llama3 of the length beside it": (
        "llama", {}, {"rope_parameters": None, "rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, {"tp_size": 2},
    ),
    "llama3 of the longest position": ("llama", {"max_position_embeddings": 128}, {"rope_parameters": LLAMA3}, {"tp_size": 2}),
    "yarn": ("qwen2", {}, {"rope_parameters": {**YARN, "rope_theta": 1e4}}, {"tp_size": 2}),
    "yarn with a factor of its own, as transformers 4 spells it": (
        "qwen3", {}, {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {**YARN, "attention_factor": 1.3}}, {"tp_size": 2},
    ),
    "mistral": ("mistral", {}, {}, {"tp_size": 2}),
    "no rope at all": ("qwen3", {}, {"rope_parameters": None}, {"tp_size": 2}),
    "two uneven stages, interleaved": (
        "qwen3", {"num_hidden_layers": 6}, {}, {"pp_size": 2, "vpp_size": 2, "first_stage_layers": 2, "last_stage_layers": 4},
    ),
}  # fmt: skip
# What is refused, and how transformers' answer moves when it obeys the key: {name: family, changes of config.json}.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "attention to later tokens": ("qwen3", {"is_causal": False}),
    "another rope beside": ("qwen3", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "another class": ("llama", {"model_type": "mistral", "sliding_window": 4}),
    "a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
}


def changed(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in changes or value is not None}))
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens()).logits


def test_logits_are_those_of_transformers_whatever_the_config_says(tmp_path):
    cases = []
    for name, (family, recipe, changes, topology) in CASES.items():
        folder = changed(save_tiny_model(tmp_path / name, family, **recipe), changes)
        cases.append({"folder": str(folder), "topology": topology, "tokens": tokens().tolist(), "logits": logits(folder).tolist()})
    outputs = run_ranks(2, "tests.integration.bridge_ranks", "agree_with_huggingface", cases=cases, out_dir=str(tmp_path))
    assert outputs[1].count("LOGITS") == len(cases)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_would_be_wrong_if_it_were_ignored(name, tmp_path):
    family, changes = REFUSED[name]
    folder = save_tiny_model(tmp_path / "plain", family)
    odd = changed(Path(shutil.copytree(folder, tmp_path / "odd")), changes)
    assert (logits(odd) - logits(folder)).abs().max() > 0.01
    assert check_config(json.loads((folder / "config.json").read_text())) == []
    assert check_config(json.loads((odd / "config.json").read_text()))
