"""Claims about the locally made world: deterministic, readable by transformers, and wrong as often as asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsync.errors import ConfigError
from tests.unit.test_config import shipped
from workers.data import PromptDataset, PromptForm
from workers.problems import load_problems
from workers.synthetic import ArithmeticRecipe, build_world, make_tokenizer

RECIPE = ArithmeticRecipe(num_problems=64, num_supervised=2000)


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)).hexdigest()


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    build_world(tmp_path / "a", RECIPE)
    build_world(tmp_path / "b", RECIPE)
    build_world(tmp_path / "c", replace(RECIPE, seed=1))
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_making_it_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_world(tmp_path / "a", RECIPE)
    assert torch.equal(torch.rand(4), expected)


def test_an_existing_world_is_kept_and_a_changed_recipe_makes_a_new_one(tmp_path: Path) -> None:
    world = build_world(tmp_path / "a", RECIPE)
    written = world.train_path.stat().st_mtime_ns
    assert build_world(tmp_path / "a", RECIPE) == world and world.train_path.stat().st_mtime_ns == written
    build_world(tmp_path / "a", replace(RECIPE, num_problems=8))
    assert len(world.train_path.read_text().splitlines()) == 8


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="was not made by rlsync"):
        build_world(tmp_path, RECIPE)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_transformers_reads_model_and_tokenizer(tmp_path: Path) -> None:
    world = build_world(tmp_path / "a", RECIPE)
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    assert tokenizer("12+3=")["input_ids"] == make_tokenizer()("12+3=")["input_ids"]
    assert tokenizer.decode(tokenizer("12+3=")["input_ids"]) == "12+3="
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    model = AutoModelForCausalLM.from_pretrained(world.model_path)
    assert model.dtype == torch.float32 and model.config.model_type == "qwen2"
    assert model.config.vocab_size >= len(tokenizer)
    assert model.config.hidden_size // model.config.num_attention_heads == 32
    logits = model(torch.tensor([tokenizer("1+2=")["input_ids"]])).logits
    assert logits.shape == (1, 4, model.config.vocab_size) and logits.isfinite().all()


def test_training_problems_load_and_are_right(tmp_path: Path) -> None:
    world = build_world(tmp_path / "a", RECIPE)
    problems = load_problems([str(world.train_path)])
    for problem in problems:
        assert isinstance(problem.prompt, str)
        left, right = problem.prompt.removesuffix("=").split("+")
        assert problem.answers == (str(int(left) + int(right)),)
    assert len(PromptDataset(problems, make_tokenizer(), PromptForm(max_prompt_length=8))) == 64


def test_supervised_answers_are_wrong_at_the_stated_rate_and_right_ones_are_the_likeliest(tmp_path: Path) -> None:
    world = build_world(tmp_path / "a", RECIPE)
    lines = [json.loads(line) for line in world.supervised_path.read_text().splitlines()]
    sums = [(sum(map(int, line["prompt"][:-1].split("+"))), int(line["response"])) for line in lines]
    wrong = sum(right != said for right, said in sums) / len(sums)
    assert abs(wrong - RECIPE.supervised_noise) < 0.05
    by_prompt: dict[str, list[int]] = {}
    for line in lines:
        by_prompt.setdefault(line["prompt"], []).append(int(line["response"]))
    for prompt, said in by_prompt.items():
        assert max(set(said), key=said.count) == sum(map(int, prompt[:-1].split("+")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "multiple of the head size 32"),
        ({"supervised_noise": 1.0}, r"must lie in \[0, 1\)"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_numbers_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_world(tmp_path / "a", replace(RECIPE, **change))  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_the_shipped_config_fits_its_world() -> None:
    config = shipped("arithmetic-grpo-megatron")
    assert config.arithmetic is not None and config.warm_start is not None
    steps = min(config.runner.max_steps, config.arithmetic.num_problems // config.data.rollout_batch_size)
    assert steps == config.runner.max_steps
    longest = len(f"{config.arithmetic.max_operand}+{config.arithmetic.max_operand}=")
    assert longest <= config.data.max_prompt_length
    assert len(str(2 * config.arithmetic.max_operand)) + 1 <= (config.algorithm.sampling_params.max_new_tokens or 0)
