"""The actor of supervised fine-tuning, rank by rank, without Ray and engines: steps and validation are transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from workers.config.schema import ArithmeticRecipe, PictureRecipe
from workers.picture_world import build_picture_world
from workers.synthetic import build_world

RANKS = "tests.integration.sft_actor_ranks"
RECIPES = Path(__file__).resolve().parents[2] / "configs" / "sft" / "recipe"
DYNAMIC = {"enable_dynamic_batch_size": True, "max_tokens_per_mbs": 24}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
# Answers of one to three digits, so that means of microbatches are not the mean.
RECIPE = ArithmeticRecipe(max_operand=120, num_problems=1, num_supervised=64, num_held_out=5, supervised_noise=0.0, num_layers=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "world"
    build_world(folder, RECIPE)
    return folder


def test_steps_and_validation_equal_transformers_in_every_layout_however_the_batch_is_cut(world: Path) -> None:
    cases = [
        {},
        {"runner": DYNAMIC, "actor.optim": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
        {"algorithm": {"loss_agg_func": "micro-batch-mean"}},
        {"actor.model": TP2},
        {"actor.model": {"context_parallel_size": 2}, "runner": DYNAMIC},
        {"actor.model": PP2, "runner": {**DYNAMIC, "packing": True}},
        {"actor.model": {**PP2, "virtual_pipeline_model_parallel_size": 2}, "runner": DYNAMIC},
        {"actor.model": {**PP2, "virtual_pipeline_model_parallel_size": 2}, "algorithm": {"loss_agg_func": "micro-batch-mean"}},
        {"actor.model": TP2, "actor.lora": {"r": 4, "alpha": 16.0}},
        {"actor.model": PP2, "actor.lora": {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}},
    ]
    outputs = run_ranks(2, RANKS, "train_as_transformers", cases=cases, world=str(world))
    assert outputs[0].count("EQUAL") == len(cases), outputs[0]


def test_adapters_learn_what_the_whole_model_learns(tmp_path: Path) -> None:
    """All sums of two numbers up to 4, of which the base answers none: adapters of rank 8 in 128 dimensions answer as many as training
    all weights does. Negative control: adapters that are hardly trained do not."""
    build_world(tmp_path / "world", ArithmeticRecipe(num_problems=1, num_supervised=1024, supervised_noise=0.0))
    steps = {"adam_eps": 1e-8, "weight_decay": 0.0, "clip_grad": 1.0}
    whole, lora, still = ({"actor.optim": {**steps, "lr": lr}} for lr in (3e-3, 1e-2, 1e-6))
    cases = [whole, *({**case, "actor.lora": {"r": 8, "alpha": 16.0}} for case in (lora, still))]
    (output,) = run_ranks(1, RANKS, "learn", cases=cases, world=str(tmp_path / "world"), num_steps=40)
    before, after = zip(*(json.loads(line) for line in re.findall("SAID (.*)", output)), strict=True)
    assert before == (0, 0, 0) and min(after[:2]) > 0.95 and after[2] < 0.1, after


def test_pictures_are_trained_on_alike_in_every_layout(tmp_path: Path) -> None:
    """Of the four micro-batches of a step one has no picture, of two replicas the second one's first."""
    recipe = PictureRecipe(num_train=16, num_held_out=1, hidden_size=64, num_layers=4, vision_hidden_size=64, vision_depth=1)
    made = build_picture_world(tmp_path / "world", recipe)
    rows = [json.loads(line) for line in made.train_path.read_text().splitlines()]
    rows = [{**row, "image": None} if i % 8 in (1, 4, 5) else row for i, row in enumerate(rows)]
    path = made.train_path.parent / "mixed.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cases = [{}, TP2, {**PP2, "virtual_pipeline_model_parallel_size": 2}]
    outputs = run_ranks(2, RANKS, "see_alike", cases=cases, world=str(tmp_path / "world"), rows=str(path))
    assert outputs[0].count("EQUAL") == len(cases), outputs[0]


def test_a_bad_row_of_one_replica_is_one_error_on_all_ranks(world: Path, tmp_path: Path) -> None:
    rows = (world / "supervised.jsonl").read_text().splitlines()[:24]
    rows[15] = json.dumps({"prompt": "1+1="})  # the second replica's in the second step
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for output in run_ranks(2, RANKS, "meet_a_bad_row", world=str(world), rows=str(tmp_path / "rows.jsonl")):
        assert "rows.jsonl:16: no field 'response'" in output.split("SAID ")[1], output


def test_rows_that_replicas_leave_out_are_counted_together_in_their_step(world: Path, tmp_path: Path) -> None:
    rows = (world / "supervised.jsonl").read_text().splitlines()[:24]
    rows[10] = json.dumps({"prompt": "1+1=", "response": "2" * 64})  # the first replica's in the second step
    rows[15] = json.dumps({"prompt": "1+1="})  # the second one's
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for output in run_ranks(2, RANKS, "leave_rows_out", world=str(world), rows=str(tmp_path / "rows.jsonl")):
        assert json.loads(output.split("SAID ")[1].splitlines()[0]) == [[0, 0], [1, 1], [0, 0]], output


def test_a_pretraining_begins_with_the_same_random_weights_in_every_layout_and_precision(tmp_path: Path) -> None:
    """By recipe, with a layout and a precision of one's own, and again from the weights that were saved."""
    tp, pp, ep = (f"actor.model.{axis}_model_parallel_size=2" for axis in ("tensor", "pipeline", "expert"))
    from_hf = ["actor.seed=7", "actor.megatron.convert_from_hf=True", f"actor.model.model_path={tmp_path}/llama3_8b"]
    dense = [[], [tp, "actor.model.sequence_parallel=True", "actor.model.precision=bf16"], from_hf]
    others = ("llama3_70b", "qwen2.5_7b", "qwen2.5_72b", "qwen3_8b", "qwen3_30b_a3b", "qwen3_235b_a22b", "moonlight_16b")
    cases = [
        {"recipe": "llama3_8b", "layouts": dense},
        {"recipe": "deepseek_v3", "layouts": [[ep], [pp]]},
        *({"recipe": recipe, "layouts": [[]]} for recipe in others),
    ]
    assert {case["recipe"] for case in cases} == {path.stem for path in RECIPES.glob("*.yaml")}
    outputs = run_ranks(2, RANKS, "pretrain_twins", cases=cases, folder=str(tmp_path))
    assert outputs[0].count("EQUAL") == sum(len(case["layouts"]) for case in cases), outputs[0]
