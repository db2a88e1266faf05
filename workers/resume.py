"""State that a resumed run takes from its checkpoint, and settings from its configuration: one table, key by key.

Owns the choice of the checkpoint, the record of the settings that it was made under, and their comparison with this run's. Knows
no tensor, imports no torch: what ranks restore is ``rlsync.bridge.checkpoint``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from rlsync.bridge.checkpoint_folder import HF_FOLDER, TRACKER, Restored, inspect_checkpoint, latest_checkpoint, write_durably
from rlsync.errors import CheckpointError, ConfigError, first_few
from workers.config import AnyConfig, SftConfig, config_as_dict

DATA_STATE = "data/data.pt"
SETTINGS = "run.json"
# What a one-time conversion was made from; written after everything else of it.
ORIGIN = "origin.json"


class Rule(Enum):
    """Effect of a key whose value differs from the checkpoint's."""

    HOLDS = "the new value holds from the resumed step on, and the screen says so"
    SILENT = "the new value holds; no result depends on it"
    WEIGHTS = "refused: the saved weights are of that kind"
    LAYOUT = "the saved shards are cut anew, and random states start anew"
    OPTIMIZER = "refused where the optimizer is restored: its saved state has that form"
    REFERENCE = "the new value holds for the reference of a KL term; without one a resumed run does not read it"
    DATA = "refused where the data position is restored: it counts batches of that kind"


# The longest prefix of a key decides. Some saved state describes itself and is compared where it is read: parameters by name,
# shape and dtype; the problems by their content; gradient buffers by their sizes; the number of data-parallel ranks.
RULES: Mapping[str, Rule] = {
    "cluster": Rule.SILENT,
    "runner": Rule.SILENT,
    "runner.seq_length": Rule.HOLDS,
    "runner.async_steps": Rule.HOLDS,
    "algorithm": Rule.HOLDS,
    "algorithm.early_scoring_prompts": Rule.SILENT,
    "algorithm.training_batch_size_per_gpu": Rule.SILENT,
    "algorithm.logprob_forward_micro_batch_size": Rule.SILENT,
    "algorithm.logprob_forward_max_tokens": Rule.SILENT,
    "rollout": Rule.SILENT,
    "rollout.model": Rule.HOLDS,
    "data": Rule.HOLDS,
    "data.num_workers": Rule.SILENT,
    "data.rollout_batch_size": Rule.DATA,
    "data.seed": Rule.DATA,
    "data.shuffle": Rule.DATA,
    "actor": Rule.SILENT,
    # Also of dropout: the saved random state is then left alone.
    "actor.seed": Rule.HOLDS,
    "actor.model": Rule.HOLDS,
    "actor.model.logits_chunk_tokens": Rule.SILENT,
    "actor.model.precision": Rule.WEIGHTS,
    "actor.model.tensor_model_parallel_size": Rule.LAYOUT,
    "actor.model.pipeline_model_parallel_size": Rule.LAYOUT,
    "actor.model.virtual_pipeline_model_parallel_size": Rule.LAYOUT,
    "actor.model.context_parallel_size": Rule.LAYOUT,
    "actor.model.expert_model_parallel_size": Rule.LAYOUT,
    "actor.model.expert_tensor_parallel_size": Rule.LAYOUT,
    "actor.model.decoder_first_pipeline_num_layers": Rule.LAYOUT,
    "actor.model.decoder_last_pipeline_num_layers": Rule.LAYOUT,
    "actor.model.make_vocab_size_divisible_by": Rule.LAYOUT,
    "actor.model.freeze_language_model": Rule.OPTIMIZER,
    "actor.model.freeze_vision_model": Rule.OPTIMIZER,
    "actor.model.freeze_vision_projection": Rule.OPTIMIZER,
    "actor.lora": Rule.WEIGHTS,
    "actor.lora.dropout": Rule.HOLDS,
    "actor.lora.init": Rule.REFERENCE,
    "actor.lora.adapter_path": Rule.REFERENCE,
    "actor.optim": Rule.HOLDS,
    "actor.optim.optimizer": Rule.OPTIMIZER,
    "actor.optim.use_distributed_optimizer": Rule.OPTIMIZER,
    "actor.optim.optimizer_cpu_offload": Rule.OPTIMIZER,
    "actor.optim.optimizer_offload_fraction": Rule.OPTIMIZER,
    "actor.optim.use_precision_aware_optimizer": Rule.OPTIMIZER,
    "actor.optim.log_num_zeros_in_grad": Rule.SILENT,
    "actor.optim.overlap_grad_reduce": Rule.SILENT,
    "actor.optim.overlap_param_gather": Rule.SILENT,
    "actor.lr_sched": Rule.HOLDS,
    "actor.tokenizer": Rule.HOLDS,
    "reward": Rule.HOLDS,
    "reward.num_processes": Rule.SILENT,
    "reward.timeout_s": Rule.SILENT,
    "weight_sync": Rule.SILENT,
    "warm_start": Rule.REFERENCE,
    "arithmetic": Rule.HOLDS,
    "pictures": Rule.HOLDS,
    "seeded_model": Rule.HOLDS,
}
# Of an SFT run, before the others.
SFT_RULES: Mapping[str, Rule] = {
    "validation": Rule.HOLDS,
    "actor.micro_batch_size": Rule.SILENT,
    "actor.global_batch_size": Rule.DATA,
}
# What ``run.json`` holds, and how.
_SETTINGS_KINDS = {"config": (dict, "a mapping"), "hf_config": (dict, "a mapping"), "actor_ranks": (int, "a number")}
_CUT_ANEW = "the saved shards are cut anew for the layout of this run; random states start anew"
# Keys of config.json that change no weight and no score.
_SAME_MODEL = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def rule_of(key: str, *, sft: bool = False) -> Rule:
    """The rule of a dotted configuration key; KeyError where the table lacks it."""
    rules = {**RULES, **SFT_RULES} if sft else RULES
    while key not in rules:
        if "." not in key:
            raise KeyError(key)
        key = key.rpartition(".")[0]
    return rules[key]


