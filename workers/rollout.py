"""The engines of a run: their Ray actor, and arguments of vLLM and of sampling from the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlsync.engine.handles.adapters import lora_arguments
from rlsync.engine.handles.ray import EngineActor
from rlsync.errors import RlsyncError
from rlsync.models import Model
from workers.config import AnyConfig, RunConfig
from workers.gpus import device_memory_gb
from workers.metrics import host_memory_gb
from workers.worker_logs import first_error, keep_own_log, log_size, own_log

# vLLM adds it to a logit; more it does not take.
_NEVER = -100.0
_LOGPROBS_EVERY = 8
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class RolloutEngine(EngineActor):
    """The engine actor of a run: prints to a log of its own, and errors say what vLLM printed there."""

    def __init__(self, engine_id: str, engine_args: Mapping[str, Any]) -> None:
        keep_own_log()
        super().__init__(engine_id, engine_args)

    def memory(self) -> dict[str, float]:
        """Memory metrics of the engine's processes and devices in 10^9 bytes."""
        device = device_memory_gb()
        return {
            "perf/engine_host_memory_gb": host_memory_gb(self._engine.process_ids),
            **({} if device is None else {"perf/device_memory_gb": device}),
        }

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """vLLM's own exception often says only that a process of its failed; that process printed why."""
        log = own_log()
        before = log_size(log)
        try:
            yield
        except RlsyncError:
            raise
        except Exception as error:
            printed = first_error(log, before)
            cause = "" if printed is None or printed in str(error) else f"\nfirst error it printed: {printed}"
            raise RlsyncError(
                f"engine {self._engine.engine_id} could not {what}: {type(error).__name__}: {error}{cause}\nits log: {log}"
            ) from error


def engine_arguments(config: AnyConfig, *, on_gpu: bool, can_sleep: bool = False, takes_pictures: bool = False) -> dict[str, Any]:
    """Fields of ``vllm.AsyncEngineArgs`` for the engines of a run; null keys are left to vLLM.

    ``can_sleep`` puts their memory where it can be given back; ``takes_pictures``: the model does, for which vLLM needs the tokenizer.
    """
    rollout, vllm = config.rollout, config.rollout.vllm
    # As validate_machine says.
    no_chunks = not on_gpu and isinstance(config, RunConfig) and config.algorithm.sampling_params.seeded
    assert rollout.model.precision is not None, "load_config derives it"
    wanted: dict[str, Any] = {
        "model": rollout.model.model_path,
        "tokenizer": config.actor.tokenizer.tokenizer_model,
        "trust_remote_code": rollout.model.trust_remote_code,
        "dtype": _DTYPES[rollout.model.precision],
        # Real weights only where they are compared with the first sync; else they would be read twice.
        "load_format": "auto" if rollout.validate_weight else "dummy",
        "skip_tokenizer_init": not (rollout.detokenize or takes_pictures),
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "enable_expert_parallel": vllm.enable_expert_parallel or None,
        "distributed_executor_backend": rollout.distributed_executor_backend if rollout.tensor_parallel_size > 1 else None,
        "enforce_eager": rollout.enforce_eager,
        "max_model_len": config.runner.seq_length,
        "max_num_seqs": rollout.max_running_requests,
        "max_num_batched_tokens": vllm.max_num_batched_tokens,
        "num_gpu_blocks_override": vllm.num_gpu_blocks_override,
        "enable_prefix_caching": vllm.enable_prefix_caching,
        "enable_chunked_prefill": False if no_chunks else vllm.enable_chunked_prefill,
        "disable_log_stats": rollout.disable_log_stats,
        "seed": config.actor.seed,
        # Temperature included, so that they can be compared with the actor's.
        "logprobs_mode": "processed_logprobs",
    }
    if takes_pictures:
        # Otherwise an engine would see other pictures than the actor is trained on.
        limits = {"min_pixels": config.data.min_pixels, "max_pixels": config.data.max_pixels}
        wanted["mm_processor_kwargs"] = {name: value for name, value in limits.items() if value is not None} or None
    if rollout.enable_return_routed_experts:
        wanted["enable_return_routed_experts"] = True
    if config.weight_sync.lora == "adapter":
        wanted |= lora_arguments(config.actor.lora.r)
    if can_sleep:
        wanted["enable_sleep_mode"] = True
    if on_gpu:
        wanted["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        wanted["kv_cache_memory_bytes"] = vllm.kv_cache_memory_bytes
        if rollout.cuda_graph_max_bs is not None:
            wanted["compilation_config"] = {"max_cudagraph_capture_size": rollout.cuda_graph_max_bs}
        if vllm.attention_backend is not None:
            wanted["attention_config"] = {"backend": vllm.attention_backend}
    return {name: value for name, value in wanted.items() if value is not None}


def sampling_arguments(config: RunConfig, *, model: Model, stop_token_ids: Sequence[int], validation: bool = False) -> dict[str, Any]:
    """Fields of ``vllm.SamplingParams`` for the rollouts of a run; ``n`` is 1 where greedy, as all samples would be the same.

    Log-probabilities are asked for where ``rollout.return_logprobs`` is true. ``validation``: for one greedy response to each prompt,
    without them. Tokens that stand for pictures are never drawn.
    """
    vision = model.vision
    never = {} if vision is None else dict.fromkeys(vision.placeholders, _NEVER)
    sampling = config.algorithm.sampling_params
    greedy = validation or not sampling.do_sample
    return {
        "n": 1 if greedy else config.algorithm.group_size,
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_k": 0 if sampling.top_k >= model.dims["vocab"] else sampling.top_k,
        "top_p": sampling.top_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": list(stop_token_ids),
        "logprobs": 0 if config.rollout.return_logprobs and not validation else None,
        "detokenize": config.rollout.detokenize,
        "logit_bias": never or None,
    }


def some_with_logprobs(sampling: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Sampling fields of each of an engine's ``count`` prompts, of which every eighth, from the first, is asked for log-probabilities.
    Asked of all they have vLLM's processes make and send objects for every token, which takes a small model's rollouts half as long
    again."""
    asked = {**sampling, "logprobs": 0}
    return [sampling if number % _LOGPROBS_EVERY else asked for number in range(count)]


def reshaping(config: RunConfig, *, vocab_size: int) -> tuple[str, ...]:
    """Sampling keys that make the engines draw from another distribution than the actor scores: their log-probabilities differ then."""
    sampling = config.algorithm.sampling_params
    found = {
        "top_k": sampling.do_sample and 0 < sampling.top_k < vocab_size,
        "top_p": sampling.do_sample and sampling.top_p < 1,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_new_tokens": sampling.min_new_tokens > 0,
    }
    return tuple(name for name, does in found.items() if does)
