"""Claims about questions of GRPO about pictures: what an engine and the actor get of a row, what is refused, and where a resume goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from rlsync.engine.handles import PicturePrompt
from rlsync.errors import CheckpointError, ConfigError
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.memory import training_memory
from tests.unit.test_config import minimal, shipped
from tests.unit.test_models_config import QWEN2, QWEN2_5_VL
from tests.unit.test_sft_config import minimal as minimal_sft
from workers.check import GRPO_CHECKS, check_run
from workers.config import RunConfig, load_config, validate_model
from workers.config.schema import PictureRecipe
from workers.data import Prompt
from workers.grpo_runner import left_out_notes
from workers.memory import training_options
from workers.model_folder import read_hf_config
from workers.picture_prompts import open_prompts, warm_start_loader
from workers.picture_world import PictureWorld, build_picture_world
from workers.pictures import PictureProcessor, load_picture_processor, open_picture, read_picture_limits
from workers.preparation import picture_processor, prepare
from workers.resume import find_beginning
from workers.rollout import engine_arguments
from workers.row_files import BadRow
from workers.samples import Sample, collate, stacked
from workers.sft_data import SftExample
from workers.sft_preparation import example_source
from workers.sft_rows import RowForm, picture_problem

RECIPE = PictureRecipe(seed=0, num_train=24, num_held_out=6, hidden_size=64, num_layers=1, vision_hidden_size=64, vision_depth=1)
FORM = RowForm("vlm", "question", "answer", choice_key="choices", image_keys=("image",))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PictureWorld:
    return build_picture_world(tmp_path_factory.mktemp("pictures") / "world", RECIPE)


def values(world: PictureWorld, **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "cluster": {"component_placement": {"actor": "0", "rollout,reward": "1"}},
        "runner": {"seq_length": 96, "experiment_name": "run", "output_dir": str(world.model_path.parent.parent / "results")},
        "algorithm": {"group_size": 2},
        "rollout": {"model": {"model_path": str(world.model_path)}},
        "data": {
            "type": "vlm", "train_data_paths": [str(world.train_path)], "prompt_key": "question", "answer_key": "answer",
            "image_keys": ["image"], "apply_chat_template": True, "max_prompt_length": 80, "rollout_batch_size": 4,
        },
        "actor": {"model": {"precision": "fp32"}, "megatron": {"mbridge": True}},
        "reward": {"reward_type": "exact"},
    }  # fmt: skip
    return {name: {**base.get(name, {}), **sections.get(name, {})} for name in base.keys() | sections.keys()}


def config(world: PictureWorld, **sections: dict[str, Any]) -> RunConfig:
    return load_config(values(world, **sections))


def processor_of(found: RunConfig) -> PictureProcessor:
    pictures = picture_processor(found)
    assert pictures is not None
    return pictures


def loader(found: RunConfig) -> Any:
    return open_prompts(found, AutoTokenizer.from_pretrained(found.model_path), processor_of(found))[0]


def written(world: PictureWorld, name: str, *rows: dict[str, Any]) -> list[str]:
    """A file beside the pictures of the world."""
    path = world.train_path.parent / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def wheres(batches: Any) -> list[list[str]]:
    return [[prompt.where for prompt in batch] for batch in batches]


def test_an_engine_gets_pictures_and_a_placeholder_each_and_the_actor_their_patches_and_one_for_each_feature(world: PictureWorld) -> None:
    found = config(world, data={**values(world)["data"], "shuffle": False, "prompt_suffix": " Be brief."})
    tokenizer, processor = AutoTokenizer.from_pretrained(world.model_path), processor_of(found)
    prompts = next(iter(loader(found)))
    for prompt, line in zip(prompts, world.train_path.read_text().splitlines(), strict=False):
        row = json.loads(line)
        image = Image.open(world.train_path.parent / row["image"])
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{row['question']} Be brief."}]}],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        asked = prompt.for_engine()
        assert isinstance(asked, PicturePrompt) and prompt.text == expected == tokenizer.decode(asked.token_ids)
        assert asked.token_ids.count(processor.image_token_id) == len(asked.pictures) == 1
        assert np.array_equal(np.asarray(asked.pictures[0]), np.asarray(image))
        patches = processor.image_processor(images=[image], return_tensors="pt")
        assert torch.equal(prompt.pixel_values, patches["pixel_values"])
        features = int(patches["image_grid_thw"].prod()) // 4
        assert prompt.token_ids.count(processor.image_token_id) == features == len(prompt.token_ids) - len(asked.token_ids) + 1
        assert prompt.answers == (row["answer"],)


@pytest.mark.parametrize(("limits", "num_features"), [({}, 12), ({"max_pixels": 28 * 28 * 6}, 4), ({"min_pixels": 28 * 28 * 60}, 63)])
def test_limits_of_pixels_are_those_of_engines_and_actor(world: PictureWorld, limits: dict[str, int], num_features: int) -> None:
    Image.new("RGB", (120, 90)).save(world.train_path.parent / "large.png")
    rows = written(world, "large.jsonl", {"question": "What?", "image": "large.png", "answer": "nothing"})
    data = {**values(world)["data"], "train_data_paths": rows, "rollout_batch_size": 1, "max_prompt_length": 200, **limits}
    found = config(world, data=data, runner={**values(world)["runner"], "seq_length": 256})
    ((prompt,),) = loader(found)
    assert prompt.token_ids.count(processor_of(found).image_token_id) == num_features
    assert engine_arguments(found, on_gpu=False, takes_pictures=True).get("mm_processor_kwargs", {}) == limits


def test_samples_and_examples_are_stacked_by_one_function_with_pictures_in_the_order_of_rows(world: PictureWorld) -> None:
    prompts = next(iter(loader(config(world))))
    samples = [
        Sample(p.token_ids, (5, 6, 7)[: i + 1], (), True, 0, pixel_values=p.pixel_values, image_grid_thw=p.image_grid_thw)
        for i, p in enumerate(prompts[:2])
    ]
    batch = collate([*samples, Sample((1, 2), (3,), (-0.5,), True, 0)])
    assert torch.equal(batch["pixel_values"], torch.cat([p.pixel_values for p in prompts[:2]]))
    assert torch.equal(batch["image_grid_thw"], torch.cat([p.image_grid_thw for p in prompts[:2]]))
    assert batch["mask"].sum(dim=1).tolist() == [1, 2, 1] and batch["engine_logprobs"][2, 2] == -0.5
    examples = [SftExample(s.token_ids, s.loss_mask, s.pixel_values, s.image_grid_thw, "a row") for s in samples]
    assert all(torch.equal(tensor, collate(samples)[name]) for name, tensor in stacked(examples).items())
    assert {"pixel_values", "image_grid_thw"} & stacked([Sample((1, 2), (3,), (), True, 0)]).keys() == set()


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answer": ["red", 4]}, ("red", "4")),
        ({"choices": ["a dog", "a cat"], "answer": 1}, ("B. a cat", "B", "a cat")),
        ({"choices": ["a dog", "a cat"], "answer": "A"}, ("A. a dog", "A", "a dog")),
        ({"choices": ["b", "a"], "answer": 1}, ("B. a", "B")),  # "a" is the letter of the other one
        ({"choices": ["Red", "red "], "answer": 0}, ("A. Red", "A")),
        ({"choices": ["O", "A", "B", "AB"], "answer": 3}, ("D. AB", "D", "AB")),  # no letter, but several one behind the other
    ],
)
def test_every_way_to_name_the_right_answer_is_a_reference(row: dict[str, Any], answers: tuple[str, ...]) -> None:
    found = picture_problem({"question": "Which?", "image": "a.png", **row}, FORM)
    assert found.answers == answers and found.images == ("a.png",)
    if "choices" in row:
        assert found.messages[-1].text.startswith("Which?\nChoices:\nA. ")


def test_a_prompt_may_be_messages_and_a_reward_function_gets_the_rows_other_fields() -> None:
    turns = [{"role": "user", "content": "<image>One?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "<image>Two?"}]
    row = {"question": turns, "image": ["a.png", "b.png"], "level": 7}
    found = picture_problem(row, FORM, suffix="!", metadata=True)
    assert found.images == ("a.png", "b.png") and found.answers == () and found.metadata == {"level": 7}
    assert [message.text for message in found.messages] == ["One?", "1", "Two?!"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Which?"}, r"no field 'answer'; it has 'image', 'question'\. Set data\.answer_key"),
        ({"question": "Which?", "answer": []}, "is an empty list; a problem needs a reference answer"),
        ({"question": "<image> or <image>?", "answer": "a"}, "has 2 marks '<image>', and the row has 1 pictures"),
        (
            {"question": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}], "answer": "a"},
            "'assistant'; a policy",
        ),
        ({"question": "Which?", "choices": ["a", "b"], "answer": "c"}, "is none of the choices"),
    ],
)
def test_a_row_that_is_no_question_says_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow, match=said):
        picture_problem({"image": "a.png", **row}, FORM)


def test_what_a_reward_function_cannot_be_given_is_named() -> None:
    with pytest.raises(BadRow, match=r"field 'other' holds bytes, which cannot be passed to a reward function; data.image_keys names"):
        picture_problem({"question": "Which?", "image": "a.png", "answer": "a", "other": b"PNG"}, FORM, metadata=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_loader_goes_on_at_the_exact_batch(world: PictureWorld, num_workers: int) -> None:
    data = {**values(world)["data"], "num_workers": num_workers}
    found = config(world, data=data, runner={**values(world)["runner"], "max_epochs": 2})
    whole = wheres(loader(found))
    first = loader(found)
    head = wheres(islice(first, 7))
    second = loader(found)
    second.load_state_dict(first.state_dict())
    assert len(whole) == 12 and head + wheres(second) == whole
    with pytest.raises(CheckpointError, match="rollout_batch_size 4 -> 3"):
        loader(config(world, data={**data, "rollout_batch_size": 3})).load_state_dict(first.state_dict())


def test_long_prompts_and_bad_rows_have_others_in_their_place_or_end_the_run_by_row(world: PictureWorld) -> None:
    good = [json.loads(line) for line in world.train_path.read_text().splitlines()[:6]]
    rows = written(world, "long.jsonl", *good, {**good[0], "question": "Which?" * 20})
    data = {**values(world)["data"], "train_data_paths": rows, "rollout_batch_size": 7}
    (batch,) = loader(config(world, data=data))
    assert len(batch) == 7 and f"{rows[0]}:7" not in [prompt.where for prompt in batch]
    with pytest.raises(ConfigError, match=r"its prompt has \d+ tokens, and data.max_prompt_length is 8 \(33 rows were tried\). Raise data"):
        next(iter(loader(config(world, data={**data, "max_prompt_length": 8}))))
    rows = written(world, "bad.jsonl", *good, {**good[0], "image": "missing.png"})
    with pytest.raises(ConfigError, match=r"bad.jsonl:7: picture .*missing.png does not exist. data.on_bad_sample=skip leaves"):
        next(iter(loader(config(world, data={**data, "train_data_paths": rows}))))
    (batch,) = loader(config(world, data={**data, "train_data_paths": rows, "on_bad_sample": "skip"}))
    assert len(batch) == 7


def test_preparation_reads_validation_prompts_for_engines_alone_and_limits_rows(world: PictureWorld) -> None:
    data = {**values(world)["data"], "val_data_paths": [str(world.held_out_path)], "val_data_size": 5, "data_size": 9}
    sections = {"data": data, "runner": {**values(world)["runner"], "val_before_train": True}}
    found = config(world, **sections, rollout={**values(world)["rollout"], "validate_weight": True})
    prepared = prepare(found, find_beginning(found))
    assert len(prepared.data.val_prompts) == 5 and prepared.num_steps == 2 and len(prepared.data.first_prompts) == 4
    assert all(prompt.pixel_values is None for prompt in (*prepared.data.val_prompts, *prepared.data.first_prompts))
    assert all(prompt.images for prompt in prepared.data.first_prompts)
    assert {prompt.where for batch in prepared.data.loader for prompt in batch} <= {f"{world.train_path}:{i}" for i in range(1, 10)}
    rows = written(world, "unreadable.jsonl", {"question": "What?", "image": "train/00000.png", "answer": "\\sqrt{2"})
    data["val_data_paths"] = rows
    math = config(world, **sections, reward={"reward_type": "math", "num_processes": 1})
    with pytest.raises(ConfigError, match=r"unreadable.jsonl:1: math-verify cannot read the reference answer"):
        prepare(math, find_beginning(math))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_of_a_validation_are_read_when_their_part_comes(
    world: PictureWorld, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    """The same in each validation, and as one reads them all; none stays in memory between. One that is gone is named by file and row."""
    monkeypatch.setattr("workers.picture_prompts.PROMPTS_AT_ONCE", 4)
    good = [json.loads(line) for line in world.held_out_path.read_text().splitlines()]
    rows = [*good[:2], {**good[0], "question": "Which?" * 30}, {**good[0], "image": None}, *good[2:]]
    data = {**values(world)["data"], "val_data_paths": written(world, "parts.jsonl", *rows)}
    found = config(world, data=data, runner={**values(world)["runner"], "val_before_train": True})
    prepared = prepare(found, find_beginning(found)).data
    assert [prompt.index for prompt in prepared.val_prompts] == [0, 1, 3, 4, 5, 6, 7] and not any(p.images for p in prepared.val_prompts)
    for _ in range(2):
        parts = list(prepared.val_parts(num_workers))
        assert [len(part) for part in parts] == [4, 3]
        pictures = [prompt.pictures[0].tobytes() if isinstance(prompt, PicturePrompt) else b"" for part in parts for prompt in part]
        folder, used = world.held_out_path.parent, (*rows[:2], *rows[3:])
        assert pictures == [open_picture(row["image"], folder).tobytes() if row["image"] else b"" for row in used]
    (picture := world.held_out_path.parent / good[5]["image"]).rename(picture.with_suffix(".gone"))
    left = prepared.val_parts(num_workers)
    assert len(next(left)) == 4
    with pytest.raises(ConfigError, match=r"parts.jsonl:8: picture .* does not exist"):
        next(left)
    picture.with_suffix(".gone").rename(picture)


def test_a_warm_start_learns_the_answers_of_rows_of_the_same_form(world: PictureWorld) -> None:
    warm = {"data_paths": [str(world.train_path)], "num_steps": 5, "batch_size": 16}
    found = config(world, warm_start=warm)
    assert found.warm_start is not None
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    steps = list(islice(warm_start_loader(found, found.warm_start, tokenizer, processor_of(found)), 5))
    assert [len(step) for step in steps] == [16] * 5 and all(example.pixel_values is not None for step in steps for example in step)
    with pytest.raises(ConfigError, match=r"fewer than warm_start.batch_size \(25\)"):
        warm_start_loader(found, load_config(values(world, warm_start={**warm, "batch_size": 25})).warm_start, tokenizer, None)


def test_rows_that_are_left_out_of_a_warm_start_are_said(world: PictureWorld) -> None:
    good = [json.loads(line) for line in world.train_path.read_text().splitlines()][:6]
    rows = [{**row, "image": str(world.train_path.parent / row["image"])} for row in good]
    path = written(world, "warm.jsonl", *rows, {**rows[0], "question": "Which?" * 99}, {**rows[0], "question": ""})
    warm = {"data_paths": path, "num_steps": 1, "batch_size": 8}
    found = config(world, warm_start=warm, data={**values(world)["data"], "on_bad_sample": "skip"})
    assert found.warm_start is not None
    loader = warm_start_loader(found, found.warm_start, AutoTokenizer.from_pretrained(world.model_path), processor_of(found))
    assert left_out_notes(loader) == ()
    [step] = loader
    [note] = left_out_notes(loader)
    assert len(step) == 8 and re.search(r"of \d+ that cannot be used .* and \d+ of more than runner\.seq_length tokens", note)


def test_a_text_with_a_token_that_stands_for_a_picture_or_a_video_is_a_bad_row(world: PictureWorld) -> None:
    """Of every kind of rows, as the model and vLLM would look for what it stands for and end the run without naming a row."""
    asked = {"question": "Which <|video_pad|>?", "image": json.loads(world.train_path.read_text().splitlines()[0])["image"], "answer": "a"}
    data = values(world)["data"]
    found = config(world, data={**data, "train_data_paths": written(world, "video.jsonl", *[asked] * 4)})
    with pytest.raises(ConfigError, match=r"video\.jsonl:\d: the text holds the token 7, which stands for a video; only pictures are read"):
        next(iter(loader(found)))
    refusal = r"the tokenizer of .* makes the token '<\|image_pad\|>' of it, which stands for a picture"
    plain = {"type": "math", "prompt_key": "prompt", "answer_key": "solutions", "image_keys": [], "rollout_batch_size": 1}
    rows = [{"prompt": text, "solutions": "4"} for text in ("2+2=", "see <|image_pad|>")]
    texts = config(world, data={**data, **plain, "train_data_paths": written(world, "pads.jsonl", *rows)})
    with pytest.raises(ConfigError, match=rf"pads\.jsonl:2: {refusal}"):
        prepare(texts, find_beginning(texts))
    packed = {"type": "text", "prompt_key": "prompt", "train_data_paths": list(texts.data.train_data_paths)}
    model = {"actor": {"model": {"model_path": str(world.model_path)}}, "runner": {"seq_length": 4, "output_dir": texts.runner.output_dir}}
    documents = load_config(minimal_sft(data=packed, **model), "sft")
    with pytest.raises(ConfigError, match=rf"pads\.jsonl:2: {refusal}"):
        example_source(documents, documents.data.train_data_paths, AutoTokenizer.from_pretrained(world.model_path))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"type": "vlm"}, "data.type vlm needs data.apply_chat_template=True: the chat template says where"),
        ({"type": "vision_language", "apply_chat_template": True, "filter_prompt_by_length": False}, "cannot be cut through its pictures"),
        ({"type": "vlm", "apply_chat_template": True, "min_pixels": 9, "max_pixels": 8}, r"data.min_pixels \(9\) must not exceed"),
        ({"image_keys": ["image"]}, r"data.image_keys \(\('image',\)\) is for questions about pictures, which data.type math has not"),
        ({"max_pixels": 9}, r"data.max_pixels \(9\) is for questions about pictures"),
        ({"type": "vlm", "use_chat_template": True}, "needs data.apply_chat_template=True"),
        ({"type": "vlm", "solution_key": "solution"}, "references are in data.answer_key"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(minimal(data=data))


def test_a_model_without_eyes_and_the_routes_of_engines_are_refused() -> None:
    data = {"type": "vlm", "apply_chat_template": True}
    found = load_config(minimal(data=data))
    with pytest.raises(ConfigError, match=r"data.type vlm needs a vision-language model, and /model holds Qwen2ForCausalLM"):
        validate_model(found, QWEN2)
    validate_model(found, QWEN2_5_VL)
    with pytest.raises(ConfigError, match="was not shown for prompts with pictures"):
        load_config(minimal(data=data, actor={"megatron": {"router_replay": "R3"}}))


def test_the_reward_of_rlinf_is_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"reward.reward_type is 'vqa', expected math, exact, .*; exact compares what is answered"):
        load_config(minimal(reward={"reward_type": "vqa"}))


def test_the_shipped_configurations_ask_about_pictures() -> None:
    assert all(shipped(name).data.has_pictures for name in ("pictures-grpo-megatron", "qwen2_5_vl-grpo"))


def test_a_check_says_what_is_wrong_with_rows_pictures_and_warm_start_before_anything_starts(
    world: PictureWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.check.count_gpus", lambda: 0)

    def texts(change: Callable[[dict[str, Any]], Any] = lambda sections: None) -> list[str]:
        sections = values(world)
        change(sections)
        return [text for _, text in check_run(sections, GRPO_CHECKS).findings]

    assert texts() == []
    good = json.loads(world.train_path.read_text().splitlines()[0])
    rows = written(world, "checked.jsonl", good, {**good, "image": "missing.png"}, {**good, "answer": None}, *[good] * 3)
    (said,) = texts(lambda sections: sections["data"].update(train_data_paths=rows))
    assert "checked.jsonl:2: picture" in said and "does not exist" in said and "checked.jsonl:3: no field 'answer'" in said
    rows = written(world, "few.jsonl", good, good)
    assert "Train dataloader is empty! " in texts(lambda sections: sections["data"].update(train_data_paths=rows))[0]
    warm = {"data_paths": written(world, "warm.jsonl", {"prompt": "1+1=", "response": "2"}), "num_steps": 1}
    assert "warm.jsonl:1: no field 'question'" in texts(lambda sections: sections.update(warm_start=warm))[0]


def test_a_check_counts_what_a_tower_keeps_of_the_largest_pictures_of_the_first_rows(
    world: PictureWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a micro-batch of such rows, as transformers' own processor cuts them."""
    monkeypatch.setattr("workers.check.count_gpus", lambda: 0)
    good = json.loads(world.train_path.read_text().splitlines()[0])
    Image.new("RGB", (112, 168)).save(world.train_path.parent / "tall.png")
    paths = written(world, "sizes.jsonl", good, {**good, "image": "tall.png"}, *[good] * 6)

    def pictures_of(**limits: int) -> tuple[int, int]:
        sections = values(world, data={**values(world)["data"], "train_data_paths": paths, **limits})
        found, report = load_config(sections), check_run(sections, GRPO_CHECKS)
        assert report.memory is not None, report.findings
        patches = len(processor_of(found)([Image.open(world.train_path.parent / "tall.png")]).pixel_values)
        options = training_options(found, Topology(), row_patches=patches)
        assert options.micro_batch_patches == patches * found.algorithm.training_batch_size_per_gpu
        (rank,) = training_memory(model_of(read_hf_config(world.model_path, "actor.model.model_path")), Topology(), options)
        return report.memory.rank.pictures, rank.pictures

    found, expected = pictures_of()
    assert found == expected > 0
    reduced, expected = pictures_of(max_pixels=56 * 84)
    assert reduced == expected < found / 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_pixels": 28 * 28 * 9},
        {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}},
        {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "max_pixels": 28 * 28 * 800},
    ],
)
def test_limits_of_an_image_processor_are_those_that_transformers_reads(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **settings}))
    for given in ({"min_pixels": None, "max_pixels": None}, {"min_pixels": 28 * 28 * 2, "max_pixels": 28 * 28 * 400}):
        theirs, ours = load_picture_processor(tmp_path, 5, **given), read_picture_limits(tmp_path, **given)
        assert (ours.least, ours.most) == (theirs.image_processor.size["shortest_edge"], theirs.image_processor.size["longest_edge"])
        for size in ((900, 600), (3000, 2000), (640, 480)):
            patches = len(theirs([Image.new("RGB", size)]).pixel_values)
            assert ours.pixels(size) / 14**2 == pytest.approx(patches, rel=0.1), size
            assert 0.8 * patches / 4 < ours.least_features(size, 28) <= patches / 4, size


def test_a_prompt_without_pictures_is_asked_as_text() -> None:
    assert Prompt(0, "a", (1, 2), ("b",)).for_engine() == (1, 2)
