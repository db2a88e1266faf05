"""Checkpoint folders of tiny vision-language models with all that an engine reads pictures by, prompts for them, and transformers' answers.

Needs torchvision, because transformers' processors do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from rlsync.engine.handles import Completion, PicturePrompt
from tests.models import VOCAB_SIZE
from tests.vision_models import (
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    collated,
    picture,
    save_tiny_vision_model,
    tiny_vision_config,
)

_SPECIAL = {
    0: "<pad>", 1: "<bos>", 2: "<eos>", VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>", IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
}  # fmt: skip
_PROCESSORS: dict[str, tuple[Any, Any]] = {
    "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    "qwen3_vl_moe": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def save_vision_folder(folder: str | Path, family: str, **options: Any) -> Path:
    """Save ``tiny_vision_model(family, **options)``, tokenizer and processor."""
    folder = save_tiny_vision_model(folder, family, **options)
    save_processor(folder, family)
    return folder


def save_processor(folder: str | Path, family: str) -> None:
    """Save a processor for pictures of 1 to 36 tokens, and a tokenizer with a word for each id."""
    patch = tiny_vision_config(family).vision_config.patch_size
    words = {_SPECIAL.get(i, f"w{i}"): i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(_SPECIAL.values())[3:],
    )
    both, videos = _PROCESSORS[family]
    images = Qwen2VLImageProcessor(patch_size=patch, min_pixels=(2 * patch) ** 2, max_pixels=(12 * patch) ** 2)
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    both(image_processor=images, tokenizer=fast, video_processor=videos(patch_size=patch), chat_template=template).save_pretrained(folder)


def picture_prompt(parts: Sequence[int | tuple[int, int]], *, seed: int) -> PicturePrompt:
    """A number of text tokens, or height and width of a picture in pixels, for each part in order."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    pictures = []
    for index, part in enumerate(parts):
        if isinstance(part, int):
            tokens += torch.randint(1, VISION_START, (part,), generator=generator).tolist()
        else:
            tokens += [VISION_START, IMAGE, VISION_END]
            pictures.append(Image.fromarray(picture(*part, seed=100 * seed + index)))
    return PicturePrompt(tuple(tokens), tuple(pictures))


# One picture, two of different sizes with text between, one that the processor makes smaller, and none.
PROMPTS: tuple[PicturePrompt, ...] = (
    picture_prompt([3, (64, 96), 4], seed=1),
    picture_prompt([(56, 56), 5, (120, 60), 2], seed=2),
    picture_prompt([(500, 300), 6], seed=3),
    picture_prompt([7], seed=4),
)


def greedy_answer(folder: Path, prompt: PicturePrompt, num_tokens: int) -> Completion:
    """What transformers answers, with the log-probability of each token."""
    model, processor = _loaded(folder)
    text = " ".join(_SPECIAL.get(i, f"w{i}") for i in prompt.token_ids)
    given = processor(text=[text], images=list(prompt.pictures) or None, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    tokens = out.sequences[0, given["input_ids"].shape[1] :].tolist()
    logprobs = [float(row[0].log_softmax(-1)[token]) for row, token in zip(out.logits, tokens, strict=True)]
    return Completion(tuple(tokens), tuple(logprobs), "length", None, None)


def microbatch(folder: str | Path, prompts: Sequence[PicturePrompt]) -> dict[str, torch.Tensor]:
    """Prompts as a Megatron actor takes them: every placeholder as long as its picture."""
    processor = AutoProcessor.from_pretrained(folder).image_processor
    rows = []
    for prompt in prompts:
        given = processor(images=list(prompt.pictures), return_tensors="pt") if prompt.pictures else {}
        sizes = [int(grid.prod()) // processor.merge_size**2 for grid in given.get("image_grid_thw", ())]
        lengths = iter(sizes)
        tokens = [token for each in prompt.token_ids for token in [each] * (next(lengths) if each == IMAGE else 1)]
        rows.append({"tokens": torch.tensor(tokens), **given})
    return collated(rows)


@functools.cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)