def _rule(config: AnyConfig, key: str) -> Rule:
    return rule_of(key, sft=isinstance(config, SftConfig))


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a run begins.

    Attributes:
        resume: ``global_step_N`` folder to continue from, or None for a fresh start.
        step: steps already done.
        notes: what the user should know about the resume.
        complete: Megatron's shards are restored, not Hugging Face weights alone.
        changed: keys that the run sets otherwise than the checkpoint's run did.
        saved: settings that the checkpoint was made under; None where it does not say.
    """

    resume: Path | None = None
    step: int = 0
    notes: tuple[str, ...] = ()
    complete: bool = False
    changed: tuple[str, ...] = ()
    saved: Mapping[str, Any] | None = None


def run_folder(config: AnyConfig) -> Path:
    """``<output_dir>/<experiment_name>``."""
    return Path(config.runner.output_dir).absolute() / config.runner.experiment_name


def find_beginning(config: AnyConfig) -> Beginning:
    """The beginning that ``runner.resume_dir`` and the keys of the initial weights select among the existing files; changes nothing.

    Raises ConfigError or CheckpointError, also for settings that the checkpoint's state does not allow to change.
    """
    resume = _resume_folder(config)
    _check_initial_weights(config, resume)
    if resume is None:
        root = run_folder(config) / "checkpoints"
        found_none = f"runner.resume_dir=auto: no complete checkpoint in {root}, so the run starts fresh"
        return Beginning(notes=() if config.runner.resume_dir is None else (found_none,))
    held = _inspect(config, resume / "actor")
    notes = [f"resuming after step {held.step} from {resume}"]
    if not held.complete and config.actor.lora.r:
        raise CheckpointError(
            f"{resume} holds HF weights alone, in which adapters are merged: actor.lora cannot go on from it. Start a new run with "
            f"{resume}/actor/{HF_FOLDER} as its model"
        )
    if not held.complete:
        notes.append(f"warning: {resume} holds HF weights alone: optimizer and schedule start anew at step {held.step}")
    elif config.actor.megatron.no_load_optim:
        notes.append(f"actor.megatron.no_load_optim: optimizer and schedule start anew at step {held.step}")
    saved = _read_settings(resume)
    if saved is not None:
        _check_task(config, saved["config"], resume)
    else:
        notes.append(f"warning: {resume / SETTINGS} is missing, so settings that changed since cannot be told")
    changed = [] if saved is None else _compare(config, saved["config"], resume, complete=held.complete)
    if held.complete and (held.moved or any(_rule(config, key) is Rule.LAYOUT for key, _, _ in changed)):
        notes.append(_CUT_ANEW)
    if changed:
        notes.append(f"settings other than the checkpoint's, which hold from step {held.step + 1} on:")
        notes += [f"  {key} {then} -> {now}" for key, then, now in changed]
    return Beginning(resume, held.step, tuple(notes), held.complete, tuple(key for key, _, _ in changed), saved)


def _resume_folder(config: AnyConfig) -> Path | None:
    wanted = config.runner.resume_dir
    if wanted is None:
        return None
    if wanted == "auto":
        return latest_checkpoint(run_folder(config) / "checkpoints")
    folder = Path(wanted).absolute()
    if not (folder / "actor").is_dir():
        raise CheckpointError(f"resume_dir {folder} does not exist, or has no actor/ folder; name a global_step_N folder, or auto")
    return folder


def check_conversion_folder(folder: Path) -> None:
    """Raise ConfigError where a folder has more in it than a conversion of Hugging Face weights, complete or not, leaves: it is emptied for
    the next one."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"actor.megatron.ckpt_convertor.save_path {folder} is no folder; name one for the conversion alone")
    ours = {ORIGIN, TRACKER, f"{TRACKER}.partial", "iter_0000000"}
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours) if folder.is_dir() else []
    if foreign:
        raise ConfigError(
            f"actor.megatron.ckpt_convertor.save_path {folder} holds {first_few(foreign, 3)}, which is of no conversion, and is emptied "
            "for one; name a folder for the conversion alone"
        )


