"""Rules between keys of a run configuration. Pure: reads the dataclasses, touches no file, device or process group.

Three moments: ``validate`` as soon as the configuration is built, ``validate_model`` when the HF ``config.json`` is
read, ``validate_world`` when the number of actor ranks is known. Findings are collected; each moment raises once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import PurePosixPath
from typing import Any

from rlsync.engine.handles.adapters import MAX_LORA_RANKS, least_max_lora_rank
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.models import check_config, check_for_engines, check_overrides, check_parts, model_of
from rlsync.models.lora import adapters_of, check_adapters, check_beside_base, idle_exclusions
from rlsync.models.stacks import Model
from workers.config.grpo import BUILT_IN_REWARDS, REWARD_FUNCTION, RunConfig
from workers.config.schema import PART_RATES, ActorConfig, ActorModelConfig
from workers.config.sft import SftConfig
from workers.config.tasks import AnyConfig
from workers.config.worlds import misfits_of_arithmetic, misfits_of_pictures

# Families by config.json's model_type, for the spelling of rollout.model.model_type.
_HF_MODEL_TYPES = {"qwen2.5": "qwen2", "qwen2.5_vl": "qwen2_5_vl"}


def broken_rules(config: AnyConfig) -> Iterator[str]:
    """Every rule between keys that the configuration breaks. The values are within their bounds."""
    if isinstance(config, RunConfig):
        for rules in (_grpo_lengths, _algorithm, _batches, _pictures, _not_sft):
            yield from rules(config)
    else:
        yield from _sft(config)
    for shared in (_names, _worlds, _runner, _actor, _engine, _rows):
        yield from shared(config)


def validate(config: AnyConfig) -> None:
    """Raise ConfigError with every rule the configuration breaks."""
    raise_all(broken_rules(config))


def validate_model(config: AnyConfig, hf_config: Mapping[str, Any]) -> None:
    """Raise ConfigError when the actor's or the engines' settings do not fit the model of an HF ``config.json`` that a family reads.

    KV heads may be fewer than TP on either side when they divide it: they are then replicated.
    """
    actor, model = config.actor.model, model_of(hf_config)
    rates = {name: part for name, part in PART_RATES.items() if part in config.actor.optim.part_lr}
    topology = actor_topology(actor)
    found = check_config(hf_config, topology)
    found += check_parts(model, actor.frozen, {f"actor.optim.{name}": part for name, part in rates.items()})
    found += [
        f"actor.model.{name}={value} contradicts {model.transformer[name]}, which config.json of {config.model_path} decides; leave it out"
        for name, value in actor.transformer_overrides().items()
        if name in model.transformer and value != model.transformer[name]
    ]
    found += [f"actor.model: {finding}" for finding in check_overrides(model, actor.transformer_overrides(), topology)]
    if isinstance(config, RunConfig) and config.data.has_pictures and model.vision is None:
        found.append(
            f"data.type {config.data.type} needs a vision-language model, and {config.model_path} holds {model.architecture}, which takes "
            "no pictures"
        )
    if model.vision is not None and not config.actor.megatron.convert_from_hf:
        found.append(
            f"actor.megatron.convert_from_hf=False: {model.architecture} has a vision tower, which is not trained from random weights; set "
            "it to True and name a folder with weights"
        )
    spec = config.actor.lora_spec
    adapters = [] if spec is None else check_adapters(model, spec) or idle_exclusions(model, spec)
    if spec is not None and not adapters and config.weight_sync.lora == "adapter":
        adapters = check_beside_base(model, adapters_of(model, spec))
    found += [f"actor.lora: {finding}" for finding in adapters]
    if config.has_engines:
        found += [f"{config.model_path}/config.json: {finding}" for finding in check_for_engines(hf_config)]
        heads, kv_heads, size = model.dims["num_heads"], model.dims["num_groups"], config.rollout.tensor_parallel_size
        if heads % size:
            found.append(f"num_attention_heads ({heads}) must be divisible by rollout.tensor_parallel_size ({size})")
        if kv_heads % size and size % kv_heads:
            found.append(f"num_key_value_heads ({kv_heads}) must divide or be divisible by rollout.tensor_parallel_size ({size})")
        if config.rollout.vllm.enable_expert_parallel:
            found += _sharing_experts(config, model)
    wanted = config.rollout.model.model_type
    if wanted is not None and _HF_MODEL_TYPES.get(wanted, wanted) != hf_config.get("model_type"):
        found.append(f"rollout.model.model_type is {wanted}, but {config.model_path} holds {hf_config.get('model_type')}")
    wants_routes = {
        f"actor.megatron.router_replay={config.actor.megatron.router_replay}": config.actor.megatron.router_replay != "off",
        "rollout.enable_return_routed_experts=True": config.rollout.enable_return_routed_experts,
    }
    if "num_experts" not in model.dims:
        found += [f"{key} is of models with experts, and {config.model_path} has none" for key, asked in wants_routes.items() if asked]
    if "num_experts" in model.dims and actor.tensor_model_parallel_size > 1 and not actor.sequence_parallel:
        found.append(
            f"actor.model.sequence_parallel must be True for a model with experts under tensor_model_parallel_size "
            f"{actor.tensor_model_parallel_size}: Megatron trains them on parts of the sequence only"
        )
    raise_all(found)


def _sharing_experts(config: AnyConfig, model: Model) -> Iterator[str]:
    """What keeps the GPUs of an engine from sharing the model's experts."""
    key, size, count = "rollout.vllm.enable_expert_parallel=True", config.rollout.tensor_parallel_size, model.dims.get("num_experts")
    if count is None:
        yield f"{key} is of models with experts, and {config.model_path} has none"
    elif not 2 <= size <= count:
        yield f"{key}: rollout.tensor_parallel_size ({size}) must be from 2 to num_experts ({count}), which an engine's GPUs share"
    if config.weight_sync.lora == "adapter":
        yield f"{key}: weight_sync.lora=adapter was never tried on engines that share experts; set it to merged"
    if config.rollout.enable_return_routed_experts:
        yield (
            f"{key}: rollout.enable_return_routed_experts, which actor.megatron.router_replay=R3 needs, was never tried on engines that "
            "share experts; leave out one of them"
        )


