"""Claims about where a run begins: what may change since the checkpoint, what may not, and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsync.errors import CheckpointError, ConfigError
from tests.unit.test_preparation import TP2_SHARDS, checkpoint, config, world  # noqa: F401
from workers.config import config_as_dict, describe_config, load_config
from workers.model_folder import read_hf_config
from workers.resume import DATA_STATE, RULES, Rule, check_model, find_beginning, note_on_ranks, rule_of, write_settings

CUT_ANEW = "the saved shards are cut anew for the layout of this run; random states start anew"


@pytest.fixture
def saved(world, tmp_path) -> Path:  # noqa: F811
    """A checkpoint of step 3 with its settings and a data position; contents that nobody reads here are left out."""
    folder = checkpoint(tmp_path, 3, *TP2_SHARDS)
    write_settings(folder, config(world, tmp_path), read_hf_config(world / "model", "rollout.model.model_path"), 2)
    (folder / DATA_STATE).parent.mkdir()
    (folder / DATA_STATE).touch()
    return folder


def begun(world: Path, root: Path, **sections: dict[str, Any]) -> Any:  # noqa: F811
    sections["runner"] = {"resume_dir": "auto", **sections.get("runner", {})}
    return find_beginning(config(world, root, **sections))


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    keys = [key.name for key in describe_config()]
    assert {rule_of(key) for key in keys} == set(Rule)
    assert [prefix for prefix in RULES if not any(key == prefix or key.startswith(f"{prefix}.") for key in keys)] == []
    with pytest.raises(KeyError):
        rule_of("unheard.of")


def test_the_same_settings_are_resumed_without_a_word_but_where_from(world, tmp_path, saved) -> None:  # noqa: F811
    found = begun(world, tmp_path)
    assert (found.resume, found.step, found.changed) == (saved, 3, ())
    assert found.notes == (f"resuming after step 3 from {saved}",)


def test_settings_that_hold_from_now_on_are_listed_with_both_sides(world, tmp_path, saved) -> None:  # noqa: F811
    changes = {"optim": {"lr": 5e-6, "adam_beta2": 0.99}, "seed": 7}
    values = config(world, tmp_path, algorithm={"kl_beta": 0.0, "group_size": 4}, rollout={"max_running_requests": 3}, actor=changes)
    found = find_beginning(with_auto(values))
    assert found.notes[1:] == (
        "settings other than the checkpoint's, which hold from step 4 on:",
        "  algorithm.group_size 2 -> 4",
        "  actor.seed 1234 -> 7",
        "  actor.optim.lr 1e-06 -> 5e-06",
        "  actor.optim.adam_beta2 0.95 -> 0.99",
        "  actor.lr_sched.max_lr 1e-06 -> 5e-06",
    )
    assert "actor.seed" in found.changed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"rollout_batch_size": 8}}, r"data\.rollout_batch_size 4 -> 8.*remove .*data\.pt to start the data from the beginning"),
        ({"actor": {"optim": {"use_distributed_optimizer": False}}}, r"use_distributed_optimizer True -> False.*no_load_optim=True"),
        ({"model": {"freeze_vision_model": True}}, r"actor\.model\.freeze_vision_model False -> True.*no_load_optim=True"),
        ({"model": {"precision": "bf16"}}, r"actor\.model\.precision fp32 -> bf16.*start a new run from .*actor/hf_model"),
        ({"actor": {"lora": {"r": 4}, "megatron": {"mbridge": True}}}, r"actor\.lora\.r 0 -> 4.*start a new run from .*actor/hf_model"),
    ],
)
def test_settings_that_shaped_the_saved_state_are_refused(world, tmp_path, saved, changes, said) -> None:  # noqa: F811
    with pytest.raises(CheckpointError, match=said):
        find_beginning(with_auto(config(world, tmp_path, **changes)))


def test_a_checkpoint_without_an_optimizer_is_refused_unless_none_is_asked_for(world, tmp_path, saved) -> None:  # noqa: F811
    """Before processes start; ranks would find it out after that."""
    write_settings(saved, config(world, tmp_path, actor={"megatron": {"no_save_optim": True, "mbridge": True}}), {}, 2)
    with pytest.raises(CheckpointError, match=r"saved under actor\.megatron\.no_save_optim.*set actor\.megatron\.no_load_optim=True"):
        find_beginning(with_auto(config(world, tmp_path)))
    found = find_beginning(with_auto(config(world, tmp_path, actor={"megatron": {"no_load_optim": True, "mbridge": True}})))
    assert (found.step, found.complete) == (3, True)


def test_another_layout_is_said_to_be_cut_anew_whatever_the_optimizer(world, tmp_path, saved) -> None:  # noqa: F811
    layout = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    found = find_beginning(with_auto(config(world, tmp_path, model=layout)))
    assert CUT_ANEW in found.notes
    assert "  actor.model.tensor_model_parallel_size 2 -> 1" in found.notes
    write_settings(saved, config(world, tmp_path, actor={"optim": {"use_distributed_optimizer": False}}), {}, 2)
    plain = {"optim": {"use_distributed_optimizer": False}}
    assert (
        "  actor.model.tensor_model_parallel_size 2 -> 1"
        in find_beginning(with_auto(config(world, tmp_path, model=layout, actor=plain))).notes
    )


def test_adapters_of_another_layout_are_cut_anew_as_weights_are(world, tmp_path, saved) -> None:  # noqa: F811
    adapters = {"actor": {"lora": {"r": 4}, "megatron": {"mbridge": True}}}
    write_settings(saved, config(world, tmp_path, **adapters), {}, 2)
    found = find_beginning(with_auto(config(world, tmp_path, model={"tensor_model_parallel_size": 1}, **adapters)))
    assert CUT_ANEW in found.notes


def test_merged_weights_alone_are_no_adapters_to_go_on_from(world, tmp_path) -> None:  # noqa: F811
    checkpoint(tmp_path, 3, "hf_model")
    assert not find_beginning(with_auto(config(world, tmp_path))).complete, "the control"
    with pytest.raises(CheckpointError, match=r"HF weights alone, in which adapters are merged.*/actor/hf_model as its model"):
        find_beginning(with_auto(config(world, tmp_path, actor={"lora": {"r": 4}, "megatron": {"mbridge": True}})))


def test_without_the_state_that_they_shaped_they_may_change(world, tmp_path, saved) -> None:  # noqa: F811
    (saved / DATA_STATE).unlink()
    changes = {"optim": {"use_distributed_optimizer": False}, "megatron": {"no_load_optim": True, "mbridge": True}}
    found = find_beginning(with_auto(config(world, tmp_path, data={"rollout_batch_size": 8}, actor=changes)))
    assert {"data.rollout_batch_size", "actor.optim.use_distributed_optimizer"} <= set(found.changed)
    assert "optimizer and schedule start anew at step 3" in found.notes[1]


def test_another_model_is_refused_and_another_number_of_ranks_said_with_both_sides(world, tmp_path, saved) -> None:  # noqa: F811
    found = begun(world, tmp_path)
    hf_config = read_hf_config(world / "model", "rollout.model.model_path")
    check_model(found, {**hf_config, "transformers_version": "another", "torch_dtype": "bfloat16"}, "rollout.model.model_path")
    with pytest.raises(CheckpointError, match=r"another model than rollout\.model\.model_path: hidden_size 128 then, 256 now"):
        check_model(found, {**hf_config, "hidden_size": 256}, "rollout.model.model_path")
    assert note_on_ranks(found, 2) is None
    said = note_on_ranks(found, 4)
    assert said is not None and said.startswith("2 actor ranks saved") and said.endswith("and 4 go on: " + CUT_ANEW)
    moved = begun(world, tmp_path, model={"tensor_model_parallel_size": 1})
    assert CUT_ANEW in moved.notes and note_on_ranks(moved, 4) is None, "it would be said twice"


def test_another_tower_is_another_model_and_another_dtype_inside_is_not(world, tmp_path, saved) -> None:  # noqa: F811
    hf_config = {"text_config": {"hidden_size": 128, "dtype": "float32"}, "vision_config": {"depth": 4}}
    write_settings(saved, config(world, tmp_path), hf_config, 2)
    found = begun(world, tmp_path)
    check_model(found, {**hf_config, "text_config": {"hidden_size": 128, "dtype": "bfloat16"}}, "actor.model.model_path")
    with pytest.raises(CheckpointError, match=r"another model than actor\.model\.model_path: vision_config\.depth 4 then, 5 now"):
        check_model(found, {**hf_config, "vision_config": {"depth": 5}}, "actor.model.model_path")


def test_auto_that_finds_nothing_says_so(world, tmp_path) -> None:  # noqa: F811
    (note,) = begun(world, tmp_path).notes
    assert note == f"runner.resume_dir=auto: no complete checkpoint in {tmp_path}/run/checkpoints, so the run starts fresh"


def test_a_checkpoint_that_does_not_say_what_it_was_made_under_is_resumed_with_a_warning(world, tmp_path, saved) -> None:  # noqa: F811
    (saved / "run.json").unlink()
    assert "run.json is missing" in begun(world, tmp_path).notes[1]
    (saved / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        begun(world, tmp_path)


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        ("[]", r"holds a value of type list, expected a mapping"),
        ({"hf_config": None}, r"holds 'hf_config' of type NoneType, expected a mapping"),
        ({"config": 3}, r"holds 'config' of type int, expected a mapping"),
        ({"actor_ranks": "two"}, r"holds 'actor_ranks' of type str, expected a number"),
        ({"actor_ranks": True}, r"holds 'actor_ranks' of type bool, expected a number"),
    ],
)
def test_settings_of_another_form_are_named_with_what_to_do(world, tmp_path, saved, spoilt, said) -> None:  # noqa: F811
    path = saved / "run.json"
    path.write_text(spoilt if isinstance(spoilt, str) else json.dumps({**json.loads(path.read_text()), **spoilt}))
    with pytest.raises(CheckpointError, match=rf"run\.json {said}; remove it to resume without a comparison of settings"):
        begun(world, tmp_path)


WARM = {"data_paths": ["s.jsonl"], "num_steps": 3}


def test_a_section_that_is_switched_on_or_off_is_told_as_a_whole(world, tmp_path, saved) -> None:  # noqa: F811
    made = config(world, tmp_path, algorithm={"kl_beta": 0.1})
    warm = load_config({**config_as_dict(made), "warm_start": WARM})
    switched_on = find_beginning(with_auto(warm))
    assert "warm_start" in switched_on.changed
    assert "  warm_start absent -> present" in switched_on.notes
    write_settings(saved, warm, read_hf_config(world / "model", "rollout.model.model_path"), 2)
    switched_off = find_beginning(with_auto(made))
    assert switched_off.changed == ("warm_start",)
    assert "  warm_start present -> absent" in switched_off.notes


def test_warm_start_is_told_only_where_a_resumed_run_reads_it(world, tmp_path, saved) -> None:  # noqa: F811
    """With a KL term it makes the reference; else its steps are behind the checkpoint."""
    for kl_beta, changed in ((0.0, ()), (0.1, ("warm_start.num_steps",))):
        values = config_as_dict(config(world, tmp_path, algorithm={"kl_beta": kl_beta}))
        write_settings(saved, load_config({**values, "warm_start": WARM}), read_hf_config(world / "model", "rollout.model.model_path"), 2)
        found = find_beginning(with_auto(load_config({**values, "warm_start": {**WARM, "num_steps": 4}})))
        assert found.changed == changed


@pytest.mark.parametrize("max_steps", [0, 3])
def test_a_run_that_is_done_says_so_and_starts_and_changes_nothing(world, tmp_path, saved, capsys, max_steps) -> None:  # noqa: F811
    from workers.grpo_runner import GrpoRunner  # here, because it imports Megatron

    before = sorted(tmp_path.rglob("*"))
    GrpoRunner(config(world, tmp_path, runner={"resume_dir": "auto", "max_steps": max_steps})).run()
    said = f"runner.max_steps is {max_steps} and {saved} has done 3 steps: there is nothing to do, and nothing was started"
    assert capsys.readouterr().out.split() == said.split() and sorted(tmp_path.rglob("*")) == before


def with_auto(found: Any) -> Any:
    return replace(found, runner=replace(found.runner, resume_dir="auto"))


def test_a_folder_with_other_files_is_not_emptied_for_a_conversion(world, tmp_path) -> None:  # noqa: F811
    """Negative controls: a conversion, whole or interrupted, a folder that is not there, and a run that converts nothing."""
    folder = tmp_path / "weights"
    megatron: dict[str, Any] = {"mbridge": False, "ckpt_convertor": {"save_path": str(folder)}}
    find_beginning(config(world, tmp_path, actor={"megatron": megatron}))
    (folder / "iter_0000000" / "mp_rank_00").mkdir(parents=True)
    find_beginning(config(world, tmp_path, actor={"megatron": megatron}))
    (folder / "latest_checkpointed_iteration.txt").write_text("0")
    (folder / "origin.json").write_text("{}")
    find_beginning(config(world, tmp_path, actor={"megatron": megatron}))
    (folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"save_path .*weights holds thesis.tex, which is of no conversion, and is emptied for one"):
        find_beginning(config(world, tmp_path, actor={"megatron": megatron}))
    find_beginning(config(world, tmp_path, actor={"megatron": {**megatron, "mbridge": True}}))
    trained = {**megatron, "ckpt_convertor": {"save_path": str(checkpoint(tmp_path, 3, *TP2_SHARDS) / "actor")}}
    with pytest.raises(ConfigError, match=r"save_path .* holds iter_0000003, which is of no conversion"):
        find_beginning(config(world, tmp_path, actor={"megatron": trained}))
