"""The picture world of the default supervised run: drawn shapes, colours and digits, questions about them, and a tiny Qwen2.5-VL.

Everything is made locally from a recipe, as ``workers.synthetic`` makes the arithmetic world. Pictures that are asked about in the
held-out rows show combinations of shape, colour and digit that no training row shows.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from workers.config.schema import PictureRecipe
from workers.config.worlds import HEAD_DIM
from workers.synthetic import decoder_sizes, make_once

# As Qwen2.5-VL's tokenizer names them; the model's config.json holds their ids.
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_CHARACTERS = "\n " + string.ascii_letters + string.digits + string.punctuation
_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 150, 60),
    "blue": (50, 80, 210),
    "yellow": (215, 180, 30),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
DIGITS = tuple(string.digits)
_QUESTIONS = {"shape": "Which shape?", "colour": "Which colour?", "digit": "Which digit?"}
_ANSWERS: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "digit": DIGITS}

_PATCH, _MERGE = 14, 2
_CELL = _PATCH * _MERGE
_SIDES = (56, 84)  # of pictures, in pixels; multiples of what becomes one feature


@dataclass(frozen=True, slots=True)
class PictureWorld:
    """Paths of the parts."""

    model_path: Path
    train_path: Path
    held_out_path: Path


def build_picture_world(path: str | Path, recipe: PictureRecipe) -> PictureWorld:
    """Make the folder unless it already holds this very recipe. Same recipe, same rows, pictures and weights.

    Raises:
        ConfigError: ``path`` holds something that this function did not make.
    """
    folder = Path(path)
    said = {f.name: getattr(recipe, f.name) for f in fields(PictureRecipe)}
    make_once(folder, {**said, "questions": list(recipe.questions)}, lambda empty: _fill(empty, recipe), key="pictures.path")
    return PictureWorld(folder / "model", folder / "train.jsonl", folder / "held_out.jsonl")


def _fill(folder: Path, recipe: PictureRecipe) -> None:
    (folder / "model").mkdir()
    tokenizer = make_vision_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(image_settings(), indent=2) + "\n")
    _make_model(recipe, tokenizer).save_pretrained(folder / "model")
    combinations = list(product(SHAPES, COLOURS, DIGITS))
    random.Random(f"combinations-{recipe.seed}").shuffle(combinations)
    held_out = len(combinations) // 6
    for name, chosen, count in (
        ("train", combinations[held_out:], recipe.num_train),
        ("held_out", combinations[:held_out], recipe.num_held_out),
    ):
        (folder / name).mkdir()
        rows = list(_rows(folder, name, chosen, count, recipe.questions, random.Random(f"{name}-{recipe.seed}")))
        _write_rows(folder / f"{name}.jsonl", rows)
        if name == "train" and recipe.supervised_noise:
            draw = random.Random(f"supervised-{recipe.seed}")
            _write_rows(folder / "supervised.jsonl", [_doubtful(row, recipe.supervised_noise, draw) for row in rows])


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _doubtful(row: dict[str, Any], noise: float, draw: random.Random) -> dict[str, Any]:
    """The row, or with this probability one with a wrong answer of the same kind."""
    if draw.random() >= noise:
        return row
    kind = next(kind for kind, question in _QUESTIONS.items() if question == row["question"])
    return {**row, "answer": draw.choice([answer for answer in _ANSWERS[kind] if answer != row["answer"]])}


def make_vision_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character beside Qwen's special tokens, with a chat template that knows text and pictures."""
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *_CHARACTERS))}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(_SPECIAL[1:]),
        chat_template=_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def image_settings() -> dict[str, Any]:
    """The image processor's file, as Qwen2.5-VL's folder has it."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": _CELL * _CELL,
        "max_pixels": 64 * _CELL * _CELL,
        "patch_size": _PATCH,
        "temporal_patch_size": 2,
        "merge_size": _MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _make_model(recipe: PictureRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end"),
    )}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            **decoder_sizes(recipe.hidden_size, recipe.num_layers, tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.08,
        },
        vision_config={
            "depth": recipe.vision_depth,
            "hidden_size": recipe.vision_hidden_size,
            "intermediate_size": recipe.vision_hidden_size * 3,
            "num_heads": recipe.vision_hidden_size // HEAD_DIM,
            "out_hidden_size": recipe.hidden_size,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "temporal_patch_size": 2,
            "window_size": 4 * _CELL,
            "fullatt_block_indexes": [recipe.vision_depth - 1],
            "initializer_range": 0.08,
        },
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Qwen2_5_VLForConditionalGeneration(config)


def _rows(
    folder: Path, name: str, combinations: list[tuple[str, str, str]], count: int, questions: tuple[str, ...], draw: random.Random
) -> Iterator[dict[str, Any]]:
    """A picture a row, with one of the questions; written below ``folder/name``."""
    for i in range(count):
        shape, colour, digit = draw.choice(combinations)
        file = f"{name}/{i:05d}.png"
        draw_picture(shape, colour, digit, draw).save(folder / file)
        asked = draw.choice(questions)
        answer = {"shape": shape, "colour": colour, "digit": digit}[asked]
        yield {"question": _QUESTIONS[asked], "image": file, "answer": answer}


def draw_picture(shape: str, colour: str, digit: str, draw: random.Random) -> Image.Image:
    """A coloured shape with a white digit in it, somewhere on a light ground."""
    size = (draw.choice(_SIDES), draw.choice(_SIDES))
    ground = tuple(draw.randint(215, 250) for _ in range(3))
    image = Image.new("RGB", size, ground)
    radius = draw.randint(24, 27)
    # On the grid of patches: a tower as small as this one learns digits slowly where they may lie anywhere.
    x, y = (draw.randrange(_CELL, side - _CELL + 1, _PATCH) for side in size)
    canvas = ImageDraw.Draw(image)
    fill = tuple(max(0, min(255, part + draw.randint(-20, 20))) for part in COLOURS[colour])
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "triangle":
        canvas.polygon(((x, y - radius), (x - radius, y + radius), (x + radius, y + radius)), fill=fill)
    else:
        arm = radius // 2
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    canvas.text((x, y + 2), digit, fill="white", font=ImageFont.load_default(size=34), anchor="mm")
    return image