def _check_initial_weights(config: AnyConfig, resume: Path | None) -> None:
    model, megatron = config.actor.model, config.actor.megatron
    if megatron.use_hf_ckpt and megatron.convert_from_hf and not megatron.mbridge:
        check_conversion_folder(Path(str(megatron.ckpt_convertor.save_path)).absolute())
    if config.actor.megatron.use_hf_ckpt or model.megatron_checkpoint is not None:
        if model.megatron_checkpoint is not None:
            _inspect(config, Path(model.megatron_checkpoint))
        return
    if config.runner.resume_dir is None:
        raise ConfigError("model.megatron_checkpoint is required if use_hf_ckpt is False")  # as the rule between the keys says it
    if resume is None:
        raise ConfigError(
            "model.megatron_checkpoint is required if use_hf_ckpt is False; "
            f"runner.resume_dir=auto found no complete checkpoint in {run_folder(config) / 'checkpoints'}"
        )
    if config.has_reference:
        raise ConfigError(
            "algorithm.kl_beta is not 0, so the initial weights are needed as its reference, also on resume: set "
            "actor.model.megatron_checkpoint, or actor.megatron.use_hf_ckpt to True"
        )


def _inspect(config: AnyConfig, actor_folder: Path) -> Restored:
    model = config.actor.model
    return inspect_checkpoint(
        actor_folder,
        tp_size=model.tensor_model_parallel_size,
        pp_size=model.pipeline_model_parallel_size,
        ep_size=model.expert_model_parallel_size,
    )


def _check_task(config: AnyConfig, saved: Mapping[str, Any], folder: Path) -> None:
    then, now = saved.get("runner", {}).get("task_type", "reasoning"), config.runner.task_type
    if then != now:
        raise CheckpointError(
            f"{folder} was saved by a run with runner.task_type {then}, this one has {now}; start a new run from {folder}/actor/{HF_FOLDER}"
        )


def check_model(beginning: Beginning, hf_config: Mapping[str, Any], key: str) -> None:
    """Raise CheckpointError where ``config.json``, in the folder that ``key`` names, describes another model than the checkpoint's."""
    if beginning.saved is None:
        return
    then, now = dict(_leaves(beginning.saved["hf_config"])), dict(_leaves(_plain(hf_config)))
    different = [
        f"{key} {then.get(key)} then, {now.get(key)} now"
        for key in sorted(then.keys() | now.keys())
        if key.rpartition(".")[2] not in _SAME_MODEL and then.get(key) != now.get(key)
    ]
    if different:
        raise CheckpointError(
            f"{beginning.resume} is of another model than {key}: {'; '.join(different)}. "
            "Resume with the checkpoint's model, or start a new run"
        )


