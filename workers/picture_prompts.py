"""Questions about pictures as prompts of GRPO: for engines with the pictures themselves, for the actor with their patches.

Rows are read when their turn comes, by the loader of supervised fine-tuning. Knows neither Ray nor Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rlsync.errors import ConfigError
from workers.chat_template import render
from workers.config import RunConfig
from workers.config.grpo import WarmStartConfig
from workers.data import Prompt, too_long_notes
from workers.model_folder import read_vocab_size, unknown_token
from workers.pictures import PictureProcessor, open_picture
from workers.problems import BadSamples
from workers.row_files import BadRow, RowFiles
from workers.row_loader import PROMPTS_AT_ONCE, LeftOut, RowLoader, RowSource, TooLong, in_parts
from workers.sft_data import ExampleEncoder, ExampleForm, RowExamples, SftExample
from workers.sft_rows import picture_problem, row_form


class PicturePrompts(RowSource[Prompt]):
    """A prompt a row.

    Args:
        pictures: the image processor of the model's folder, which makes the actor's patches; engines make their own by the same.
        substitutes: rows that cannot be used, where ``data.on_bad_sample`` skips them, and rows that are too long have others in
            their place; without, their place has none.
        most: only the first this many rows; None: all.

    Raises:
        ConfigError: the files cannot be read, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        config: RunConfig,
        paths: Sequence[str],
        tokenizer: Any,
        pictures: PictureProcessor,
        *,
        substitutes: bool = True,
        most: int | None = None,
    ) -> None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"data.type {config.data.type} needs a tokenizer with a chat template; add chat_template.jinja to "
                f"{config.actor.tokenizer.tokenizer_model}"
            )
        data = config.data
        super().__init__(
            RowFiles(paths),
            on_bad_sample=data.on_bad_sample if substitutes else "error",
            on_too_long="skip" if substitutes else "error",
            most=most,
        )
        self._data, self._form, self._has_metadata = data, row_form(data), config.reward.takes_metadata
        self._tokenizer, self._pictures = tokenizer, pictures
        self._vocab_size = read_vocab_size(Path(config.model_path), config.model_key)

    def encode(self, content: Any, where: str, folder: Path) -> Prompt:
        """The prompt of a row's content. Raises BadRow, also for pictures that cannot be read and tokens that the model does not
        know, or TooLong."""
        problem = picture_problem(content, self._form, suffix=self._data.prompt_suffix, metadata=self._has_metadata)
        text = render(self._tokenizer, [message.as_template_input() for message in problem.messages], add_generation_prompt=True)
        engine_ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if (reason := unknown_token(engine_ids, self._tokenizer, self._vocab_size)) is not None:
            raise BadRow(reason)
        images = tuple(open_picture(image, folder) for image in problem.images)
        patches = self._pictures(images) if images else None
        repeats = self._pictures.repeats(engine_ids, () if patches is None else patches.num_features)
        token_ids = tuple(token for token, n in zip(engine_ids, repeats, strict=True) for _ in range(n))
        if not token_ids:
            raise BadRow("the prompt has no tokens")
        if len(token_ids) > self._data.max_prompt_length:
            raise TooLong(f"its prompt has {len(token_ids)} tokens, and data.max_prompt_length is {self._data.max_prompt_length}")
        prompt = Prompt(-1, text, token_ids, problem.answers, where, problem.metadata)
        if patches is None:
            return prompt
        pixels, grid = patches.pixel_values, patches.image_grid_thw
        return replace(prompt, engine_ids=tuple(engine_ids), images=images, pixel_values=pixels, image_grid_thw=grid)

    def pictures(self, row: int) -> tuple[Image, ...] | LeftOut:
        """The pictures of a row's prompt, or why they cannot be read."""
        where, content = self._files.read(row)
        try:
            problem = picture_problem(content, self._form, metadata=self._has_metadata)
            return tuple(open_picture(image, self._files.folder(row)) for image in problem.images)
        except BadRow as reason:
            return LeftOut(where, str(reason), too_long=False)


