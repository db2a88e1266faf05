"""A page of held-out pictures, each with its question, what the saved model answers, and the reference.

The answers are transformers', greedily, from the ``hf_model/`` of the newest checkpoint: what a user of that folder gets. Made behind a
run on the picture world, whose model answers in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText

from workers.config import SftConfig
from workers.model_folder import read_hf_config
from workers.preparation import load_tokenizer
from workers.resume import run_folder
from workers.row_loader import LeftOut
from workers.sft_data import RowExamples, SftExample, SftQuestion
from workers.sft_preparation import example_source

_COLUMNS, _ROWS = 6, 4
_CELL_SIZE = (150, 160)
_PICTURE_SIDE = 100
_RIGHT, _WRONG = (20, 120, 50), (190, 30, 30)


@dataclass(frozen=True, slots=True)
class Answered:
    """A picture, what is asked about it, what the model answers and what is right."""

    picture: Image.Image
    question: str
    answer: str
    truth: str


def write_contact_sheet(config: SftConfig) -> Path | None:
    """``contact_sheet.png`` in the folder of the run, with the first held-out rows; None without Hugging Face weights to ask, or questions
    about a picture to ask them."""
    saved = list(run_folder(config).glob("checkpoints/global_step_*/actor/hf_model"))
    if not saved or not config.data.val_data_paths or config.data.type != "vlm":
        return None
    model = max(saved, key=lambda path: int(path.parts[-3].removeprefix("global_step_")))
    tokenizer = load_tokenizer(config, read_hf_config(Path(config.model_path), config.model_key))
    source = example_source(config, config.data.val_data_paths, tokenizer, substitutes=False)
    assert isinstance(source, RowExamples), "the picture world has questions"
    answers = answered(source, range(min(_COLUMNS * _ROWS, source.num_items)), tokenizer, model, config.validation.max_new_tokens)
    if not answers:
        return None
    path = run_folder(config) / "contact_sheet.png"
    draw_sheet(answers).save(path)
    return path


def answered(source: RowExamples, rows: Sequence[int], tokenizer: Any, model: Path, max_new_tokens: int) -> list[Answered]:
    """Rows with one picture, as a model folder of transformers answers them greedily."""
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    found = []
    for row in rows:
        asked, example = source.question(row), source.draw(source.items(0, shuffle=False, seed=0)[row]).example
        if isinstance(asked, LeftOut) or example is None or len(asked.images) != 1:
            continue
        found.append(_answered(loaded, asked, example, tokenizer, max_new_tokens))
    return found


@torch.inference_mode()
def _answered(model: Any, asked: SftQuestion, example: SftExample, tokenizer: Any, max_new_tokens: int) -> Answered:
    prompt = torch.tensor([example.token_ids[: example.loss_mask.index(True)]])
    tokens = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=example.pixel_values,
        image_grid_thw=example.image_grid_thw, mm_token_type_ids=(prompt == model.config.image_token_id).long(), do_sample=False,
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )[0, prompt.shape[1] :]  # fmt: skip
    return Answered(asked.images[0], asked.question, tokenizer.decode(tokens, skip_special_tokens=True).strip(), asked.answer.strip())


def draw_sheet(answers: Sequence[Answered]) -> Image.Image:
    """All on one page, wrong answers in red with what is right behind them."""
    rows = -(-len(answers) // _COLUMNS)
    width, height = _CELL_SIZE
    page = Image.new("RGB", (_COLUMNS * width, rows * height), "white")
    canvas, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for i, found in enumerate(answers):
        x, y = (i % _COLUMNS) * width, (i // _COLUMNS) * height
        picture = found.picture.copy()
        picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
        page.paste(picture, (x + (width - picture.width) // 2, y + (_PICTURE_SIDE + 10 - picture.height) // 2))
        is_right = found.answer == found.truth
        said = found.answer if is_right else f"{found.answer}, not {found.truth}"
        for line, (text, colour) in enumerate(((found.question, (90, 90, 90)), (said, _RIGHT if is_right else _WRONG))):
            canvas.text((x + width // 2, y + _PICTURE_SIDE + 22 + 18 * line), text[:24], fill=colour, font=font, anchor="mm")
    return page