def actor_topology(model: ActorModelConfig, dp_size: int | None = None) -> Topology:
    """Layout of the actor's ranks; without a number of data-parallel replicas, the smallest that the expert axes allow.

    Raises ConfigError where the sizes are no layout.
    """
    tp, cp, vpp = model.tensor_model_parallel_size, model.context_parallel_size, model.virtual_pipeline_model_parallel_size
    ep, etp = model.expert_model_parallel_size, model.expert_tensor_parallel_size
    etp = 1 if etp is None else etp
    return Topology(
        tp_size=tp,
        pp_size=model.pipeline_model_parallel_size,
        vpp_size=1 if vpp is None else vpp,
        cp_size=cp,
        dp_size=ep * etp // math.gcd(ep * etp, tp * cp) if dp_size is None else dp_size,
        ep_size=ep,
        etp_size=etp,
        first_stage_layers=model.decoder_first_pipeline_num_layers,
        last_stage_layers=model.decoder_last_pipeline_num_layers,
    )


def validate_world(config: AnyConfig, actor_world_size: int) -> int:
    """Data-parallel size of the actor; ConfigError when ranks or batches cannot be dealt evenly."""
    model = config.actor.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    if actor_world_size % replica:
        raise ConfigError(
            f"cluster.component_placement gives the actor {actor_world_size} ranks, which TP x PP x CP = {replica} must divide"
        )
    dp_size = actor_world_size // replica
    found = list(_undealt_samples(config, dp_size)) if isinstance(config, RunConfig) else []
    batch, micro = config.actor.global_batch_size, config.actor.micro_batch_size
    if batch is None or micro is None:  # a rule says so
        raise_all(found)
        return dp_size
    if batch % dp_size:
        of = "mini-batch" if isinstance(config, RunConfig) else "step"
        found.append(f"actor.global_batch_size ({batch}), the samples of a {of}, must be divisible by the data-parallel size ({dp_size})")
    if not config.runner.enable_dynamic_batch_size and batch % (micro * dp_size):
        whole, part = f"actor.global_batch_size ({batch})", "actor.micro_batch_size"
        if isinstance(config, RunConfig):  # which derives both
            whole = f"data.rollout_batch_size x algorithm.group_size / algorithm.n_minibatches ({batch})"
            part = "algorithm.training_batch_size_per_gpu"
        found.append(f"{whole} must be divisible by {part} x data-parallel size ({micro} x {dp_size})")
    raise_all(found)
    return dp_size