def open_prompts(config: RunConfig, tokenizer: Any, pictures: PictureProcessor) -> tuple[RowLoader[Prompt], PicturePrompts]:
    """The loader of the training prompts at the beginning of the data, and its source. Raises ConfigError."""
    data = config.data
    source = PicturePrompts(config, data.train_data_paths, tokenizer, pictures, most=data.data_size)
    loader = RowLoader(
        source,
        data.rollout_batch_size,
        num_epochs=config.runner.max_epochs,
        shuffle=data.shuffle,
        seed=data.seed,
        num_workers=data.num_workers,
        batch_key="data.rollout_batch_size",
        too_long="Raise data.max_prompt_length",
    )
    return loader, source


def _for_engines(prompt: Prompt) -> Prompt:
    return replace(prompt, pixel_values=None, image_grid_thw=None)


def first_prompts(source: PicturePrompts, most: int) -> Iterator[Prompt]:
    """The first prompts that a source has, for engines alone: without patches."""
    items = source.items(0, shuffle=False, seed=0)
    found = (source.draw(items[row]).example for row in range(source.num_items))
    return islice((_for_engines(prompt) for prompt in found if prompt is not None), most)


def validation_prompts(config: RunConfig, source: PicturePrompts, bad: BadSamples) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """The prompts of all rows of a ``source`` without substitutes, which have neither patches nor pictures: ``with_pictures`` reads these.
    Rows that cannot be used go to ``bad``; those that are too long are left out, which a note says. Raises ConfigError where none remains.
    """
    data = config.data
    found, num_too_long, num_bad = [], 0, 0
    items = source.items(0, shuffle=False, seed=0)
    for row in range(source.num_items):
        drawn = source.draw(items[row])
        if drawn.example is not None:
            found.append(replace(_for_engines(drawn.example), index=row, images=()))
        elif drawn.left_out[-1].too_long:
            num_too_long += 1
        else:
            num_bad += 1
            bad.add(drawn.left_out[-1].where, drawn.left_out[-1].reason)
    if not found and (num_bad == 0 or data.on_bad_sample == "skip"):
        raise ConfigError(
            f"no validation problem remains of data.val_data_paths: {num_too_long} were longer than data.max_prompt_length "
            f"({data.max_prompt_length}), {num_bad} were bad samples"
        )
    notes = too_long_notes("data.val_data_paths", num_too_long, len(found) + num_too_long, data.max_prompt_length)
    return tuple(found), notes


def with_pictures(source: PicturePrompts, prompts: Sequence[Prompt], num_workers: int) -> Iterator[list[Prompt]]:
    """Prompts of a validation with their pictures, in their order, part by part. Raises as ``in_parts``."""
    rows, left = [prompt.index for prompt in prompts], iter(prompts)
    for part in in_parts(rows, source.pictures, most=PROMPTS_AT_ONCE, num_workers=num_workers):
        yield [replace(prompt, images=images) for images, prompt in zip(part, left, strict=False)]


def warm_start_loader(config: RunConfig, warm: WarmStartConfig, tokenizer: Any, pictures: PictureProcessor) -> RowLoader[SftExample]:
    """The loader of a warm start, which has the examples of ``num_steps`` steps or more. Its rows have questions, pictures and answers as
    those of the training; others are in the place of those that are too long. Raises ConfigError, while iterating also for a row that
    cannot be used, unless ``data.on_bad_sample`` skips it."""
    vocab_size = read_vocab_size(Path(config.model_path), config.model_key)
    encode = ExampleEncoder(tokenizer, ExampleForm(max_length=config.runner.seq_length), pictures, vocab_size=vocab_size)
    on = config.data.on_bad_sample
    source = RowExamples(RowFiles(warm.data_paths), row_form(config.data), encode, on_bad_sample=on, on_too_long="skip")
    per_epoch = source.num_items // warm.batch_size
    return RowLoader(
        source,
        warm.batch_size,
        num_epochs=-(-warm.num_steps // max(1, per_epoch)),
        seed=config.actor.seed,
        num_workers=config.data.num_workers,
        batch_key="warm_start.batch_size",
        too_long="Raise runner.seq_length",
    )
