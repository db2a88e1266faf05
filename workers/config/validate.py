"""Rules between keys of a run configuration. Pure: reads the dataclasses, touches no file, device or process group.

Three moments: ``validate`` as soon as the configuration is built, ``validate_model`` when the HF ``config.json`` is
read, ``validate_world`` when the number of actor ranks is known. Findings are collected; each moment raises once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlsync.errors import ConfigError
from workers.config.actor import ActorConfig
from workers.config.schema import RunConfig

# Families by config.json's model_type, for the spelling of rollout.model.model_type.
_HF_MODEL_TYPES = {"qwen2.5": "qwen2", "qwen2.5_vl": "qwen2_5_vl"}


def validate(config: RunConfig) -> None:
    """Raise ConfigError with every rule the configuration breaks."""
    _raise_all((*_runner(config), *_algorithm(config), *_batches(config), *_numbers(config), *_actor(config), *_engine(config)))


def validate_model(config: RunConfig, hf_config: Mapping[str, Any]) -> None:
    """Raise ConfigError when the actor's or the engines' layout cannot hold the model of an HF ``config.json``.

    KV heads may be fewer than TP on either side when they divide it: they are then replicated.
    """
    model, tp = config.actor.model, config.actor.model.tensor_model_parallel_size
    heads = int(hf_config["num_attention_heads"])
    kv_heads = int(hf_config.get("num_key_value_heads") or heads)
    found = []
    for who, size in (
        ("actor.model.tensor_model_parallel_size", tp),
        ("rollout.tensor_parallel_size", config.rollout.tensor_parallel_size),
    ):
        if heads % size:
            found.append(f"num_attention_heads ({heads}) must be divisible by {who} ({size})")
        if kv_heads % size and size % kv_heads:
            found.append(f"num_key_value_heads ({kv_heads}) must divide or be divisible by {who} ({size})")
    virtual = model.virtual_pipeline_model_parallel_size
    layers, stages = int(hf_config["num_hidden_layers"]), model.pipeline_model_parallel_size * (1 if virtual is None else virtual)
    uneven = model.decoder_first_pipeline_num_layers is not None or model.decoder_last_pipeline_num_layers is not None
    if not uneven and layers % stages:
        found.append(
            f"num_hidden_layers ({layers}) must be divisible by pipeline stages x virtual stages ({stages}); "
            "set actor.model.decoder_first_pipeline_num_layers / decoder_last_pipeline_num_layers for an uneven split"
        )
    wanted = config.rollout.model.model_type
    if wanted is not None and _HF_MODEL_TYPES.get(wanted, wanted) != hf_config.get("model_type"):
        found.append(f"rollout.model.model_type is {wanted}, but {config.rollout.model.model_path} holds {hf_config.get('model_type')}")
    _raise_all(found)


def validate_world(config: RunConfig, actor_world_size: int) -> int:
    """Data-parallel size of the actor; ConfigError when ranks or batches cannot be dealt evenly."""
    model = config.actor.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    if actor_world_size % replica:
        raise ConfigError(
            f"cluster.component_placement gives the actor {actor_world_size} ranks, which TP x PP x CP = {replica} must divide"
        )
    dp_size = actor_world_size // replica
    found = []
    samples = config.data.rollout_batch_size * config.algorithm.group_size
    if samples % dp_size:
        found.append(f"data.rollout_batch_size x algorithm.group_size ({samples}) must be divisible by the data-parallel size ({dp_size})")
    batch, micro = config.actor.global_batch_size, config.actor.micro_batch_size
    assert batch is not None and micro is not None, "load_config derives both"
    if batch % dp_size:
        found.append(
            f"actor.global_batch_size ({batch}), the samples of a mini-batch, must be divisible by the data-parallel size ({dp_size})"
        )
    if config.warm_start is not None and config.warm_start.batch_size < dp_size:
        found.append(f"warm_start.batch_size ({config.warm_start.batch_size}) must be at least the data-parallel size ({dp_size})")
    if not config.runner.enable_dynamic_batch_size and batch % (micro * dp_size):
        found.append(
            f"actor.global_batch_size ({batch}) must be divisible by actor.micro_batch_size x data-parallel size ({micro} x {dp_size})"
        )
    _raise_all(found)
    return dp_size


def _runner(config: RunConfig) -> Iterator[str]:
    runner = config.runner
    if runner.seq_length <= config.data.max_prompt_length:
        yield (f"runner.seq_length ({runner.seq_length}) must be greater than data.max_prompt_length ({config.data.max_prompt_length})")
    new = config.algorithm.sampling_params.max_new_tokens
    if new is not None and new > 0 and config.data.max_prompt_length + new > max(runner.seq_length, config.data.max_prompt_length + 1):
        yield (
            f"data.max_prompt_length ({config.data.max_prompt_length}) + algorithm.sampling_params.max_new_tokens ({new}) "
            f"must not exceed runner.seq_length ({runner.seq_length})"
        )
    if runner.val_check_interval > 0 and runner.save_interval >= 0 and runner.save_interval % runner.val_check_interval:
        yield f"save_interval={runner.save_interval} must be divisible by val_check_interval={runner.val_check_interval}"
    if runner.keep_last_n is not None and runner.keep_last_n < 1:
        yield f"runner.keep_last_n ({runner.keep_last_n}) must be at least 1, or null to keep all"
    if runner.enable_dynamic_batch_size and (runner.max_tokens_per_mbs or 0) < runner.seq_length:
        yield f"runner.max_tokens_per_mbs ({runner.max_tokens_per_mbs}) must be at least runner.seq_length ({runner.seq_length})"


def _algorithm(config: RunConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.group_size <= 1:
        yield f"algorithm.group_size ({algorithm.group_size}) must be greater than 1 for adv_type {algorithm.adv_type}"
    if not (algorithm.recompute_logprobs or config.rollout.return_logprobs):
        yield "algorithm.recompute_logprobs or rollout.return_logprobs must be True"
    if algorithm.importance_sampling_fix and not algorithm.recompute_logprobs:
        yield "algorithm.importance_sampling_fix needs algorithm.recompute_logprobs=True: it compares both log-probabilities"
    if algorithm.clip_ratio_c is not None and algorithm.clip_ratio_c <= 1.0:
        yield f"algorithm.clip_ratio_c ({algorithm.clip_ratio_c}) must be greater than 1.0"
    low, high = algorithm.clip_log_ratio_min, algorithm.clip_log_ratio_max
    if low is not None and high is not None and low > high:
        yield f"algorithm.clip_log_ratio_min ({low}) must not exceed algorithm.clip_log_ratio_max ({high})"
    if algorithm.sampling_params.temperature <= 0 and algorithm.sampling_params.do_sample:
        yield (
            f"algorithm.sampling_params.temperature ({algorithm.sampling_params.temperature}) must be greater than 0; "
            "do_sample=False decodes greedily"
        )
    wrong, correct = config.reward.reward_min_val, config.reward.reward_max_val
    if wrong >= correct:
        yield f"reward.reward_min_val ({wrong}) must be less than reward.reward_max_val ({correct})"


def _batches(config: RunConfig) -> Iterator[str]:
    algorithm, actor = config.algorithm, config.actor
    samples = config.data.rollout_batch_size * algorithm.group_size
    if algorithm.n_minibatches < 1 or samples % algorithm.n_minibatches:
        yield (
            f"data.rollout_batch_size x algorithm.group_size ({samples}) must be divisible by "
            f"algorithm.n_minibatches ({algorithm.n_minibatches})"
        )
    elif actor.global_batch_size != samples // algorithm.n_minibatches:
        yield (
            f"actor.global_batch_size ({actor.global_batch_size}) must be rollout_batch_size x group_size // n_minibatches = "
            f"{samples // algorithm.n_minibatches}; leave it out"
        )
    if actor.micro_batch_size != algorithm.training_batch_size_per_gpu:
        yield (
            f"actor.micro_batch_size ({actor.micro_batch_size}) must equal algorithm.training_batch_size_per_gpu "
            f"({algorithm.training_batch_size_per_gpu}); leave it out"
        )


def _numbers(config: RunConfig) -> Iterator[str]:
    at_least_one = {
        "cluster.num_nodes": config.cluster.num_nodes,
        "data.rollout_batch_size": config.data.rollout_batch_size,
        "data.max_prompt_length": config.data.max_prompt_length,
        "algorithm.training_batch_size_per_gpu": config.algorithm.training_batch_size_per_gpu,
        "algorithm.logprob_forward_micro_batch_size": config.algorithm.logprob_forward_micro_batch_size,
        "rollout.tensor_parallel_size": config.rollout.tensor_parallel_size,
        "rollout.max_running_requests": config.rollout.max_running_requests,
        "actor.model.tensor_model_parallel_size": config.actor.model.tensor_model_parallel_size,
        "actor.model.pipeline_model_parallel_size": config.actor.model.pipeline_model_parallel_size,
        "actor.model.context_parallel_size": config.actor.model.context_parallel_size,
        "actor.model.expert_model_parallel_size": config.actor.model.expert_model_parallel_size,
        "reward.num_processes": config.reward.num_processes,
        "weight_sync.bucket_bytes": config.weight_sync.bucket_bytes,
    }
    yield from (f"{name} ({value}) must be at least 1" for name, value in at_least_one.items() if value < 1)
    above_zero = {
        "weight_sync.timeout_s": config.weight_sync.timeout_s,
        "reward.timeout_s": config.reward.timeout_s,
        "rollout.timeout_s": config.rollout.timeout_s,
    }
    if config.rollout.max_engine_restarts < 0:
        yield f"rollout.max_engine_restarts ({config.rollout.max_engine_restarts}) must not be negative"
    yield from (f"{name} ({value}) must be greater than 0" for name, value in above_zero.items() if value <= 0)
    if not 0 <= config.runner.logger.prometheus_port < 2**16:
        yield f"runner.logger.prometheus_port ({config.runner.logger.prometheus_port}) must be a port, or 0 for none"
    if config.weight_sync.num_slots not in (2, 3):
        yield f"weight_sync.num_slots ({config.weight_sync.num_slots}) must be 2 or 3"
    if not 0 < config.rollout.gpu_memory_utilization <= 1:
        yield f"rollout.gpu_memory_utilization ({config.rollout.gpu_memory_utilization}) must lie in (0, 1]"


def _engine(config: RunConfig) -> Iterator[str]:
    if config.rollout.pipeline_parallel_size != 1:
        yield f"rollout.pipeline_parallel_size ({config.rollout.pipeline_parallel_size}) must be 1"


def _actor(config: RunConfig) -> Iterator[str]:
    actor, runner = config.actor, config.runner
    yield from _initial_weights(actor, resuming=runner.resume_dir is not None)
    yield from _schedule(actor)
    model, optim = actor.model, actor.optim
    for flag, precision in ((optim.bf16, "bf16"), (optim.fp16, "fp16")):
        if flag and model.precision != precision:
            yield f"actor.optim.{precision}=True contradicts actor.model.precision={model.precision}"
    etp, tp = model.expert_tensor_parallel_size, model.tensor_model_parallel_size
    if etp is not None and etp > tp and not actor.megatron.mbridge:
        yield f"actor.model.expert_tensor_parallel_size ({etp}) must be less than or equal to tensor_model_parallel_size ({tp})"
    if model.sequence_parallel and tp == 1:
        yield "actor.model.sequence_parallel=True needs actor.model.tensor_model_parallel_size > 1"
    if model.virtual_pipeline_model_parallel_size is not None and model.pipeline_model_parallel_size == 1:
        yield "actor.model.virtual_pipeline_model_parallel_size needs actor.model.pipeline_model_parallel_size > 1"
    if model.recompute_granularity == "full" and (model.recompute_method is None or model.recompute_num_layers is None):
        yield "actor.model.recompute_granularity=full needs recompute_method and recompute_num_layers"


def _initial_weights(actor: ActorConfig, *, resuming: bool) -> Iterator[str]:
    checkpoint = actor.model.megatron_checkpoint
    if actor.megatron.use_hf_ckpt and checkpoint is not None:
        yield "model.megatron_checkpoint should be None if use_hf_ckpt is True"
    if not actor.megatron.use_hf_ckpt and checkpoint is None and not resuming:
        yield "model.megatron_checkpoint is required if use_hf_ckpt is False"


def _schedule(actor: ActorConfig) -> Iterator[str]:
    schedule = actor.lr_sched
    if schedule.lr_warmup_fraction is not None and schedule.lr_warmup_iters:
        yield "actor.lr_sched: give lr_warmup_fraction or lr_warmup_iters, not both"
    decays = (schedule.start_weight_decay, schedule.end_weight_decay)
    if schedule.lr_decay_style == "constant" and decays != (None, None):
        yield (
            "actor.lr_sched: start_weight_decay and end_weight_decay must be left out when lr_decay_style is constant; "
            "actor.optim.weight_decay applies"
        )
    if schedule.lr_decay_style != "constant" and None in decays:
        yield f"actor.lr_sched: lr_decay_style {schedule.lr_decay_style} needs start_weight_decay and end_weight_decay"
    if schedule.lr_decay_style != "constant" and schedule.lr_warmup_iters >= schedule.lr_decay_iters:
        yield f"actor.lr_sched: lr_warmup_iters ({schedule.lr_warmup_iters}) must be less than lr_decay_iters ({schedule.lr_decay_iters})"


def _raise_all(found: Any) -> None:
    messages = list(found)
    if messages:
        raise ConfigError(messages[0] if len(messages) == 1 else "configuration:\n  " + "\n  ".join(messages))
