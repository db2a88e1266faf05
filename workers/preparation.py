"""Inputs of a run, read before any process starts: the model's config, tokenizer, problems, data position.

Whatever can be refused without a process is refused here. Knows no Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlsync.errors import CheckpointError, ConfigError
from rlsync.models import check_config
from workers.config import RunConfig, validate_model
from workers.config.validate import raise_all
from workers.data import PromptDataset, PromptForm, PromptLoader
from workers.model_folder import check_tokenizer_files, check_tokenizer_size, read_generation_config, read_hf_config, token_ids
from workers.problems import BadSamples, Problem, load_problems
from workers.resume import DATA_STATE, Beginning, check_model
from workers.reward import unreadable_references
from workers.synthetic import ArithmeticRecipe, build_world, make_seeded_model

_OTHERWISE = "resume from an older checkpoint, or remove it to start the data anew"


@dataclass(frozen=True, slots=True)
class Preparation:
    """Attributes:
    hf_config: content of config.json.
    stop_ids: token ids that end a response, the tokenizer's own first.
    loader: positioned where the run continues.
    beginning: where the run continues.
    notes: what the user should know about model and data.
    """

    hf_config: dict[str, Any]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    dataset: PromptDataset
    loader: PromptLoader
    beginning: Beginning
    notes: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        """Steps that the data has."""
        return len(self.loader)


def prepare(config: RunConfig, beginning: Beginning) -> Preparation:
    """Make the model and the data of the run where it makes its own, and read and check them, quick checks first.

    Raises ConfigError or CheckpointError.
    """
    if config.arithmetic is not None:
        recipe = {name: getattr(config.arithmetic, name) for name in ArithmeticRecipe.__dataclass_fields__}
        build_world(config.arithmetic.path, ArithmeticRecipe(**recipe))
    notes = _make_seeded_model(config)
    hf_config = read_hf_config(Path(config.model_path), config.model_key)
    raise_all(f"config.json of {config.model_path}: {finding}" for finding in check_config(hf_config))
    validate_model(config, hf_config)
    check_model(beginning, hf_config, config.model_key)
    tokenizer = _tokenizer(config, hf_config)
    bad = BadSamples()
    dataset = _dataset(config, tokenizer, bad)
    notes += bad.settle(config.data.on_bad_sample)
    loader = _loader(config, dataset)
    if beginning.resume is not None:
        notes += _restore_position(loader, beginning.resume / DATA_STATE)
    return Preparation(hf_config, tokenizer, _stop_ids(config, hf_config, tokenizer), dataset, loader, beginning, notes)


def _make_seeded_model(config: RunConfig) -> tuple[str, ...]:
    """Make the seeded model if the run starts from it."""
    seeded, path = config.seeded_model, Path(config.rollout.model.model_path)
    if seeded is None or Path(seeded.path).absolute() != path.absolute():
        return ()
    is_new = make_seeded_model(path, seeded.hf_config, seeded.seed)
    return (f"{'made' if is_new else 'using'} a model of random weights in {path}; rollout.model.model_path=... names a real one",)


def _tokenizer(config: RunConfig, hf_config: dict[str, Any]) -> Any:
    settings = config.actor.tokenizer
    folder = Path(str(settings.tokenizer_model))
    check_tokenizer_files(folder, trust_remote_code=settings.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=settings.use_fast, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what transformers raises for files it cannot use
        raise ConfigError(f"no tokenizer can be made from {folder}: {type(error).__name__}: {error}") from error
    check_tokenizer_size(tokenizer.vocab_size, hf_config.get("vocab_size"), folder)
    return tokenizer


def _dataset(config: RunConfig, tokenizer: Any, bad: BadSamples) -> PromptDataset:
    data = config.data
    if data.val_data_paths:
        load_readable_problems(config, data.val_data_paths, bad)
    problems = load_readable_problems(config, data.train_data_paths, bad, data_size=data.data_size)
    form = PromptForm(
        max_prompt_length=data.max_prompt_length,
        filter_prompt_by_length=data.filter_prompt_by_length,
        apply_chat_template=data.apply_chat_template,
        system_prompt=data.system_prompt,
        prompt_suffix=data.prompt_suffix,
    )
    return PromptDataset(problems, tokenizer, form, bad)


def load_readable_problems(config: RunConfig, paths: Sequence[str], bad: BadSamples, *, data_size: int | None = None) -> list[Problem]:
    """Problems with at least one reference answer that a response can equal; the others go to ``bad``."""
    data, reward = config.data, config.reward
    problems = load_problems(paths, prompt_key=data.prompt_key, answer_key=data.answer_key, data_size=data_size, bad=bad)
    references = [answer for problem in problems for answer in problem.answers]
    unreadable = unreadable_references(references, num_processes=reward.num_processes, timeout_s=reward.timeout_s)
    for problem in problems:
        if unreadable.issuperset(problem.answers):
            bad.add(problem.where, f"math-verify cannot read the reference answer {problem.answers[0]!r}, so no response would be correct")
    return [problem for problem in problems if not unreadable.issuperset(problem.answers)]


def _loader(config: RunConfig, dataset: PromptDataset) -> PromptLoader:
    data = config.data
    return PromptLoader(
        dataset,
        data.rollout_batch_size,
        num_epochs=config.runner.max_epochs,
        shuffle=data.shuffle,
        seed=data.seed,
        num_workers=data.num_workers,
    )


def _restore_position(loader: PromptLoader, state: Path) -> tuple[str, ...]:
    if not state.is_file():
        return (f"warning: {state} is missing: the training data starts from the beginning",)
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
    return ()


def _stop_ids(config: RunConfig, hf_config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of the model's configs, the tokenizer's first."""
    folder = Path(config.rollout.model.model_path)
    found = token_ids(tokenizer.eos_token_id, "the tokenizer's eos_token_id")
    found += token_ids(read_generation_config(folder).get("eos_token_id"), f"eos_token_id of {folder / 'generation_config.json'}")
    found += token_ids(hf_config.get("eos_token_id"), f"eos_token_id of {folder / 'config.json'}")
    return tuple(dict.fromkeys(found))
