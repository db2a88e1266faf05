"""Claims about the picture world: made once and alike, without held-out combinations in training, and answered by a saved model."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from rlsync.models import check_config, model_of
from workers.config import SftConfig, load_config, register_resolvers
from workers.config.schema import PictureRecipe
from workers.contact_sheet import answered, draw_sheet, write_contact_sheet
from workers.picture_world import COLOURS, DIGITS, SHAPES, PictureWorld, build_picture_world, draw_picture
from workers.pictures import load_picture_processor
from workers.row_files import RowFiles
from workers.sft_data import ExampleEncoder, ExampleForm, RowExamples
from workers.sft_rows import RowForm

RECIPE = PictureRecipe(seed=0, num_train=300, num_held_out=60, hidden_size=64, num_layers=1, vision_hidden_size=64, vision_depth=1)
VLM = RowForm("vlm", "question", "answer", image_keys=("image",))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PictureWorld:
    return build_picture_world(tmp_path_factory.mktemp("pictures") / "world", RECIPE)


def rows(world: PictureWorld, name: str) -> RowExamples:
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    vision = model_of(json.loads((world.model_path / "config.json").read_text())).vision
    assert vision is not None
    pictures = load_picture_processor(world.model_path, vision.image_token_id, min_pixels=None, max_pixels=None)
    encode = ExampleEncoder(tokenizer, ExampleForm(96), pictures)
    return RowExamples(RowFiles([str(world.model_path.parent / name)]), VLM, encode, on_bad_sample="error", on_too_long="error")


def test_the_model_is_one_that_can_be_trained_and_its_rows_are_examples(world: PictureWorld) -> None:
    assert check_config(json.loads((world.model_path / "config.json").read_text())) == []
    source = rows(world, "train.jsonl")
    examples = [source.draw([row]).example for row in range(40)]
    assert len(examples) == 40 and all(example is not None for example in examples)
    grids = {
        tuple(example.image_grid_thw[0].tolist()) for example in examples if example is not None and example.image_grid_thw is not None
    }
    assert grids == {(1, 4, 4), (1, 4, 6), (1, 6, 4), (1, 6, 6)}


def test_supervised_rows_are_those_of_the_training_with_a_share_of_wrong_answers_of_their_kind(tmp_path: Path) -> None:
    recipe = replace(RECIPE, num_train=60, questions=("shape", "colour"), supervised_noise=0.5)
    path = build_picture_world(tmp_path / "world", recipe).train_path
    taught, true = ([json.loads(line) for line in file.read_text().splitlines()] for file in (path.with_name("supervised.jsonl"), path))
    assert [{**row, "answer": ""} for row in taught] == [{**row, "answer": ""} for row in true]
    assert 20 <= sum(a["answer"] != b["answer"] for a, b in zip(taught, true, strict=True)) <= 40
    assert all(row["answer"] in {"Which shape?": SHAPES, "Which colour?": tuple(COLOURS)}[row["question"]] for row in taught)


def test_the_same_recipe_makes_the_same_rows_and_weights_and_another_another(world: PictureWorld, tmp_path: Path) -> None:
    def content(of: PictureWorld) -> list[bytes]:
        folder = of.model_path.parent
        return [(folder / name).read_bytes() for name in ("train.jsonl", "held_out/00007.png", "model/model.safetensors")]

    again, other = (build_picture_world(tmp_path / str(seed), replace(RECIPE, seed=seed)) for seed in (0, 1))
    assert content(again) == content(world)
    assert all(a != b for a, b in zip(content(other), content(world), strict=True))


def test_held_out_combinations_are_in_no_training_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[tuple[str, str, str]] = []
    real = draw_picture

    def watched(shape: str, colour: str, digit: str, draw: random.Random) -> object:
        drawn.append((shape, colour, digit))
        return real(shape, colour, digit, draw)

    monkeypatch.setattr("workers.picture_world.draw_picture", watched)
    build_picture_world(tmp_path / "world", RECIPE)
    train, held_out = set(drawn[:300]), set(drawn[300:])
    assert not train & held_out and len(held_out) > 20
    # Each shape, colour and digit of a held-out picture is in training all the same.
    assert [{combination[i] for combination in train} for i in range(3)] == [set(SHAPES), set(COLOURS), set(DIGITS)]


def test_the_contact_sheet_has_what_transformers_answers(world: PictureWorld) -> None:
    source = rows(world, "held_out.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    found = answered(source, range(8), tokenizer, world.model_path, 6)
    lines = [json.loads(line) for line in world.held_out_path.read_text().splitlines()[:8]]
    assert [(one.question, one.truth) for one in found] == [(line["question"], line["answer"]) for line in lines]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(world.model_path)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert draw_sheet(found).size == (900, 320)


def test_a_run_without_questions_to_ask_ends_without_a_contact_sheet(world: PictureWorld, tmp_path: Path) -> None:
    """Negative controls: the questions, and a checkpoint to ask."""
    register_resolvers()
    keys = [f"runner.output_dir={tmp_path}", f"pictures.path={world.model_path.parent}", "runner.experiment_name=run"]

    def config(*overrides: str) -> SftConfig:
        with initialize_config_dir(str(Path(__file__).parents[2] / "configs" / "sft"), version_base="1.3"):
            return load_config(compose("pictures_sft_vlm", overrides=[*keys, *overrides]), "sft")

    assert write_contact_sheet(config()) is None
    shutil.copytree(world.model_path, tmp_path / "run/checkpoints/global_step_1/actor/hf_model")
    assert write_contact_sheet(config("data.val_data_paths=[]", "runner.val_before_train=False")) is None
    assert write_contact_sheet(config()) == tmp_path / "run/contact_sheet.png"


def test_the_shipped_run_fits_its_world() -> None:
    register_resolvers()
    with initialize_config_dir(str(Path(__file__).parents[2] / "configs" / "sft"), version_base="1.3"):
        config: SftConfig = load_config(compose("pictures_sft_vlm"), "sft")
    assert config.pictures is not None and config.data.type == "vlm"
    steps = config.runner.max_epochs * (config.pictures.num_train // (config.actor.global_batch_size or 1))
    assert config.runner.max_steps <= steps and config.actor.lr_sched.lr_decay_iters == config.runner.max_steps
