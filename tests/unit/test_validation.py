"""Claims about validation rollouts: when they are due, what they ask of engines, their numbers, and what is said of them beforehand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsync.errors import ConfigError
from rlsync.models import model_of
from tests.unit.test_check import check
from tests.unit.test_check import world as world  # the fixture
from tests.unit.test_models_config import QWEN2, QWEN3_VL
from tests.unit.test_preparation import config as prepared_config
from tests.unit.test_preparation import prepare
from workers.config import RunConfig
from workers.grpo_runner import GrpoRunner
from workers.judges import Verdict
from workers.metrics_log import REWARDS, draw
from workers.rollout import sampling_arguments
from workers.screen import summary_rows
from workers.validation import validation_metrics, validation_notes


def config(world: Path, root: Path, *, val: bool = True, **keys: Any) -> RunConfig:
    runner = {name: keys.pop(name) for name in ("val_check_interval", "val_before_train", "save_interval") if name in keys}
    data = {"val_data_paths": [str(world / "val.jsonl")] if val else [], **keys}
    found = prepared_config(world, root, data=data)
    return replace(found, runner=replace(found.runner, **runner))


@pytest.mark.parametrize(
    ("interval", "before", "due"),
    [(1, False, [1, 2, 3, 4, 5]), (2, False, [2, 4, 5]), (2, True, [0, 2, 4, 5]), (-1, True, [0]), (0, False, []), (-1, False, [])],
)
def test_a_validation_follows_every_interval_and_the_last_step(world, tmp_path, interval: int, before: bool, due: list[int]) -> None:
    found = config(world, tmp_path, val_check_interval=interval, val_before_train=before)

    def validated(config: RunConfig) -> list[int]:
        runner = GrpoRunner(config)
        runner._total = 5
        return [step for step in range(6) if runner._validates(step)]

    assert validated(found) == due
    assert validated(replace(found, data=replace(found.data, val_data_paths=()))) == [], "without files"


def test_validation_is_greedy_whatever_the_rollout_is(world, tmp_path) -> None:
    found = config(world, tmp_path)
    found = replace(found, rollout=replace(found.rollout, return_logprobs=True))
    rollout, validation = (sampling_arguments(found, model=model_of(QWEN2), stop_token_ids=(2,), validation=v) for v in (False, True))
    assert {name: (rollout[name], validation[name]) for name in rollout if rollout[name] != validation[name]} == {
        "n": (2, 1), "temperature": (1.0, 0.0), "logprobs": (0, None),
    }  # fmt: skip


@pytest.mark.parametrize(("hf", "never"), [(QWEN2, None), (QWEN3_VL, {151655: -100.0, 151656: -100.0})], ids=["text", "pictures"])
def test_tokens_of_pictures_are_never_drawn(world, tmp_path, hf, never) -> None:
    assert sampling_arguments(config(world, tmp_path), model=model_of(hf), stop_token_ids=(2,))["logit_bias"] == never


def test_numbers_of_a_validation_match_hand_computed_values() -> None:
    verdicts = [Verdict(5.0 if correct else -5.0, correct) for correct in (True, False, True, True)]
    found = validation_metrics(verdicts, response_lengths=[1, 2, 3, 4], properly_ended=[True] * 3 + [False])
    assert found == {
        "val/reward": 2.5, "val/fraction_correct": 0.75, "val/response_length": 2.5, "val/fraction_of_samples_properly_ended": 0.75,
        "val/num_problems": 4.0,
    }  # fmt: skip
    by_function = validation_metrics([Verdict(0.5), Verdict(1.0)], response_lengths=[1, 2], properly_ended=[True, True])
    assert by_function["val/reward"] == 0.75 and "val/fraction_correct" not in by_function


def test_all_validation_problems_are_prepared_in_file_order_or_as_many_as_asked(world, tmp_path) -> None:
    lines = [json.loads(line)["prompt"] for line in (world / "val.jsonl").read_text().splitlines()]
    asked = {"val_check_interval": 1}
    assert [prompt.text for prompt in prepare(config(world, tmp_path, **asked)).data.val_prompts] == lines
    assert [prompt.text for prompt in prepare(config(world, tmp_path, **asked, val_data_size=2)).data.val_prompts] == lines[:2]
    assert prepare(config(world, tmp_path)).data.val_prompts == (), "checked, and not used"


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ({"prompt": "1+1=1+1=1+1=", "solutions": "2"}, {}, "1 were longer than data.max_prompt_length .8., 0 were bad samples"),
        ({"prompt": "1+1=", "solutions": None}, {"on_bad_sample": "skip"}, "0 were longer than data.max_prompt_length .8., 1 were bad"),
        ({"prompt": "1+1=", "solutions": None}, {}, "own.jsonl:1: field 'solutions' holds null"),
    ],
)
def test_validation_files_without_a_problem_are_refused(world, tmp_path, row: Any, keys: dict[str, Any], message: str) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=message):
        prepare(config(world, tmp_path, val_data_paths=[str(own)], val_check_interval=1, **keys))


def test_what_has_no_effect_or_takes_long_is_said(world, tmp_path) -> None:
    def notes(num_problems: int | None = 5, **keys: Any) -> list[str]:
        return list(validation_notes(config(world, tmp_path, **keys), num_problems))

    assert notes(val_check_interval=1) == [] == notes(val=False)
    assert "val_check_interval (1) has no effect: data.val_data_paths names no file" in notes(val=False, val_check_interval=1)[0]
    assert "data.val_data_paths has no effect" in notes()[0]
    assert "sees rows that are trained on" in notes(val_check_interval=1, val_data_paths=[str(world / "train.jsonl")])[0]
    # 4 prompts x 2 samples a step.
    assert notes(8, val_check_interval=1) == [] == notes(16, val_check_interval=2) == notes(None, val_check_interval=1)
    assert "after every step generates 9 responses, more than the training between two of them (8)" in notes(9, val_check_interval=1)[0]
    assert prepare(config(world, tmp_path, val=False, val_check_interval=1)).notes == tuple(notes(val=False, val_check_interval=1))


def test_the_check_says_when_a_run_validates(world, monkeypatch) -> None:
    path = str(world / "val.jsonl")
    data = {"train_data_paths": [str(world / "train.jsonl")], "max_prompt_length": 8, "rollout_batch_size": 4, "val_data_paths": [path]}
    runner = {"seq_length": 16, "experiment_name": "run", "output_dir": str(world.parent / "results")}

    def plan(**keys: Any) -> str | None:
        report = check(world, monkeypatch, data=data, runner={**runner, **keys})
        assert report.findings == []
        return dict(report.plan).get("validation")

    assert plan(val_check_interval=2) == f"every 2 steps and after the last: one greedy response to each problem of {path}"
    before = "before the first step and after every step: one greedy response to each problem of"
    assert plan(val_check_interval=1, val_before_train=True) == f"{before} {path}"
    assert plan() is None
    report = check(world, monkeypatch, runner={**runner, "val_before_train": True})
    assert "runner.val_before_train=True needs data.val_data_paths" in report.findings[0][1]


def test_plot_and_summary_show_validation_from_step_0_on(tmp_path: Path) -> None:
    history = [{"step": 0, "val/reward": 0.2}, {"step": 1, "rollout/reward_scores": 0.1}, {"step": 2, "val/reward": 0.8}]
    assert dict(summary_rows(history, tmp_path))["steps"] == "2"
    history.append({"step": 3, "val/reward": 0.6, "time/validation": 2.0})
    rows = dict(summary_rows(history, tmp_path))
    assert rows["val/reward"] == "0.200 (step 0) -> 0.600 (step 3), best 0.800 (step 2)"
    assert rows["time/validation"] == "2.00 s each, 2 s in all"
    draw(history, REWARDS, tmp_path / "both.png")
    draw(history[1:2], REWARDS, tmp_path / "one.png")
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "one.png").read_bytes()
