"""What a run needs before any process starts: the model's config, tokenizer, problems, and the checkpoint to continue from.

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

from rlsync.checkpoint_folder import inspect_checkpoint, latest_checkpoint
from rlsync.errors import CheckpointError, ConfigError
from workers.arithmetic import ArithmeticRecipe, build_world
from workers.config import RunConfig, validate_model
from workers.data import PromptDataset, PromptForm, PromptLoader
from workers.model_folder import check_tokenizer_files, check_tokenizer_size, read_generation_config, read_hf_config, token_ids
from workers.problems import BadSamples, Problem, load_problems
from workers.reward import unreadable_references
from workers.seeded_model import make_seeded_model

DATA_STATE = "data/data.pt"
_OTHERWISE = "resume from an older checkpoint, or remove it to start the data anew"


@dataclass(frozen=True, slots=True)
class Preparation:
    """Attributes:
    hf_config: content of config.json.
    stop_ids: token ids that end a response, the tokenizer's own first.
    loader: positioned where the run continues.
    resume: ``global_step_N`` folder to continue from, or None.
    start_step: steps already done.
    notes: what the user should know about the resume.
    """

    hf_config: dict[str, Any]
    tokenizer: Any
    stop_ids: tuple[int, ...]
    dataset: PromptDataset
    loader: PromptLoader
    resume: Path | None
    start_step: int
    notes: tuple[str, ...]


def run_folder(config: RunConfig) -> Path:
    """``<output_dir>/<experiment_name>``."""
    return Path(config.runner.output_dir).absolute() / config.runner.experiment_name


def prepare(config: RunConfig) -> Preparation:
    """Read and check everything, in an order that puts the quick checks first.

    Raises ConfigError or CheckpointError.
    """
    resume = _resume_folder(config)
    _check_initial_weights(config, resume)
    start_step, notes = _check_resume(config, resume)
    if config.arithmetic is not None:
        recipe = {name: getattr(config.arithmetic, name) for name in ArithmeticRecipe.__dataclass_fields__}
        build_world(config.arithmetic.path, ArithmeticRecipe(**recipe))
    notes += _make_seeded_model(config)
    hf_config = read_hf_config(Path(config.rollout.model.model_path))
    validate_model(config, hf_config)
    tokenizer = _tokenizer(config, hf_config)
    bad = BadSamples()
    dataset = _dataset(config, tokenizer, bad)
    notes += bad.settle(config.data.on_bad_sample)
    loader = _loader(config, dataset)
    if resume is not None:
        notes += _restore_position(loader, resume / DATA_STATE)
    return Preparation(hf_config, tokenizer, _stop_ids(config, hf_config, tokenizer), dataset, loader, resume, start_step, notes)


def _resume_folder(config: RunConfig) -> Path | None:
    wanted = config.runner.resume_dir
    if wanted is None:
        return None
    if wanted == "auto":
        return latest_checkpoint(run_folder(config) / "checkpoints")
    folder = Path(wanted).absolute()
    if not (folder / "actor").is_dir():
        raise CheckpointError(f"resume_dir {folder} does not exist, or has no actor/ folder; name a global_step_N folder, or auto")
    return folder


def _check_initial_weights(config: RunConfig, resume: Path | None) -> None:
    model = config.actor.model
    if config.actor.megatron.use_hf_ckpt or model.megatron_checkpoint is not None:
        if model.megatron_checkpoint is not None:
            _inspect(config, Path(model.megatron_checkpoint))
        return
    if resume is None:
        raise ConfigError(
            "model.megatron_checkpoint is required if use_hf_ckpt is False; "
            f"runner.resume_dir=auto found no complete checkpoint in {run_folder(config) / 'checkpoints'}"
        )
    if config.algorithm.kl_beta != 0:
        raise ConfigError(
            "algorithm.kl_beta is not 0, so the initial weights are needed as its reference, also on resume: set "
            "actor.model.megatron_checkpoint, or actor.megatron.use_hf_ckpt to True"
        )


def _check_resume(config: RunConfig, resume: Path | None) -> tuple[int, tuple[str, ...]]:
    """Step to continue after, and what the user should know."""
    if resume is None:
        return 0, ()
    step, complete = _inspect(config, resume / "actor")
    if complete:
        return step, ()
    return step, (f"warning: {resume} holds HF weights alone: optimizer and schedule start anew at step {step}",)


def _inspect(config: RunConfig, actor_folder: Path) -> tuple[int, bool]:
    model = config.actor.model
    held = inspect_checkpoint(actor_folder, tp_size=model.tensor_model_parallel_size, pp_size=model.pipeline_model_parallel_size)
    return held.step, held.complete


def _make_seeded_model(config: RunConfig) -> tuple[str, ...]:
    """The model that the run starts from, where it is the one to be made."""
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
    if not isinstance(found, dict) or not {"order", "handed_out", "loader"} <= found.keys():
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
