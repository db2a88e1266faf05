"""What a run needs before any process starts: the model's config, tokenizer, problems, and the checkpoint to continue from.

Whatever can be refused without a process is refused here. Knows no Ray.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlsync.checkpoint import inspect_checkpoint, latest_checkpoint
from rlsync.errors import CheckpointError, ConfigError
from workers.arithmetic import ArithmeticRecipe, build_world
from workers.config import RunConfig, validate_model
from workers.data import PromptDataset, PromptForm, PromptLoader, load_problems
from workers.seeded_model import make_seeded_model

DATA_STATE = "data/data.pt"


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
    hf_config = _hf_config(config)
    validate_model(config, hf_config)
    tokenizer = AutoTokenizer.from_pretrained(
        config.actor.tokenizer.tokenizer_model,
        use_fast=config.actor.tokenizer.use_fast,
        trust_remote_code=config.actor.tokenizer.trust_remote_code,
    )
    dataset = _dataset(config, tokenizer)
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


def _hf_config(config: RunConfig) -> dict[str, Any]:
    path = Path(config.rollout.model.model_path)
    if not (path / "config.json").is_file():
        raise ConfigError(f"rollout.model.model_path {path} holds no config.json; it must be a local Hugging Face folder")
    return json.loads((path / "config.json").read_text())


def _dataset(config: RunConfig, tokenizer: Any) -> PromptDataset:
    data = config.data
    if data.val_data_paths:
        load_problems(data.val_data_paths, prompt_key=data.prompt_key, answer_key=data.answer_key)
    problems = load_problems(data.train_data_paths, prompt_key=data.prompt_key, answer_key=data.answer_key, data_size=data.data_size)
    form = PromptForm(
        max_prompt_length=data.max_prompt_length,
        filter_prompt_by_length=data.filter_prompt_by_length,
        apply_chat_template=data.apply_chat_template,
        system_prompt=data.system_prompt,
        prompt_suffix=data.prompt_suffix,
    )
    return PromptDataset(problems, tokenizer, form)


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
    loader.load_state_dict(torch.load(state, weights_only=True))
    return ()


def _stop_ids(config: RunConfig, hf_config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the tokenizer and of the model's configs, the tokenizer's first."""
    path = Path(config.rollout.model.model_path) / "generation_config.json"
    generation = json.loads(path.read_text()) if path.is_file() else {}
    found: list[int] = []
    for value in (tokenizer.eos_token_id, generation.get("eos_token_id"), hf_config.get("eos_token_id")):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(found))
