"""Claims about what is refused, and what is said, before any process of a run starts."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, ProcessorMixin

from rlsync.errors import CheckpointError, ConfigError
from tests.unit.test_models_config import QWEN2, QWEN3_VL
from workers.config import RunConfig, SftConfig, load_config
from workers.config.schema import ArithmeticRecipe
from workers.model_folder import check_chat_template
from workers.preparation import Preparation, load_tokenizer
from workers.preparation import prepare as prepare_from
from workers.resume import DATA_STATE, find_beginning
from workers.sft_preparation import open_loader
from workers.synthetic import build_world

RECIPE = ArithmeticRecipe(
    seed=0, max_operand=4, num_problems=64, num_supervised=8, supervised_noise=0.5, hidden_size=128, num_layers=1
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world") / "world"
    build_world(path, RECIPE)
    return path


def config(world: Path, root: Path, **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "cluster": {"component_placement": {"actor": "0-1", "rollout,reward": "2"}},
        "runner": {"seq_length": 16, "experiment_name": "run", "output_dir": str(root)},
        "algorithm": {"group_size": 2},
        "rollout": {"model": {"model_path": str(world / "model")}},
        "data": {"train_data_paths": [str(world / "train.jsonl")], "max_prompt_length": 8, "rollout_batch_size": 4},
        "actor": {"model": {"precision": "fp32", "tensor_model_parallel_size": 2}, "megatron": {"mbridge": True}},
    }
    for section, keys in sections.items():
        target = values["actor"] if section in ("model", "megatron") else values
        target[section] = {**target[section], **keys}
    return load_config(values)


def prepare(config: RunConfig) -> Preparation:
    return prepare_from(config, find_beginning(config))


def checkpoint(root: Path, step: int, *parts: str) -> Path:
    """The names of a checkpoint; nobody reads further here."""
    folder = root / "run" / "checkpoints" / f"global_step_{step}"
    for part in parts:
        (folder / "actor" / part).mkdir(parents=True)
    (folder / "actor" / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


TP2_SHARDS = ("iter_0000003/mp_rank_00", "iter_0000003/mp_rank_01")


def test_a_fresh_run_starts_at_the_first_step(world, tmp_path) -> None:
    prepared = prepare(config(world, tmp_path))
    assert (prepared.beginning.resume, prepared.beginning.step, prepared.notes) == (None, 0, ())
    assert len(prepared.data.loader) == 64 // 4 and prepared.stop_ids == (2,)


@pytest.mark.parametrize("named", ["nowhere", "run/checkpoints"])
def test_a_folder_that_is_no_checkpoint_is_refused(world, tmp_path, named) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="does not exist, or has no actor/ folder"):
        prepare(config(world, tmp_path, runner={"resume_dir": str(tmp_path / named)}))


def test_a_checkpoint_that_was_cut_short_is_refused_and_not_chosen(world, tmp_path) -> None:
    folder = checkpoint(tmp_path, 3, *TP2_SHARDS)
    (folder / "actor" / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        prepare(config(world, tmp_path, runner={"resume_dir": str(folder)}))
    assert prepare(config(world, tmp_path, runner={"resume_dir": "auto"})).beginning.resume is None


def test_another_layout_is_said_where_only_the_names_of_folders_tell(world, tmp_path) -> None:
    checkpoint(tmp_path, 3, *TP2_SHARDS)
    found = prepare(config(world, tmp_path, runner={"resume_dir": "auto"}, model={"tensor_model_parallel_size": 1}))
    assert any("the saved shards are cut anew for the layout of this run" in note for note in found.beginning.notes)
    same = prepare(config(world, tmp_path, runner={"resume_dir": "auto"}))
    assert not any("cut anew" in note for note in same.beginning.notes)


def test_auto_takes_the_newest_and_says_that_its_data_position_is_missing(world, tmp_path) -> None:
    checkpoint(tmp_path, 2, "iter_0000002/mp_rank_00", "iter_0000002/mp_rank_01")
    folder = checkpoint(tmp_path, 3, *TP2_SHARDS)
    prepared = prepare(config(world, tmp_path, runner={"resume_dir": "auto"}))
    assert (prepared.beginning.resume, prepared.beginning.step) == (folder, 3)
    assert [note.split(":")[0] for note in prepared.notes] == ["warning"] and "data" in prepared.notes[0]


@pytest.mark.parametrize("name", ["hf_model", "hf_checkpoint"])
def test_hf_weights_alone_are_resumed_under_any_layout_with_a_warning(world, tmp_path, name) -> None:
    checkpoint(tmp_path, 5, name)
    prepared = prepare(config(world, tmp_path, runner={"resume_dir": "auto"}, model={"tensor_model_parallel_size": 1}))
    assert prepared.beginning.step == 5 and "optimizer and schedule start anew at step 5" in prepared.beginning.notes[1]


def test_the_data_goes_on_where_it_was_and_other_data_is_refused(world, tmp_path) -> None:
    whole = [prompt.index for batch in prepare(config(world, tmp_path)).data.loader for prompt in batch]
    loader = prepare(config(world, tmp_path)).data.loader
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = checkpoint(tmp_path, 3, *TP2_SHARDS) / DATA_STATE
    state.parent.mkdir()
    torch.save(loader.state_dict(), state)
    resumed = prepare(config(world, tmp_path, runner={"resume_dir": "auto"}))
    assert resumed.notes == () and [p.index for batch in resumed.data.loader for p in batch] == whole[12:]
    with pytest.raises(CheckpointError, match="rollout_batch_size 4 -> 8"):
        prepare(config(world, tmp_path, runner={"resume_dir": "auto"}, data={"rollout_batch_size": 8}))


def test_without_hf_weights_a_run_needs_a_checkpoint_that_is_there(world, tmp_path) -> None:
    without = {"use_hf_ckpt": False}
    with pytest.raises(ConfigError, match=r"megatron_checkpoint is required if use_hf_ckpt is False.*found no complete checkpoint"):
        prepare(config(world, tmp_path, megatron=without, runner={"resume_dir": "auto"}))
    checkpoint(tmp_path, 3, *TP2_SHARDS)
    assert prepare(config(world, tmp_path, megatron=without, runner={"resume_dir": "auto"})).beginning.step == 3
    with pytest.raises(ConfigError, match="kl_beta is not 0"):
        prepare(config(world, tmp_path, megatron=without, runner={"resume_dir": "auto"}, algorithm={"kl_beta": 0.1}))
    with pytest.raises(CheckpointError, match="is missing"):
        prepare(config(world, tmp_path, megatron=without, model={"megatron_checkpoint": str(tmp_path / "nowhere")}))


def test_a_model_path_without_a_config_is_refused(world, tmp_path) -> None:
    found = config(world, tmp_path)
    model = replace(found.rollout.model, model_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        prepare(replace(found, rollout=replace(found.rollout, model=model)))


def copied_model(world: Path, root: Path) -> Path:
    shutil.copytree(world / "model", root / "model")
    return root / "model"


def with_model(world: Path, root: Path, model: Path, **sections: dict[str, Any]) -> RunConfig:
    found = config(world, root, **sections)
    actor = replace(found.actor, tokenizer=replace(found.actor.tokenizer, tokenizer_model=str(model)))
    return replace(found, actor=actor, rollout=replace(found.rollout, model=replace(found.rollout.model, model_path=str(model))))


def test_a_folder_without_a_tokenizer_is_refused_instead_of_getting_an_empty_one(world, tmp_path) -> None:
    model = copied_model(world, tmp_path)
    (model / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer: neither tokenizer\.json"):
        prepare(with_model(world, tmp_path, model))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", "[]", r"config\.json holds list instead of an object"),
        ("config.json", b"\xff", r"config\.json is not UTF-8"),
        ("generation_config.json", "{", r"generation_config\.json is not JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id of .* is 'x'"),
        ("tokenizer.json", "{", r"tokenizer\.json is not JSON"),
        ("tokenizer.json", "{}", "no tokenizer can be made from"),
    ],
)
def test_broken_files_of_a_model_folder_are_named(world, tmp_path, name, content, message) -> None:
    model = copied_model(world, tmp_path)
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        prepare(with_model(world, tmp_path, model))


def test_a_tokenizer_of_another_model_is_refused(world, tmp_path) -> None:
    model = copied_model(world, tmp_path)
    held = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**held, "vocab_size": 4}))
    with pytest.raises(ConfigError, match="vocab_size is 4: they belong to different models"):
        prepare(with_model(world, tmp_path, model))


@pytest.mark.parametrize("kind", ["llm", "text", "grpo"])
def test_an_added_token_that_the_model_has_no_embedding_of_is_named_before_a_run(world, tmp_path, kind) -> None:
    """It has the id of a padded row, or, under tensor parallelism, none: nobody says so later."""
    model = copied_model(world, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocab_size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    held = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**held, "vocab_size": vocab_size}))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+<new>=", "response": "1", "solutions": "1"}\n' * 8)

    def start() -> None:
        if kind == "grpo":
            prepare(with_model(world, tmp_path, model, data={"train_data_paths": [str(data)]}))
        else:
            next(iter(open_loader(supervised(model, data, tmp_path, kind), tokenizer)))

    with pytest.raises(ConfigError, match=rf"rows\.jsonl:\d: .*'<new>' of id {vocab_size} .*vocab_size is {vocab_size}; resize"):
        start()


def supervised(model: Path, data: Path, root: Path, kind: str) -> SftConfig:
    values: dict[str, Any] = {
        "cluster": {"component_placement": {"actor": "0"}},
        "runner": {"task_type": "sft", "seq_length": 16, "experiment_name": "run", "output_dir": str(root)},
        "data": {"type": kind, "train_data_paths": [str(data)], "prompt_key": "prompt", "apply_chat_template": False},
        "actor": {"model": {"model_path": str(model)}, "micro_batch_size": 1, "global_batch_size": 1},
    }
    if kind == "llm":
        values["data"] |= {"answer_key": "response"}
    found = load_config(values, "sft")
    assert isinstance(found, SftConfig)
    return found


def test_bad_rows_end_a_run_or_are_left_out_and_said(world, tmp_path) -> None:
    lines = (world / "train.jsonl").read_text().splitlines()
    lines[3:6] = [
        '{"prompt": "1+1=", "solutions": null}',
        '{"prompt": "", "solutions": "1"}',
        '{"prompt": "1+1=", "solutions": "\\\\sqrt{2"}',
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="3 bad samples") as caught:
        prepare(config(world, tmp_path, data={"train_data_paths": [str(data)]}))
    for number, reason in ((4, "holds null"), (5, "is empty"), (6, "math-verify cannot read the reference answer")):
        assert re.search(rf"train\.jsonl:{number}: .*{reason}", str(caught.value))
    prepared = prepare(config(world, tmp_path, data={"train_data_paths": [str(data)], "on_bad_sample": "skip"}))
    assert prepared.data.loader.state_dict()["order"]["num_problems"] == len(lines) - 3 and prepared.notes[0].startswith(
        "left out 3 bad samples"
    )


def test_prompts_that_are_too_long_are_counted_in_a_note_of_their_files(world, tmp_path) -> None:
    long = json.dumps({"prompt": "1+1+1+1+1+1=", "solutions": ["6"]})
    lines = (world / "train.jsonl").read_text().splitlines()
    for name, count in (("train", 3), ("held_out", 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, *[long] * count]))
    data = {"train_data_paths": [str(tmp_path / "train.jsonl")], "val_data_paths": [str(tmp_path / "held_out.jsonl")]}
    runner = {"seq_length": 16, "experiment_name": "run", "output_dir": str(tmp_path), "val_before_train": True}
    for filtered, become in ((True, "are left out"), (False, "are cut to their last tokens")):
        prepared = prepare(config(world, tmp_path, runner=runner, data={**data, "filter_prompt_by_length": filtered}))
        assert prepared.notes == (
            f"3 of 67 prompts of data.train_data_paths are longer than data.max_prompt_length (8) and {become}",
            f"2 of 66 prompts of data.val_data_paths are longer than data.max_prompt_length (8) and {become}",
        )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04cut"])
def test_a_broken_data_position_is_named(world, tmp_path, content) -> None:
    state = checkpoint(tmp_path, 3, *TP2_SHARDS) / DATA_STATE
    state.parent.mkdir()
    state.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"data\.pt cannot be read .*resume from an older checkpoint"):
        prepare(config(world, tmp_path, runner={"resume_dir": "auto"}))
    torch.save([1, 2], state)
    with pytest.raises(CheckpointError, match="holds no data position"):
        prepare(config(world, tmp_path, runner={"resume_dir": "auto"}))


def test_a_vision_language_models_template_is_the_one_that_transformers_processor_has(world, tmp_path) -> None:
    """Of chat_template.json before any other; a model of text has none of it, as in transformers."""
    folder = shutil.copytree(world / "model", tmp_path / "model")
    files: dict[str, str | None] = {
        "chat_template.json": json.dumps({"chat_template": "json {% for m in messages %}{{ m.content }}{% endfor %}"}),
        "chat_template.jinja": "jinja {% for m in messages %}{{ m.content }}{% endfor %}",
    }
    for names in ((), ("chat_template.jinja",), ("chat_template.json",), tuple(files)):
        for name, text in files.items():
            (folder / name).unlink(missing_ok=True)
            if name in names:
                (folder / name).write_text(text)
        theirs = ProcessorMixin.get_processor_dict(folder)[0].get("chat_template")
        run = config(world, tmp_path, rollout={"model": {"model_path": str(folder)}})
        assert load_tokenizer(run, QWEN3_VL).chat_template == theirs
        own = AutoTokenizer.from_pretrained(folder).chat_template
        assert load_tokenizer(run, QWEN2).chat_template == own
        for takes_pictures, template in ((True, theirs), (False, own)):
            if template is not None:
                check_chat_template(folder, takes_pictures=takes_pictures)
            else:
                with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
                    check_chat_template(folder, takes_pictures=takes_pictures)
    for text, said in (('{"chat_template": "{% for"}', "is not one: line 1"), ("{}", "holds no chat_template"), ("[", "is not JSON")):
        (folder / "chat_template.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            check_chat_template(folder, takes_pictures=True)
