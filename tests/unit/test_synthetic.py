"""Claims about the models and data that are made locally: same recipe, same bytes, made once and never over what is there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlsync.errors import ConfigError
from tests.unit.test_config import shipped
from workers.config.schema import ArithmeticRecipe
from workers.data import PromptDataset, PromptForm
from workers.problems import load_problems
from workers.synthetic import build_world, make_byte_tokenizer, make_once, make_seeded_model, make_tokenizer

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


def test_validation_problems_are_each_problem_once(tmp_path: Path) -> None:
    world = build_world(tmp_path / "a", replace(RECIPE, max_operand=2))
    problems = load_problems([str(world.val_path)])
    prompts = [str(problem.prompt) for problem in problems]
    assert len(set(prompts)) == len(prompts) == 9
    assert all(problem.answers == (str(eval(str(problem.prompt).removesuffix("="))),) for problem in problems)
    assert set(prompts) >= {str(problem.prompt) for problem in load_problems([str(world.train_path)])}


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


def test_the_shipped_config_fits_its_world() -> None:
    config = shipped("arithmetic-grpo-megatron")
    assert config.arithmetic is not None and config.warm_start is not None
    steps = min(config.runner.max_steps, config.arithmetic.num_problems // config.data.rollout_batch_size)
    assert steps == config.runner.max_steps
    longest = len(f"{config.arithmetic.max_operand}+{config.arithmetic.max_operand}=")
    assert longest <= config.data.max_prompt_length
    assert len(str(2 * config.arithmetic.max_operand)) + 1 <= (config.algorithm.sampling_params.max_new_tokens or 0)


SHAPES = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


def weights_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_weights_once_and_another_seed_others(tmp_path: Path) -> None:
    assert make_seeded_model(tmp_path / "a", SHAPES, 0) and not make_seeded_model(tmp_path / "a", SHAPES, 0)
    assert make_seeded_model(tmp_path / "b", SHAPES, 0) and make_seeded_model(tmp_path / "c", SHAPES, 1)
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b") != weights_digest(tmp_path / "c")
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


def _make(folder: str, results: Any) -> None:
    def slowly(inside: Path) -> None:
        assert not any(inside.iterdir())
        (inside / "first").touch()
        time.sleep(0.3)
        (inside / "last").touch()

    results.put(make_once(Path(folder), {"seed": 1}, slowly, key="x.path"))
    assert {path.name for path in Path(folder).iterdir()} >= {"first", "last"}


def test_processes_that_want_the_same_folder_make_it_once_and_all_find_it_complete(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path / "new" / "model"), results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [False, False, False, True]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def test_what_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ConfigError, match=r"x.path .* was not made by rlsync"):
        make_once(tmp_path, {}, lambda inside: None, key="x.path")
    assert (tmp_path / "mine").read_text() == "mine"
