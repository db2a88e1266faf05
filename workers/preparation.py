"""Inputs of a run, read before any process starts: the model's config, tokenizer, problems, data position.

Whatever can be refused without a process is refused here. Knows no Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers import AutoTokenizer

from rlsync.engine.handles import Prompt as EnginePrompt
from rlsync.errors import CheckpointError, ConfigError
from rlsync.models import check_config, model_of
from workers.config import AnyConfig, RunConfig, validate_model
from workers.config.validate import raise_all
from workers.data import Prompt, PromptDataset, PromptForm, PromptLoader
from workers.model_folder import (
    check_tokenizer_files,
    check_tokenizer_size,
    processor_template,
    read_generation_config,
    read_hf_config,
    read_picture_tokens,
    read_vocab_size,
    text_config,
    token_ids,
)
from workers.picture_prompts import PicturePrompts, first_prompts, open_prompts, validation_prompts, with_pictures
from workers.picture_world import build_picture_world
from workers.pictures import PictureProcessor, load_picture_processor
from workers.problems import BadSamples, Problem, load_problems
from workers.resume import DATA_STATE, Beginning, check_model
from workers.reward import unreadable_reference, unreadable_references
from workers.row_loader import RowLoader
from workers.synthetic import build_world, make_seeded_model
from workers.validation import validates, validation_notes

# Prompts of ``rollout.validate_weight``.
NUM_COMPARED_PROMPTS = 4
_OTHERWISE = "resume from an older checkpoint, or remove it to start the data anew"


@dataclass(frozen=True, slots=True)
class PromptData:
    """Attributes:
    loader: of the training prompts, at the beginning of the data.
    first_prompts: of the training, for ``rollout.validate_weight``; none without.
    val_prompts: those of the validation problems, which are read and checked also where the run does not validate; none then. Without
        their pictures, which are in the rows of ``val_source``.
    val_source: None where the data has no pictures, or the run does not validate.
    pictures: what makes patches of pictures; None where the data has none.
    notes: what the user should know about the data.
    """

    loader: PromptLoader | RowLoader[Prompt]
    first_prompts: tuple[Prompt, ...]
    val_prompts: tuple[Prompt, ...]
    val_source: PicturePrompts | None
    pictures: PictureProcessor | None
    notes: tuple[str, ...]

    def val_parts(self, num_workers: int) -> Iterator[list[EnginePrompt]]:
        """The prompts of a validation as engines take them, in their order: all together, or part by part with their pictures, which
        ``num_workers`` processes read ahead."""
        parts = [list(self.val_prompts)] if self.val_source is None else with_pictures(self.val_source, self.val_prompts, num_workers)
        return ([prompt.for_engine() for prompt in part] for part in parts)


@dataclass(frozen=True, slots=True)
class Preparation:
    """Attributes:
    hf_config: content of config.json.
    stop_ids: token ids that end a response, the tokenizer's own first.
    data: whose loader is positioned where the run continues.
    beginning: where the run continues.
    notes: what the user should know about model and data.
    position: what the checkpoint has of the data, its position and what belongs to it; None in a fresh run.
    """

    hf_config: dict[str, Any]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    data: PromptData
    beginning: Beginning
    notes: tuple[str, ...]
    position: Mapping[str, Any] | None = None

    @property
    def num_steps(self) -> int:
        """Steps that the data has."""
        return len(self.data.loader)


def prepare(config: RunConfig, beginning: Beginning) -> Preparation:
    """Make the model and the data of the run where it makes its own, and read and check them, quick checks first.

    Raises ConfigError or CheckpointError.
    """
    notes, hf_config, tokenizer = prepare_model(config, beginning)
    data = (_pictures if config.data.has_pictures else _texts)(config, tokenizer)
    position, position_notes = restore_position(data.loader, beginning)
    notes += (*data.notes, *validation_notes(config, len(data.val_prompts)), *position_notes)
    return Preparation(hf_config, tokenizer, stop_ids(config, hf_config, tokenizer), data, beginning, notes, position)


def prepare_model(config: AnyConfig, beginning: Beginning) -> tuple[tuple[str, ...], dict[str, Any], Any]:
    """Notes, content of config.json and tokenizer, after making what the run makes itself. Raises ConfigError or CheckpointError."""
    if config.arithmetic is not None:
        build_world(config.arithmetic.path, config.arithmetic)
    if config.pictures is not None:
        build_picture_world(config.pictures.path, config.pictures)
    notes = _make_seeded_model(config)
    hf_config = read_hf_config(Path(config.model_path), config.model_key)
    raise_all(f"config.json of {config.model_path}: {finding}" for finding in check_config(hf_config))
    validate_model(config, hf_config)
    check_model(beginning, hf_config, config.model_key)
    return notes, hf_config, load_tokenizer(config, hf_config)


def _make_seeded_model(config: AnyConfig) -> tuple[str, ...]:
    """Make the seeded model if the run starts from it."""
    seeded, path = config.seeded_model, Path(config.model_path)
    if seeded is None or Path(seeded.path).absolute() != path.absolute():
        return ()
    has_weights = config.actor.megatron.convert_from_hf
    if seeded.tokenizer is not None:
        check_tokenizer_files(Path(seeded.tokenizer), trust_remote_code=False)
    is_new = make_seeded_model(path, seeded.config_json, seeded.seed, weights=has_weights, tokenizer=seeded.tokenizer)
    what = "a model of random weights" if has_weights else "config.json and tokenizer of the model"
    return (f"{'made' if is_new else 'using'} {what} in {path}; {config.model_key}=... names {'a real one' if has_weights else 'others'}",)


def load_tokenizer(config: AnyConfig, hf_config: Mapping[str, Any]) -> Any:
    """The tokenizer of the run. Raises ConfigError where none can be made, or where it belongs to another model."""
    settings = config.actor.tokenizer
    folder = Path(str(settings.tokenizer_model))
    check_tokenizer_files(folder, trust_remote_code=settings.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=settings.use_fast, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what transformers raises for files it cannot use
        raise ConfigError(f"no tokenizer can be made from {folder}: {type(error).__name__}: {error}") from error
    model = model_of(hf_config)
    check_tokenizer_size(tokenizer.vocab_size, model.dims["vocab"], folder)
    template = None if model.vision is None else processor_template(folder)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def picture_processor(config: AnyConfig) -> PictureProcessor | None:
    """What makes patches of pictures; None where the model takes none. Raises ConfigError."""
    folder = Path(config.model_path)
    vision = model_of(read_hf_config(folder, config.model_key)).vision
    if vision is None:
        return None
    limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
    return load_picture_processor(folder, vision.image_token_id, video_token_id=vision.video_token_id, **limits)


def _texts(config: RunConfig, tokenizer: Any) -> PromptData:
    """Text problems, all of which are read now."""
    data, bad = config.data, BadSamples()
    val_prompts, val_notes = _val_prompts(config, tokenizer, bad)
    dataset = _dataset(config, data.train_data_paths, tokenizer, bad, data_size=data.data_size)
    notes = (*bad.settle(data.on_bad_sample), *dataset.notes("data.train_data_paths"), *val_notes)
    loader = PromptLoader(
        dataset, data.rollout_batch_size, num_epochs=config.runner.max_epochs, shuffle=data.shuffle, seed=data.seed,
        num_workers=data.num_workers,
    )  # fmt: skip
    first = tuple(dataset[i] for i in range(min(_num_first(config), len(dataset))))
    return PromptData(loader, first, val_prompts if validates(config) else (), None, None, notes)


def _pictures(config: RunConfig, tokenizer: Any) -> PromptData:
    """Questions about pictures: those of the validation are read and checked now, the others and all pictures when their turn comes."""
    pictures, bad, data = picture_processor(config), BadSamples(), config.data
    assert pictures is not None, "validate_model refuses such a model"
    val_prompts, val_notes, val_source = tuple[Prompt, ...](), tuple[str, ...](), None
    if data.val_data_paths:
        val_source = PicturePrompts(config, data.val_data_paths, tokenizer, pictures, substitutes=False, most=data.val_data_size)
        val_prompts, val_notes = validation_prompts(config, val_source, bad)
        val_prompts = tuple(_readable(val_prompts, config, bad))
    notes = (*bad.settle(data.on_bad_sample), *val_notes)
    loader, source = open_prompts(config, tokenizer, pictures)
    first = tuple(first_prompts(source, _num_first(config)))
    return PromptData(loader, first, *((val_prompts, val_source) if validates(config) else ((), None)), pictures, notes)


def _num_first(config: RunConfig) -> int:
    return NUM_COMPARED_PROMPTS if config.rollout.validate_weight else 0


def _val_prompts(config: RunConfig, tokenizer: Any, bad: BadSamples) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """The prompts of the validation, and notes on what was left out of them for its length."""
    data = config.data
    if not data.val_data_paths:
        return (), ()
    found = len(bad.found)
    dataset = _dataset(config, data.val_data_paths, tokenizer, bad, data_size=data.val_data_size)
    if len(dataset) == 0 and (len(bad.found) == found or data.on_bad_sample == "skip"):
        raise ConfigError(
            f"no validation problem remains of data.val_data_paths: {dataset.num_too_long} were longer than data.max_prompt_length "
            f"({data.max_prompt_length}), {len(bad.found) - found} were bad samples"
        )
    return tuple(dataset[i] for i in range(len(dataset))), dataset.notes("data.val_data_paths")


def _dataset(config: RunConfig, paths: Sequence[str], tokenizer: Any, bad: BadSamples, *, data_size: int | None) -> PromptDataset:
    problems = load_readable_problems(config, paths, bad, data_size=data_size)
    model = Path(config.model_path), config.model_key
    return PromptDataset(
        problems, tokenizer, prompt_form(config), bad, vocab_size=read_vocab_size(*model), picture_tokens=read_picture_tokens(*model)
    )


def prompt_form(config: RunConfig) -> PromptForm:
    """How the problems of a run become prompts."""
    data = config.data
    return PromptForm(
        max_prompt_length=data.max_prompt_length,
        filter_prompt_by_length=data.filter_prompt_by_length,
        apply_chat_template=data.apply_chat_template,
        system_prompt=data.system_prompt,
        prompt_suffix=data.prompt_suffix,
    )


def load_readable_problems(config: RunConfig, paths: Sequence[str], bad: BadSamples, *, data_size: int | None = None) -> list[Problem]:
    """Problems; those that ``reward.reward_type`` could give no reward, as no response can equal a reference answer, go to ``bad``."""
    data, metadata = config.data, config.reward.takes_metadata
    problems = load_problems(paths, prompt_key=data.prompt_key, answer_key=data.answer_key, data_size=data_size, bad=bad, metadata=metadata)
    return _readable(problems, config, bad)


class _Referenced(Protocol):
    @property
    def answers(self) -> tuple[str, ...]: ...

    @property
    def where(self) -> str: ...


R = TypeVar("R", bound=_Referenced)


def _readable(problems: Sequence[R], config: RunConfig, bad: BadSamples) -> list[R]:
    """The problems whose reference answers some response can equal; the others go to ``bad``."""
    reward = config.reward
    if reward.reward_type != "math":
        return list(problems)
    references = [answer for problem in problems for answer in problem.answers]
    unreadable = unreadable_references(references, num_processes=reward.num_processes, timeout_s=reward.timeout_s)
    for problem in problems:
        if unreadable.issuperset(problem.answers):
            bad.add(problem.where, unreadable_reference(problem.answers[0]))
    return [problem for problem in problems if not unreadable.issuperset(problem.answers)]


class Positioned(Protocol):
    """A loader that continues where another one was."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def restore_position(loader: Positioned, beginning: Beginning) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Let the loader continue where the run that is resumed was; what the checkpoint has of the data, and a note where it has nothing.
    Raises CheckpointError."""
    if beginning.resume is None:
        return None, ()
    state = beginning.resume / DATA_STATE
    if not state.is_file():
        return None, (f"warning: {state} is missing: the training data starts from the beginning",)
    try:
        found = torch.load(state, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{state} cannot be read ({said}); resume from an older checkpoint, or remove it to start the data anew"
        ) from None
    if not isinstance(found, dict) or not {"order", "handed_out"} <= found.keys():
        raise CheckpointError(f"{state} holds no data position; {_OTHERWISE}")
    loader.load_state_dict(found)
    return found, ()


def stop_ids(config: AnyConfig, hf_config: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of the model's configs, the tokenizer's first."""
    folder = Path(config.model_path)
    found = token_ids(tokenizer.eos_token_id, "the tokenizer's eos_token_id")
    found += token_ids(read_generation_config(folder).get("eos_token_id"), f"eos_token_id of {folder / 'generation_config.json'}")
    found += token_ids(text_config(hf_config).get("eos_token_id"), f"eos_token_id of {folder / 'config.json'}")
    return tuple(dict.fromkeys(found))
