"""Inputs of a run of supervised fine-tuning, read before any process starts; and the sources of its examples, which ranks read again.

Whatever can be refused without a process is refused here. Knows no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsync.errors import ConfigError
from workers.config import SftConfig
from workers.model_folder import read_picture_tokens, read_vocab_size
from workers.packed_text import PackedDocuments
from workers.preparation import picture_processor, prepare_model, restore_position, stop_ids
from workers.resume import Beginning, run_folder
from workers.row_files import RowFiles
from workers.row_loader import PROMPTS_AT_ONCE, ExampleSource, LeftOut, RowLoader, in_parts
from workers.sft_data import ExampleEncoder, ExampleForm, RowExamples, SftExample, SftQuestion
from workers.sft_rows import row_form


@dataclass(frozen=True, slots=True)
class Questions:
    """Rows of a validation that engines can be asked."""

    source: RowExamples
    rows: tuple[int, ...]
    have_pictures: bool

    def parts(self, num_workers: int) -> Iterator[list[SftQuestion]]:
        """All of them in their order, where there are pictures part by part, which ``num_workers`` processes read ahead. Raises as
        ``in_parts``."""
        most = PROMPTS_AT_ONCE if self.have_pictures else len(self.rows)
        return in_parts(self.rows, self.source.question, most=most, num_workers=num_workers)


@dataclass(frozen=True, slots=True)
class SftPreparation:
    """Attributes:
    hf_config: content of config.json.
    stop_ids: token ids that end an answer, the tokenizer's own first.
    num_steps: of the data.
    position: in the data, where the run continues; ``RowLoader`` takes it.
    questions: of the validation; None without ``validation.generate``.
    beginning: where the run continues.
    notes: what the user should know about model and data.
    """

    hf_config: Mapping[str, Any]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    num_steps: int
    position: Mapping[str, Any]
    questions: Questions | None
    beginning: Beginning
    notes: tuple[str, ...]


def prepare_sft(config: SftConfig, beginning: Beginning) -> SftPreparation:
    """Make the model and the data of the run where it makes its own, and read and check them, quick checks first.

    Rows are read when their turn comes; those of the validation that are generated from are checked now. Raises ConfigError or
    CheckpointError.
    """
    notes, hf_config, tokenizer = prepare_model(config, beginning)
    loader = open_loader(config, tokenizer)
    notes += (*loader.notes, *restore_position(loader, beginning)[1])
    questions = None
    if config.data.val_data_paths:
        held_out = example_source(config, config.data.val_data_paths, tokenizer, substitutes=False)
        questions = _questions(config, held_out) if config.validation.generate and isinstance(held_out, RowExamples) else None
    return SftPreparation(
        hf_config,
        tokenizer,
        stop_ids(config, hf_config, tokenizer),
        len(loader),
        loader.state_dict(),
        questions,
        beginning,
        notes,
    )


def example_source(config: SftConfig, paths: Sequence[str], tokenizer: Any, *, substitutes: bool = True) -> RowExamples | PackedDocuments:
    """The examples of data files.

    Args:
        substitutes: rows that ``data.on_bad_sample`` and ``on_too_long`` skip have others in their place; without, their place has none.
    """
    data = config.data
    form = ExampleForm(
        max_length=config.runner.seq_length,
        apply_chat_template=data.apply_chat_template,
        train_on_generation_prompt=data.train_on_generation_prompt,
    )
    vocab_size = read_vocab_size(Path(config.model_path), config.model_key)
    if data.type == "text":
        return PackedDocuments(
            RowFiles(paths),
            row_form(data),
            tokenizer,
            form.max_length,
            on_bad_sample=data.on_bad_sample,
            index=run_folder(config) / "tokens",
            vocab_size=vocab_size,
            picture_tokens=read_picture_tokens(Path(config.model_path), config.model_key),
        )
    return RowExamples(
        RowFiles(paths),
        row_form(data),
        ExampleEncoder(tokenizer, form, picture_processor(config), vocab_size=vocab_size),
        on_bad_sample=data.on_bad_sample if substitutes else "error",
        on_too_long=data.on_too_long if substitutes else "error",
    )


def open_loader(config: SftConfig, tokenizer: Any, *, dp_rank: int = 0, dp_size: int = 1) -> RowLoader[SftExample]:
    """The loader of one replica's share of each global batch, at the beginning of the data."""
    data, batch = config.data, config.actor.global_batch_size
    assert batch is not None, "a rule requires it"
    return RowLoader(
        example_source(config, data.train_data_paths, tokenizer),
        batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        num_epochs=config.runner.max_epochs,
        shuffle=data.shuffle,
        seed=data.seed,
        num_workers=data.num_workers,
    )


def num_val_examples(config: SftConfig, source: ExampleSource[SftExample]) -> int:
    """Examples of a validation."""
    most = config.data.val_data_size
    return source.num_items if most is None else min(most, source.num_items)


def val_examples(config: SftConfig, source: ExampleSource[SftExample], places: Iterable[int]) -> Iterator[SftExample]:
    """The examples at these places of the validation's data, without those that are skipped.

    Raises ConfigError for one that is not to be skipped.
    """
    items = source.items(0, shuffle=False, seed=0)
    for place in places:
        drawn = source.draw(items[place])
        if drawn.example is not None:
            yield drawn.example
        else:
            _leave_out(config, drawn.left_out[-1])


def _questions(config: SftConfig, source: RowExamples) -> Questions:
    """The rows of the validation that engines can be asked, each of which is read."""
    found, have_pictures, items = [], False, source.items(0, shuffle=False, seed=0)
    for row in range(num_val_examples(config, source)):
        # What makes no example, for its length or its pictures, is no question either.
        drawn = source.draw(items[row])
        asked = source.question(row) if drawn.example is not None else drawn.left_out[-1]
        if isinstance(asked, SftQuestion):
            found.append(row)
            have_pictures |= bool(asked.images)
        else:
            _leave_out(config, asked)
    if not found:
        raise ConfigError(f"validation.generate: no row of {', '.join(config.data.val_data_paths)} can be used")
    return Questions(source, tuple(found), have_pictures)


def _leave_out(config: SftConfig, row: LeftOut) -> None:
    """Raise ConfigError unless such rows are to be skipped."""
    key = "on_too_long" if row.too_long else "on_bad_sample"
    if getattr(config.data, key) != "skip":
        raise ConfigError(f"{row.where}: {row.reason}. data.{key}=skip leaves such rows out")