def note_on_ranks(beginning: Beginning, num_ranks: int) -> str | None:
    """What is to be said of an actor of another number of ranks than the checkpoint's, whose layout is another by that alone."""
    if beginning.saved is None or not beginning.complete or _CUT_ANEW in beginning.notes or beginning.saved["actor_ranks"] == num_ranks:
        return None
    return f"{beginning.saved['actor_ranks']} actor ranks saved {beginning.resume}, and {num_ranks} go on: {_CUT_ANEW}"


def write_settings(folder: Path, config: AnyConfig, hf_config: Mapping[str, Any], num_ranks: int) -> None:
    """Record the settings of the run in a checkpoint; the disk has them when this returns."""
    settings = {"config": config_as_dict(config), "hf_config": dict(hf_config), "actor_ranks": num_ranks}
    write_durably(folder / SETTINGS, json.dumps(settings, indent=1))


def _read_settings(folder: Path) -> Mapping[str, Any] | None:
    path = folder / SETTINGS
    if not path.is_file():
        return None
    remedy = "remove it to resume without a comparison of settings"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds a value of type {type(settings).__name__}, expected a mapping; {remedy}")
    absent = _SETTINGS_KINDS.keys() - settings.keys()
    if absent:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(absent))}; {remedy}")
    for key, (kind, expected) in _SETTINGS_KINDS.items():
        if type(settings[key]) is not kind:  # a bool would pass for an int
            raise CheckpointError(f"{path} holds {key!r} of type {type(settings[key]).__name__}, expected {expected}; {remedy}")
    return settings


def _compare(config: AnyConfig, saved: Mapping[str, Any], folder: Path, *, complete: bool) -> list[tuple[str, Any, Any]]:
    """(key, then, now) of the changes that hold. Raises CheckpointError naming all that cannot."""
    running = _plain(config_as_dict(config))
    then, now = dict(_leaves(saved)), dict(_leaves(running))
    for section in (section.name for section in fields(config) if section.default is None):
        if (saved.get(section) is None) != (section not in running):
            then[section], now[section] = ("absent", "present") if section in running else ("present", "absent")
    with_optimizer = complete and not config.actor.megatron.no_load_optim
    if with_optimizer and then.get("actor.megatron.no_save_optim"):
        raise CheckpointError(
            f"{folder} was saved under actor.megatron.no_save_optim, without the state of the optimizer; set "
            "actor.megatron.no_load_optim=True to start the optimizer anew"
        )
    refuses = {
        Rule.WEIGHTS: complete,
        Rule.OPTIMIZER: with_optimizer,
        Rule.DATA: (folder / DATA_STATE).is_file(),
    }
    anew = f"start a new run from {folder}/actor/{HF_FOLDER}"
    advice = {
        Rule.WEIGHTS: anew,
        Rule.OPTIMIZER: "set actor.megatron.no_load_optim=True to start the optimizer anew",
        Rule.DATA: f"remove {folder / DATA_STATE} to start the data from the beginning",
    }
    silent = {Rule.SILENT, *(() if config.has_reference else (Rule.REFERENCE,))}
    changed, refused, ways = [], [], []
    for key in now:
        # A key that one side lacks is of another version, or of a section that is compared as a whole.
        if key not in then or then[key] == now[key]:
            continue
        rule = _rule(config, key)
        if refuses.get(rule, False):
            refused.append(f"{key} {then[key]} -> {now[key]}")
            ways.append(advice[rule])
        elif rule not in silent:
            changed.append((key, then[key], now[key]))
    if refused:
        raise CheckpointError(
            f"{folder} was saved with other settings ({', '.join(refused)}); restore them, or {', or '.join(dict.fromkeys(ways))}"
        )
    return changed


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(values: Mapping[str, Any]) -> Any:
    """The values after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(values))