def _undealt_samples(config: RunConfig, dp_size: int) -> Iterator[str]:
    samples = config.data.rollout_batch_size * config.algorithm.group_size
    if samples % dp_size:
        yield f"data.rollout_batch_size x algorithm.group_size ({samples}) must be divisible by the data-parallel size ({dp_size})"
    early = config.algorithm.early_scoring_prompts * config.algorithm.group_size
    if early % dp_size:
        yield f"algorithm.early_scoring_prompts x algorithm.group_size ({early}) must be divisible by the data-parallel size ({dp_size})"
    if config.warm_start is not None and config.warm_start.batch_size < dp_size:
        yield f"warm_start.batch_size ({config.warm_start.batch_size}) must be at least the data-parallel size ({dp_size})"


def _grpo_lengths(config: RunConfig) -> Iterator[str]:
    runner = config.runner
    if runner.seq_length <= config.data.max_prompt_length:
        yield (f"runner.seq_length ({runner.seq_length}) must be greater than data.max_prompt_length ({config.data.max_prompt_length})")
    scored = config.algorithm.logprob_forward_max_tokens
    if scored is not None and scored < runner.seq_length:
        yield f"algorithm.logprob_forward_max_tokens ({scored}) must be at least runner.seq_length ({runner.seq_length})"
    new = config.algorithm.sampling_params.max_new_tokens
    if new is not None and new > 0 and config.data.max_prompt_length + new > max(runner.seq_length, config.data.max_prompt_length + 1):
        yield (
            f"data.max_prompt_length ({config.data.max_prompt_length}) + algorithm.sampling_params.max_new_tokens ({new}) "
            f"must not exceed runner.seq_length ({runner.seq_length})"
        )
    least = config.algorithm.sampling_params.min_new_tokens
    if new is not None and 0 < new < least:
        yield (
            f"algorithm.sampling_params.min_new_tokens ({least}) must not exceed max_new_tokens ({new}), which is runner.seq_length - "
            "data.max_prompt_length unless it is set"
        )


def _names(config: AnyConfig) -> Iterator[str]:
    """Names of folders and of Ray's actors."""
    name = PurePosixPath(config.runner.experiment_name)
    if name.is_absolute() or not name.parts or ".." in name.parts:
        yield (
            f"runner.experiment_name ({config.runner.experiment_name!r}) must be the name of a folder below runner.output_dir, which is "
            "set aside as a whole where an earlier run used it"
        )
    group = config.actor.group_name
    if config.has_engines and group == config.rollout.group_name:
        yield f"actor.group_name and rollout.group_name are both {group!r}, and Ray knows ranks and engines by them; set another one"


def _worlds(config: AnyConfig) -> Iterator[str]:
    if config.arithmetic is not None:
        yield from misfits_of_arithmetic(config.arithmetic)
    if config.pictures is not None:
        yield from misfits_of_pictures(config.pictures)


def _runner(config: AnyConfig) -> Iterator[str]:
    runner = config.runner
    if not config.data.train_data_paths:
        yield "data.train_data_paths names no file"
    if runner.val_check_interval > 0 and runner.save_interval >= 0 and runner.save_interval % runner.val_check_interval:
        yield f"save_interval={runner.save_interval} must be divisible by val_check_interval={runner.val_check_interval}"
    if runner.val_before_train and not config.data.val_data_paths:
        yield "runner.val_before_train=True needs data.val_data_paths, the files with the validation problems"
    if runner.enable_dynamic_batch_size and (runner.max_tokens_per_mbs or 0) < runner.seq_length:
        yield f"runner.max_tokens_per_mbs ({runner.max_tokens_per_mbs}) must be at least runner.seq_length ({runner.seq_length})"


