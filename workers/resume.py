"""Where a run begins: the checkpoint it goes on from, if any, and whether that fits this run. Reads names, no tensor; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlsync.checkpoint_folder import inspect_checkpoint, latest_checkpoint
from rlsync.errors import CheckpointError, ConfigError
from workers.config import RunConfig

DATA_STATE = "data/data.pt"


@dataclass(frozen=True, slots=True)
class Beginning:
    """Attributes:
    resume: ``global_step_N`` folder to continue from, or None.
    step: steps already done.
    notes: what the user should know about the resume.
    """

    resume: Path | None
    step: int
    notes: tuple[str, ...]


def run_folder(config: RunConfig) -> Path:
    """``<output_dir>/<experiment_name>``."""
    return Path(config.runner.output_dir).absolute() / config.runner.experiment_name


def find_beginning(config: RunConfig) -> Beginning:
    """What ``runner.resume_dir`` and the keys of the initial weights mean for the files that are there.

    Raises ConfigError or CheckpointError.
    """
    resume = _resume_folder(config)
    _check_initial_weights(config, resume)
    step, notes = _check_resume(config, resume)
    return Beginning(resume, step, notes)


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
