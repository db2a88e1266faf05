"""Claims about ``rlsync plan`` and ``rlsync verify``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlsync.cli import main

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
    "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN_7B))
    return str(path)


def test_plan_counts_the_bytes_of_a_model_it_never_sees(config, capsys):
    assert main(["plan", config, "--actor", "tp=2,dp=2", "--rollout", "tp=2,engines=2", "--json"]) == 0
    price = json.loads(capsys.readouterr().out)
    assert price["tensor_bytes"] == 15_231_233_024, "7.6e9 parameters in bf16, as the published checkpoint"
    assert price["num_tensors"] == 339 and price["actor_ranks"] == 4 and price["engine_workers"] == 4
    low, high = price["filled_bytes_per_actor_rank"]
    assert low > 0.15 * price["tensor_bytes"] and high < 0.35 * price["tensor_bytes"], "replicas share the work"
    assert price["ring_bytes"] == 2 * price["largest_bucket_bytes"]


def test_plan_refuses_what_cannot_be_divided(config, capsys):
    assert main(["plan", config, "--actor", "tp=8"]) == 1
    assert "28 attention heads cannot be divided by a tensor axis of 8 ranks" in capsys.readouterr().err
    assert main(["plan", config, "--actor", "tensor=8"]) == 1
    assert "cannot read 'tensor=8'; write tp=N" in capsys.readouterr().err


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def test_verify_finds_one_flipped_bit_and_every_other_difference(tmp_path, capsys):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor([float("nan"), 0.0]), "c": torch.ones(2)}
    first, same = checkpoint(tmp_path / "1", tensors), checkpoint(tmp_path / "2", tensors)
    assert main(["verify", first, same]) == 0
    assert capsys.readouterr().out.startswith("equal: 3 tensors")
    flipped = tensors["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    other = checkpoint(tmp_path / "3", {"a": flipped, "b": torch.tensor([float("nan"), -0.0]), "d": torch.ones(2)})
    assert main(["verify", first, other]) == 1
    out = capsys.readouterr().out
    assert "a: 1 of 12 elements differ" in out and "b: 1 of 2 elements differ" in out
    assert "c: only in the first" in out and "d: only in the second" in out


def test_verify_names_a_folder_without_weights(tmp_path, capsys):
    assert main(["verify", str(tmp_path), str(tmp_path)]) == 1
    assert "no *.safetensors file" in capsys.readouterr().err