def _pictures(config: RunConfig) -> Iterator[str]:
    data = config.data
    if not data.has_pictures:
        return
    if not data.apply_chat_template:
        yield f"data.type {data.type} needs data.apply_chat_template=True: the chat template says where in a prompt a picture stands"
    if not data.filter_prompt_by_length:
        yield f"data.type {data.type} needs data.filter_prompt_by_length=True: a prompt cannot be cut through its pictures"
    if config.rollout.enable_return_routed_experts:
        yield (
            f"rollout.enable_return_routed_experts (actor.megatron.router_replay {config.actor.megatron.router_replay}) was not shown for "
            f"prompts with pictures (data.type {data.type}); R2 replays the actor's own routes"
        )


def _rows(config: AnyConfig) -> Iterator[str]:
    """Keys of ``data`` that rows of its type do not have, and pixels."""
    data = config.data
    takes = {
        "choice_key": ("vlm", "vision_language"),
        **dict.fromkeys(("image_keys", "min_pixels", "max_pixels"), ("vlm", "vision_language", "chat")),
    }
    for name, types in takes.items():
        if getattr(data, name) not in ((), None) and data.type not in types:
            yield f"data.{name} ({getattr(data, name)}) is for questions about pictures, which data.type {data.type} has not; vlm has"
    if data.system_prompt is not None and data.type == "text":
        yield f"data.system_prompt ({data.system_prompt!r}) is for conversations, and data.type text has documents; leave it out"
    elif data.system_prompt is not None and not data.apply_chat_template:
        yield (
            f"data.system_prompt ({data.system_prompt!r}) needs data.apply_chat_template=True: the chat template says where in a prompt it "
            "stands"
        )
    least, most = data.min_pixels, data.max_pixels
    if least is not None and most is not None and least > most:
        yield f"data.min_pixels ({least}) must not exceed data.max_pixels ({most})"


def _not_sft(config: RunConfig) -> Iterator[str]:
    """Keys of the shared sections that mean something in an SFT run only."""
    if config.actor.model.model_path is not None:
        yield (
            f"actor.model.model_path ({config.actor.model.model_path}) belongs to SFT (runner.task_type: sft); a reasoning run reads the "
            "model at rollout.model.model_path, and its first weights at actor.megatron.ckpt_convertor.hf_model_path"
        )
    if config.actor.eval_batch_size is not None:
        yield "actor.eval_batch_size belongs to SFT (runner.task_type: sft); remove it"


def _sft(config: SftConfig) -> Iterator[str]:
    actor, hf_path = config.actor, config.actor.megatron.ckpt_convertor.hf_model_path
    for name in ("micro_batch_size", "global_batch_size"):
        if getattr(actor, name) is None:
            yield f"actor.{name} is required in an SFT run"
    if actor.megatron.router_replay != "off" or config.rollout.enable_return_routed_experts:
        yield "actor.megatron.router_replay and rollout.enable_return_routed_experts belong to a reasoning run; remove them"
    if actor.model.model_path is None:
        yield "actor.model.model_path is required in an SFT run: the HF folder with architecture, tokenizer files and initial weights"
    elif hf_path != actor.model.model_path:
        yield (
            f"actor.megatron.ckpt_convertor.hf_model_path ({hf_path}) belongs to a reasoning run; SFT reads the model at "
            f"actor.model.model_path ({actor.model.model_path})"
        )
    if config.runner.async_steps:
        yield f"runner.async_steps ({config.runner.async_steps}) belongs to a reasoning run, which has rollouts; leave it out"
    if actor.enable_dp_load_balance:
        yield (
            "actor.enable_dp_load_balance=True is for the samples of a reasoning run; in an SFT run each rank reads its own share of the "
            "data. Set it to False"
        )
    rollout = config.rollout
    for name, is_set in (("validate_weight", rollout.validate_weight), ("max_engine_restarts", rollout.max_engine_restarts > 0)):
        if is_set:
            yield f"rollout.{name} ({getattr(rollout, name)}) belongs to a reasoning run; leave it out"
    if config.validation.generate and not config.data.val_data_paths:
        yield "validation.generate=True needs data.val_data_paths, whose prompts the engines answer"
    if config.validation.generate and config.data.type == "text":
        yield "validation.generate=True needs questions, and data.type text has none; its validation has a loss only"
    if config.validation.generate and config.runner.val_check_interval <= 0:
        yield f"validation.generate=True needs runner.val_check_interval ({config.runner.val_check_interval}) above 0"
    if config.validation.generate and config.validation.max_new_tokens >= config.runner.seq_length:
        yield (
            f"validation.max_new_tokens ({config.validation.max_new_tokens}) must be less than runner.seq_length "
            f"({config.runner.seq_length}), which holds the prompt too"
        )


