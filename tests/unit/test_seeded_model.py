"""Claims about the locally made model of given shapes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from rlsync.errors import ConfigError
from tests.unit.test_config import shipped
from workers.synthetic import make_byte_tokenizer, make_seeded_model

SHAPES = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_weights_once_and_another_seed_others(tmp_path: Path) -> None:
    assert make_seeded_model(tmp_path / "a", SHAPES, 0) and not make_seeded_model(tmp_path / "a", SHAPES, 0)
    assert make_seeded_model(tmp_path / "b", SHAPES, 0) and make_seeded_model(tmp_path / "c", SHAPES, 1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == (300, 64) and {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights


def test_config_and_tokenizer_agree(tmp_path: Path) -> None:
    make_seeded_model(tmp_path / "a", SHAPES, 0)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path / "a"), AutoTokenizer.from_pretrained(tmp_path / "a")
    assert config.eos_token_id == tokenizer.eos_token_id and config.num_key_value_heads == 1
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    assert written["architectures"] == ["Qwen2ForCausalLM"] and written["vocab_size"] == 300


def test_bytes_come_back_and_other_ids_decode_to_nothing() -> None:
    tokenizer, text = make_byte_tokenizer(), "Häuser: 3+4\n#### 7 \\boxed{}"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([[*ids, 151000, tokenizer.eos_token_id]], skip_special_tokens=True) == [text]


def test_shapes_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must hold the 259 tokens of bytes"):
        make_seeded_model(tmp_path / "a", {**SHAPES, "vocab_size": 128}, 0)
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ConfigError, match=r"seeded_model.path .* was not made by rlsync"):
        make_seeded_model(tmp_path, SHAPES, 0)


def test_the_shipped_config_runs_on_a_made_model_unless_told_otherwise() -> None:
    config = shipped("qwen2.5-1.5b-grpo-megatron")
    assert config.seeded_model is not None and config.rollout.model.model_path == config.seeded_model.path
    assert shipped("qwen2.5-1.5b-grpo-megatron", "rollout.model.model_path=/mine").rollout.model.model_path == "/mine"
