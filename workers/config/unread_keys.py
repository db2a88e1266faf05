"""Keys that a run of this configuration does not read, because another key has switched off what they are of.

Owns the table of them: a row is some keys, the key that switches, and when they are read. Knows no yaml and no rule that refuses: what
stands here is said and not an error, since configurations keep such keys while the switch is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from rlsync.sync.config import SyncConfig
from workers.config.fields import annotations_of, section_of
from workers.config.grpo import RunConfig
from workers.config.schema import RolloutConfig
from workers.config.tasks import AnyConfig


@dataclass(frozen=True, slots=True)
class ReadWhere:
    """Keys that are read only ``where`` the configuration, with every key that is derived from others, has it so.

    ``switch`` is the key that decides; its value is the reason that is said.
    """

    keys: tuple[str, ...]
    switch: str
    where: Callable[[Any], bool]


_SCHEDULE, _OPTIM, _SAMPLING = "actor.lr_sched", "actor.optim", "algorithm.sampling_params"
_STYLE, _BACKENDS = f"{_SCHEDULE}.lr_decay_style", "runner.logger.logger_backends"


def _schedule(config: Any) -> Any:
    return config.actor.lr_sched


def _interleaves(config: Any) -> bool:
    return (config.actor.model.virtual_pipeline_model_parallel_size or 1) > 1


IN_EVERY_RUN = (
    ReadWhere(
        (f"{_SCHEDULE}.lr_decay_iters",),
        _STYLE,
        lambda c: _schedule(c).lr_decay_style != "constant" or _schedule(c).lr_warmup_fraction is not None,
    ),
    ReadWhere((f"{_SCHEDULE}.weight_decay_incr_style",), _STYLE, lambda c: _schedule(c).lr_decay_style != "constant"),
    ReadWhere(
        (f"{_SCHEDULE}.lr_wsd_decay_style", f"{_SCHEDULE}.lr_wsd_decay_iters"), _STYLE, lambda c: _schedule(c).lr_decay_style == "WSD"
    ),
    ReadWhere(
        (f"{_SCHEDULE}.lr_warmup_init",),
        f"{_SCHEDULE}.lr_warmup_iters",
        lambda c: _schedule(c).lr_warmup_iters > 0 or bool(_schedule(c).lr_warmup_fraction),
    ),
    # A warm start has no schedule.
    ReadWhere(
        (f"{_OPTIM}.weight_decay",),
        f"{_SCHEDULE}.start_weight_decay",
        lambda c: _schedule(c).start_weight_decay in (None, c.actor.optim.weight_decay) or getattr(c, "warm_start", None) is not None,
    ),
    ReadWhere((f"{_OPTIM}.lr",), f"{_SCHEDULE}.max_lr", lambda c: _schedule(c).max_lr == c.actor.optim.lr),
    ReadWhere((f"{_OPTIM}.min_lr",), f"{_SCHEDULE}.min_lr", lambda c: _schedule(c).min_lr == c.actor.optim.min_lr),
    ReadWhere((f"{_OPTIM}.optimizer_offload_fraction",), f"{_OPTIM}.optimizer_cpu_offload", lambda c: c.actor.optim.optimizer_cpu_offload),
    ReadWhere((f"{_OPTIM}.loss_scale",), "actor.model.precision", lambda c: c.actor.model.precision == "fp16"),
    ReadWhere(
        ("actor.model.recompute_method", "actor.model.recompute_num_layers"),
        "actor.model.recompute_granularity",
        lambda c: c.actor.model.recompute_granularity == "full",
    ),
    ReadWhere(
        ("actor.model.moe_router_load_balancing_type",),
        "actor.model.moe_aux_loss_coeff",
        lambda c: bool(c.actor.model.moe_aux_loss_coeff) or c.actor.model.moe_router_load_balancing_type == "none",
    ),
    ReadWhere(
        ("actor.model.batch_p2p_comm",),
        "actor.model.pipeline_model_parallel_size",
        lambda c: c.actor.model.pipeline_model_parallel_size > 1 or not c.actor.model.batch_p2p_comm,
    ),
    # Megatron mixes up messages with them (rlsync.megatron.overrides).
    ReadWhere(
        ("actor.model.batch_p2p_comm",),
        "actor.model.virtual_pipeline_model_parallel_size",
        lambda c: not _interleaves(c) or not c.actor.model.batch_p2p_comm,
    ),
    ReadWhere(
        ("actor.model.variable_seq_lengths",),
        "actor.model.virtual_pipeline_model_parallel_size",
        lambda c: not _interleaves(c) or not c.actor.model.variable_seq_lengths,
    ),
    ReadWhere(("actor.megatron.ckpt_convertor.save_path",), "actor.megatron.mbridge", lambda c: not c.actor.megatron.mbridge),
    ReadWhere(("actor.lora.init",), "actor.lora.adapter_path", lambda c: c.actor.lora.adapter_path is None),
    ReadWhere(("weight_sync.staging",), "weight_sync.transport", lambda c: c.weight_sync.transport in ("auto", "ipc")),
    ReadWhere(("data.seed",), "data.shuffle", lambda c: c.data.shuffle),
    ReadWhere(("actor.model.init_method_std",), "actor.megatron.convert_from_hf", lambda c: not c.actor.megatron.convert_from_hf),
    ReadWhere(("actor.megatron.no_load_optim",), "runner.resume_dir", lambda c: c.runner.resume_dir is not None),
    ReadWhere(
        ("actor.megatron.no_save_optim", "actor.megatron.async_save", "runner.keep_last_n"),
        "runner.save_interval",
        lambda c: c.runner.save_interval > 0,
    ),
    ReadWhere(
        ("runner.max_tokens_per_mbs",),
        "runner.enable_dynamic_batch_size",
        lambda c: c.runner.enable_dynamic_batch_size or c.runner.max_tokens_per_mbs == c.runner.seq_length,
    ),
    ReadWhere(("runner.logger.wandb_proxy", "runner.logger.wandb_entity"), _BACKENDS, lambda c: "wandb" in c.runner.logger.logger_backends),
    ReadWhere(("runner.logger.swanlab_mode",), _BACKENDS, lambda c: "swanlab" in c.runner.logger.logger_backends),
    ReadWhere(("runner.logger.prometheus_host",), "runner.logger.prometheus_port", lambda c: c.runner.logger.prometheus_port > 0),
    ReadWhere(("data.val_data_size",), "data.val_data_paths", lambda c: bool(c.data.val_data_paths)),
    ReadWhere(("rollout.cuda_graph_max_bs",), "rollout.enforce_eager", lambda c: not (c.has_engines and c.rollout.enforce_eager)),
)

IN_GRPO = (
    ReadWhere(("algorithm.importance_sampling_clip",), "algorithm.importance_sampling_fix", lambda c: c.algorithm.importance_sampling_fix),
    ReadWhere(
        ("algorithm.ratio_clip_eps",),
        "algorithm.clip_ratio_high",
        lambda c: None in (c.algorithm.clip_ratio_low, c.algorithm.clip_ratio_high),
    ),
    ReadWhere(("algorithm.kl_penalty_type",), "algorithm.kl_beta", lambda c: c.algorithm.kl_beta != 0),
    ReadWhere(
        ("algorithm.training_batch_size_per_gpu",),
        "runner.enable_dynamic_batch_size",
        # A warm start is cut by samples.
        lambda c: not c.runner.enable_dynamic_batch_size or c.warm_start is not None,
    ),
    ReadWhere(
        ("algorithm.logprob_forward_micro_batch_size",),
        "runner.enable_dynamic_batch_size",
        lambda c: not c.runner.enable_dynamic_batch_size,
    ),
    ReadWhere(
        ("algorithm.logprob_forward_micro_batch_size",),
        "algorithm.logprob_forward_max_tokens",
        lambda c: c.algorithm.logprob_forward_max_tokens is None,
    ),
    ReadWhere(
        ("algorithm.logprob_forward_max_tokens",),
        "algorithm.recompute_logprobs",
        lambda c: c.algorithm.recompute_logprobs or c.has_reference,
    ),
    ReadWhere(
        (f"{_SAMPLING}.temperature", f"{_SAMPLING}.top_k", f"{_SAMPLING}.top_p", f"{_SAMPLING}.seeded"),
        f"{_SAMPLING}.do_sample",
        lambda c: c.algorithm.sampling_params.do_sample,
    ),
    ReadWhere(("reward.reward_max_val",), "reward.reward_type", lambda c: not c.reward.takes_metadata),
    ReadWhere(("reward.num_processes", "reward.timeout_s"), "reward.reward_type", lambda c: c.reward.reward_type != "exact"),
)

# The model is named in ``actor.model``, and the log-probabilities of a rollout are asked for by other runs.
_OF_ENGINES = (
    *(f"rollout.{field.name}" for field in fields(RolloutConfig) if field.name not in ("model", "return_logprobs")),
    *(f"weight_sync.{field.name}" for field in fields(SyncConfig) if field.name != "lora"),
)

IN_SFT = (
    ReadWhere(
        (*_OF_ENGINES, "rollout.model.precision", "rollout.model.trust_remote_code", "validation.max_new_tokens"),
        "validation.generate",
        lambda c: c.validation.generate,
    ),
    ReadWhere(("data.train_on_generation_prompt",), "data.apply_chat_template", lambda c: c.data.apply_chat_template),
    ReadWhere(("data.answer_key", "data.on_too_long", "data.train_on_generation_prompt"), "data.type", lambda c: c.data.type != "text"),
    ReadWhere(("data.answer_key",), "data.type", lambda c: c.data.type != "chat"),
)


# Keys that engines on GPUs read.
_ON_GPUS = ("rollout.vllm.attention_backend", "rollout.vllm.kv_cache_memory_bytes", "rollout.cuda_graph_max_bs", "weight_sync.staging")


def keys_of_gpus(config: AnyConfig) -> tuple[str, ...]:
    """Keys with another value than their default that a machine without GPUs does not read."""
    return tuple(name for name in _ON_GPUS if config.has_engines and _is_given(config, name))


def unread_keys(given: AnyConfig, derived: AnyConfig) -> Iterator[tuple[str, str]]:
    """Keys with another value than their default that the run does not read, and the reason, each key once.

    ``derived`` is ``given`` with every key that another one's value is taken for.
    """
    told: set[str] = set()
    for row in (*IN_EVERY_RUN, *(IN_GRPO if isinstance(given, RunConfig) else IN_SFT)):
        if row.where(derived):
            continue
        value = _value(derived, row.switch)
        for name in row.keys:
            if name not in told and _is_given(given, name):
                told.add(name)
                yield name, f"{row.switch} is {'null' if value is None else value}"


def _value(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def _is_given(config: AnyConfig, dotted: str) -> bool:
    """Whether a key, or one of a section, has another value than its default."""
    parent, _, name = dotted.rpartition(".")
    section = _value(config, parent)
    cls: type = type(section)
    (declared,) = (field for field in fields(section) if field.name == name)
    value = getattr(section, name)
    if section_of(annotations_of(cls)[name]) is not None:
        return value is not None and any(_is_given(config, f"{dotted}.{inner.name}") for inner in fields(value))
    return declared.default is MISSING or value != declared.default