def _algorithm(config: RunConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if not (algorithm.recompute_logprobs or config.rollout.return_logprobs):
        yield "algorithm.recompute_logprobs or rollout.return_logprobs must be True"
    if algorithm.importance_sampling_fix and not algorithm.recompute_logprobs:
        yield "algorithm.importance_sampling_fix needs algorithm.recompute_logprobs=True: it compares both log-probabilities"
    if algorithm.importance_sampling_fix and not config.rollout.return_logprobs:
        why = f", which runner.async_steps ({config.runner.async_steps}) makes it," if config.runner.async_steps else ""
        yield (
            f"algorithm.importance_sampling_fix=True{why} needs the engines' log-probabilities, and rollout.return_logprobs is False; "
            "leave it out"
        )
    if config.runner.async_steps and algorithm.recompute_logprobs and not algorithm.importance_sampling_fix:
        yield (
            f"runner.async_steps ({config.runner.async_steps}) trains on samples of older weights, which "
            "algorithm.importance_sampling_fix=False takes for the actor's own; leave it out, or set algorithm.recompute_logprobs to False"
        )
    yield from _early_scoring(config)
    replay, returns_routes = config.actor.megatron.router_replay, config.rollout.enable_return_routed_experts
    if replay == "R2" and not algorithm.recompute_logprobs:
        yield "actor.megatron.router_replay=R2 needs algorithm.recompute_logprobs=True: it replays the routes of that pass"
    if replay == "R3" and not returns_routes:
        yield "actor.megatron.router_replay=R3 needs rollout.enable_return_routed_experts, which is False; leave it out"
    if returns_routes and config.rollout.vllm.enable_prefix_caching is False:
        yield "rollout.enable_return_routed_experts needs rollout.vllm.enable_prefix_caching, with whose blocks vLLM keeps routes"
    if algorithm.sampling_params.temperature <= 0 and algorithm.sampling_params.do_sample:
        yield (
            f"algorithm.sampling_params.temperature ({algorithm.sampling_params.temperature}) must be greater than 0; "
            "do_sample=False decodes greedily"
        )
    kind = config.reward.reward_type
    if kind not in BUILT_IN_REWARDS and re.fullmatch(REWARD_FUNCTION, kind) is None:
        vqa = "; exact compares what is answered to questions about pictures" if kind == "vqa" else ""
        yield f"reward.reward_type is {kind!r}, expected {', '.join(BUILT_IN_REWARDS)}, or PATH.py:function for a function of your own{vqa}"
    wrong, correct = config.reward.reward_min_val, config.reward.reward_max_val
    if wrong >= correct:
        yield f"reward.reward_min_val ({wrong}) must be less than reward.reward_max_val ({correct})"


def _early_scoring(config: RunConfig) -> Iterator[str]:
    early, prompts = config.algorithm.early_scoring_prompts, config.data.rollout_batch_size
    if not early:
        return
    about = f"algorithm.early_scoring_prompts ({early})"
    if not config.algorithm.recompute_logprobs:
        yield f"{about} needs algorithm.recompute_logprobs=True, without which nothing is scored; set it to 0"
    if prompts % early:
        yield f"data.rollout_batch_size ({prompts}) must be divisible by algorithm.early_scoring_prompts ({early})"
    if config.runner.async_steps:
        yield f"{about} is for an actor that waits for the rollout, and with runner.async_steps it trains meanwhile; set one of them to 0"
    if config.actor.megatron.router_replay == "R2":
        yield f"{about} leaves no routes on the ranks, which actor.megatron.router_replay=R2 replays; set it to 0"


def _batches(config: RunConfig) -> Iterator[str]:
    algorithm, actor = config.algorithm, config.actor
    samples = config.data.rollout_batch_size * algorithm.group_size
    if samples % algorithm.n_minibatches:
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


def _engine(config: AnyConfig) -> Iterator[str]:
    yield from _batched_tokens(config) if config.has_engines else ()
    if config.rollout.pipeline_parallel_size != 1:
        yield f"rollout.pipeline_parallel_size ({config.rollout.pipeline_parallel_size}) must be 1"
    if config.has_engines and config.rollout.distributed_executor_backend == "ray":
        yield (
            "rollout.distributed_executor_backend=ray has Ray choose the GPUs of an engine's workers, which cluster.component_placement "
            "gives out, and on CPU vLLM has no such workers; set it to mp"
        )


# That vLLM's class LLM takes where it is told no number: on CPU, and more on each GPU.
LEAST_BATCHED_TOKENS = 4096


def _batched_tokens(config: AnyConfig) -> Iterator[str]:
    """What vLLM refuses when an engine starts: steps without room for a token of each request, or for a prompt that it may not cut."""
    vllm, requests, length = config.rollout.vllm, config.rollout.max_running_requests, config.runner.seq_length
    tokens = LEAST_BATCHED_TOKENS if vllm.max_num_batched_tokens is None else vllm.max_num_batched_tokens
    derived = ", the least that null is to vLLM" if vllm.max_num_batched_tokens is None else ""
    if tokens < requests:
        yield (
            f"rollout.vllm.max_num_batched_tokens ({tokens}{derived}) must be at least rollout.max_running_requests ({requests}): each "
            "takes a token of a step"
        )
    if vllm.enable_chunked_prefill is False and not derived and tokens < length:
        yield (
            f"rollout.vllm.max_num_batched_tokens ({tokens}) must be at least runner.seq_length ({length}) with "
            "rollout.vllm.enable_chunked_prefill=False, which has no prompt cut"
        )


def _actor(config: AnyConfig) -> Iterator[str]:
    actor, runner = config.actor, config.runner
    yield from _initial_weights(actor, resuming=runner.resume_dir is not None)
    yield from _from_random(config)
    yield from _schedule(actor)
    yield from _lora(config)
    model, optim = actor.model, actor.optim
    for flag, precision in ((optim.bf16, "bf16"), (optim.fp16, "fp16")):
        if flag and model.precision != precision:
            yield f"actor.optim.{precision}=True contradicts actor.model.precision={model.precision}"
    if model.precision == "fp16" and actor.megatron.check_for_nan_in_loss_and_grad:
        yield (
            "actor.megatron.check_for_nan_in_loss_and_grad=True ends a run at the first gradient that overflows, and the loss scaling of "
            "actor.model.precision=fp16 lets gradients overflow and skips such a step; leave it out"
        )
    etp, tp = model.expert_tensor_parallel_size, model.tensor_model_parallel_size
    if etp is not None and etp > tp and not actor.megatron.mbridge:
        yield f"actor.model.expert_tensor_parallel_size ({etp}) must be less than or equal to tensor_model_parallel_size ({tp})"
    if model.cp_comm_type is not None and model.context_parallel_size == 1:
        yield "actor.model.cp_comm_type needs actor.model.context_parallel_size > 1"
    if runner.packing == "on" and model.cp_comm_type not in (None, "p2p"):
        yield f"actor.model.cp_comm_type={model.cp_comm_type} takes no packed sequences; set it to p2p, or runner.packing to False"
    if model.sequence_parallel and tp == 1:
        yield "actor.model.sequence_parallel=True needs actor.model.tensor_model_parallel_size > 1"
    if model.virtual_pipeline_model_parallel_size is not None and model.pipeline_model_parallel_size == 1:
        yield "actor.model.virtual_pipeline_model_parallel_size needs actor.model.pipeline_model_parallel_size > 1"
    if runner.packing == "on" and model.moe_router_load_balancing_type == "seq_aux_loss" and model.moe_aux_loss_coeff:
        yield (
            "runner.packing=True packs sequences into one, and actor.model.moe_router_load_balancing_type seq_aux_loss balances each by "
            "itself; set it to aux_loss, or packing to False"
        )
    if model.recompute_granularity == "full" and (model.recompute_method is None or model.recompute_num_layers is None):
        yield "actor.model.recompute_granularity=full needs recompute_method and recompute_num_layers"
    if model.recompute_granularity == "selective" and model.recompute_num_layers is not None:
        yield (
            f"actor.model.recompute_num_layers ({model.recompute_num_layers}) is for recompute_granularity full, and selective takes all "
            "layers; leave it out"
        )
    stages = model.pipeline_model_parallel_size
    exchanges = "variable_seq_lengths=True" if model.variable_seq_lengths else f"pipeline_model_parallel_size {stages}"
    if (
        model.moe_token_dispatcher_type == "allgather"
        and (stages > 1 or model.variable_seq_lengths)
        and model.virtual_pipeline_model_parallel_size is None
    ):
        yield (
            f"actor.model.moe_token_dispatcher_type=allgather takes microbatches of one length, and the stages of {exchanges} exchange "
            "theirs; set it to alltoall"
        )
    if model.moe_token_dispatcher_type == "flex" and model.expert_model_parallel_size * (etp or 1) == 1:
        yield (
            "actor.model.moe_token_dispatcher_type=flex sends tokens to experts of other ranks, and expert_model_parallel_size and "
            "expert_tensor_parallel_size are 1; set it to alltoall"
        )
    if optim.overlap_param_gather and not (optim.use_distributed_optimizer and optim.overlap_grad_reduce):
        yield "actor.optim.overlap_param_gather=True needs use_distributed_optimizer and overlap_grad_reduce True"
    if optim.use_precision_aware_optimizer and not optim.use_distributed_optimizer:
        yield "actor.optim.use_precision_aware_optimizer=True needs use_distributed_optimizer=True"


def _initial_weights(actor: ActorConfig, *, resuming: bool) -> Iterator[str]:
    checkpoint = actor.model.megatron_checkpoint
    if actor.megatron.use_hf_ckpt and checkpoint is not None:
        yield "model.megatron_checkpoint should be None if use_hf_ckpt is True"
    if not actor.megatron.use_hf_ckpt and checkpoint is None and not resuming:
        yield "model.megatron_checkpoint is required if use_hf_ckpt is False"


def _from_random(config: AnyConfig) -> Iterator[str]:
    """A run that begins with random weights has none for anybody else."""
    if config.actor.megatron.convert_from_hf:
        return
    name, actor = "actor.megatron.convert_from_hf=False", config.actor
    if isinstance(config, RunConfig):
        yield f"{name} belongs to SFT (runner.task_type: sft), whose data.type text is pretraining; a reasoning run begins with a model"
    elif config.validation.generate:
        yield f"{name} gives engines no weights to start with; set validation.generate to False"
    if actor.lora.r:
        yield f"{name} beside actor.lora, whose base is a model; leave one of them out"
    if not actor.megatron.use_hf_ckpt:
        yield f"{name} beside actor.megatron.use_hf_ckpt=False, which begins with a Megatron checkpoint; leave one of them out"


def _lora(config: AnyConfig) -> Iterator[str]:
    actor, lora = config.actor, config.actor.lora
    if not lora.r:
        given = [f"actor.lora.{f.name}" for f in fields(lora) if getattr(lora, f.name) != f.default]
        if given:
            yield f"{', '.join(given)} without actor.lora.r, the rank of the adapters: give it, or leave out actor.lora"
        if config.weight_sync.lora != "merged":
            yield f"weight_sync.lora={config.weight_sync.lora} without actor.lora.r: there are no adapters to send; give their rank"
        return
    if config.weight_sync.lora == "adapter" and least_max_lora_rank(lora.r) is None:
        yield (
            f"actor.lora.r ({lora.r}) is beyond the adapters that vLLM holds (rank {MAX_LORA_RANKS[-1]}); lower it, or set "
            "weight_sync.lora to merged"
        )
    if actor.model.frozen:
        yield f"{', '.join(actor.model.frozen)} beside actor.lora, which trains its adapters alone; leave one of them out"
    rates = [f"actor.optim.{name}" for name, part in PART_RATES.items() if part in actor.optim.part_lr]
    if rates:
        yield f"{', '.join(rates)} beside actor.lora, whose adapters all have one rate; leave out one of them"
    if not actor.megatron.mbridge or not actor.megatron.use_hf_ckpt or actor.model.megatron_checkpoint is not None:
        yield (
            "actor.lora needs actor.megatron.mbridge and use_hf_ckpt True and no actor.model.megatron_checkpoint: the base comes from a "
            "Hugging Face folder, and Megatron checkpoints of such a run hold its adapters alone"
        )
    if actor.model.moe_router_bias_update_rate:
        yield "actor.model.moe_router_bias_update_rate changes the base, which actor.lora leaves as it is; leave one of them out"
    if config.rollout.validate_weight and lora.adapter_path is not None:
        yield "rollout.validate_weight compares engines with the base, to which actor.lora.adapter_path adds; leave one of them out"


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
    style, end = schedule.lr_decay_style, schedule.lr_decay_iters
    warmup = schedule.lr_warmup_iters if schedule.lr_warmup_fraction is None else int(schedule.lr_warmup_fraction * end)
    if style != "constant" and warmup >= end:
        yield f"actor.lr_sched: the warm-up ({warmup} steps) leaves nothing of lr_decay_iters ({end}) for the decay"
    last_phase = schedule.lr_wsd_decay_iters
    if style == "WSD" and (last_phase is None or last_phase > end):
        yield f"actor.lr_sched: lr_decay_style WSD needs lr_wsd_decay_iters ({last_phase}) from 1 to lr_decay_iters ({end})"
    top, floor = schedule.max_lr, schedule.min_lr
    assert top is not None and floor is not None, "load_config derives both"
    if floor > top:
        yield f"actor.lr_sched: min_lr ({floor}) must not exceed max_lr ({top}); they default to actor.optim.min_lr and actor.optim.lr"
    if schedule.lr_warmup_init > top:
        yield f"actor.lr_sched: lr_warmup_init ({schedule.lr_warmup_init}) must not exceed max_lr ({top})"
    for name, part in PART_RATES.items():
        rate = actor.optim.part_lr.get(part)
        if rate is not None and schedule.lr_warmup_init > rate:
            yield f"actor.lr_sched: lr_warmup_init ({schedule.lr_warmup_init}) must not exceed actor.optim.{name} ({rate})"
    first, last = decays
    if first is not None and last is not None and last < first:
        yield f"actor.lr_sched: end_weight_decay ({last}) must not be less than start_weight_decay ({first})"
    if first != last and schedule.weight_decay_incr_style == "constant" and None not in decays:
        yield f"actor.lr_sched: start_weight_decay ({first}) and end_weight_decay ({last}) differ, but weight_decay_incr_style is constant"


def raise_all(found: Iterable[str]) -> None:
    """Raise ConfigError with every finding, if there is one."""
    messages = list(found)
    if messages:
        raise ConfigError(messages[0] if len(messages) == 1 else "configuration:\n  " + "\n  ".join(messages))
