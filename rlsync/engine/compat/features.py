"""Features of a vLLM configuration that concern weights: what they are, and where they live. Each is honoured, or refused by name.

``REFUSALS`` has what a sync would get wrong, or what nobody has shown to come out right. ``CONSIDERED`` has every field of the config
classes that decide about weights, so that a field of a new version of vLLM is noticed: by a test for the installed version, and by a
warning at connect for others. Paths start at ``VllmConfig``; a path that a version lacks asks for nothing. Written against vLLM 0.25.1
and 0.32.0.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform

from rlsync.engine.handles.adapters import least_max_lora_rank
from rlsync.errors import ConfigError

_log = logging.getLogger(__name__)

# Loaders that end with checkpoint tensors in the model's own loaders, or with random values: what reload and recorder start from.
_LOAD_FORMATS = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "pt", "npcache", "dummy", "runai_streamer"})
# Methods that draft from the tokens so far and have no weights.
_DRAFTERS_WITHOUT_WEIGHTS = frozenset({"ngram", "ngram_gpu", "suffix"})
# Connectors that forget all keys and values when the prefix cache is reset. vLLM takes one that cannot for one that did.
_RESET_CONNECTORS = frozenset({"OffloadingConnector", "SimpleCPUOffloadConnector"})
# And where the first of them keeps these. Tiers behind host memory (TieringOffloadingSpec) keep what they have.
_RESET_OFFLOADING = frozenset({"CPUOffloadingSpec"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """A feature that an engine may not have.

    Attributes:
        path: attributes from ``VllmConfig`` to the value, with dots.
        asks: whether a value that is not None asks for the feature.
        reason: what a sync would get wrong.
        remedy: what to do.
    """

    path: str
    asks: Callable[[Any], bool]
    reason: str
    remedy: str


def _is_set(value: Any) -> bool:
    return True


_MOVED_EXPERTS = "moves logical experts to other slots and ranks while the engine runs, and a sync writes those recorded at connect"
_ON_HOST = "keeps weights in host memory, from where the engine copies them in its own time: what is written on the GPU may be overwritten"
_OTHER_MODEL = "lets the engine compute from another configuration than config.json, from which the actor is built"
_OLD_KEYS = "may bring keys and values back that former weights have computed: no commit makes it forget them"
_IN_CONFIG_JSON = "write the values into the config.json of the folder that actor and engine share"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("parallel_config.enable_eplb", bool, _MOVED_EXPERTS, "start the engine without enable_eplb"),
    Refusal("parallel_config.eplb_config.num_redundant_experts", bool, _MOVED_EXPERTS, "set num_redundant_experts to 0"),
    Refusal("parallel_config.enable_elastic_ep", bool, _MOVED_EXPERTS, "start the engine without enable_elastic_ep"),
    Refusal(
        "parallel_config.enable_fault_tolerance", bool,
        "lets an engine go on with fewer workers, and experts elsewhere, than were recorded at connect",
        "start the engine without enable_fault_tolerance",
    ),
    Refusal(
        "speculative_config.method", lambda method: method not in _DRAFTERS_WITHOUT_WEIGHTS,
        "has a draft model whose weights no sync renews: it would draft for the weights of the start",
        f"start the engine without speculative_config, or with method {', '.join(sorted(_DRAFTERS_WITHOUT_WEIGHTS))}",
    ),
    Refusal(
        "model_config.quantization", _is_set,
        "quantises weights, and no method is known whose scales come out of a sync as they come out of a load",
        "serve the model unquantised: no quantization argument, and no quantization_config in config.json",
    ),
    Refusal(
        "model_config.quantization_config", _is_set,
        "quantises weights, and no method is known whose scales come out of a sync as they come out of a load",
        "serve the model unquantised: no quantization_config",
    ),
    Refusal(
        "cache_config.calculate_kv_scales", bool,
        "computes scales of the cache once, from the weights of the first request, which no sync renews",
        "start the engine without calculate_kv_scales",
    ),
    Refusal("offload_config.uva.cpu_offload_gb", bool, _ON_HOST, "set cpu_offload_gb to 0"),
    Refusal("cache_config.cpu_offload_gb", bool, _ON_HOST, "set cpu_offload_gb to 0"),
    Refusal("offload_config.prefetch.offload_group_size", bool, _ON_HOST, "set offload_group_size to 0"),
    Refusal("engram_config", _is_set, "keeps embedding tables in host memory, which replicas share", "serve a model without engram tables"),
    Refusal(
        "ec_transfer_config", _is_set,
        "takes encoder outputs from other instances, which may have computed them from former weights",
        "start the engine without ec_transfer_config",
    ),
    Refusal(
        "kv_transfer_config.kv_connector", lambda name: name not in _RESET_CONNECTORS, _OLD_KEYS,
        f"start the engine without kv_transfer_config and kv_offloading_backend, or with {' or '.join(sorted(_RESET_CONNECTORS))}",
    ),
    Refusal(
        "kv_transfer_config.kv_connector_extra_config.spec_name", lambda name: name not in _RESET_OFFLOADING, _OLD_KEYS,
        f"offload with spec_name {' or '.join(sorted(_RESET_OFFLOADING))}, which is the default",
    ),
    Refusal(
        "kv_transfer_config.kv_connector_module_path", _is_set, _OLD_KEYS, "start the engine without kv_connector_module_path",
    ),
    Refusal(
        "load_config.load_format", lambda name: str(name) not in _LOAD_FORMATS,
        "brings weights into the model by another way than its own loaders, which a sync is recorded from",
        f"set load_format to one of {', '.join(sorted(_LOAD_FORMATS))}",
    ),
    Refusal("model_config.hf_overrides", lambda value: callable(value) or bool(value), _OTHER_MODEL, _IN_CONFIG_JSON),
    Refusal("model_config.hf_config_path", _is_set, _OTHER_MODEL, _IN_CONFIG_JSON),
    Refusal(
        "model_config.runner_type", lambda name: name != "generate",
        "answers without logits, by which alone an engine refuses to answer from half a sync",
        "start the engine with runner=generate",
    ),
    Refusal(
        "model_config.sleep_mode_backend", lambda name: name != "cumem",
        "may give weights other addresses when the engine wakes than were recorded at connect",
        "set sleep_mode_backend to cumem",
    ),
    Refusal(
        "compilation_config.inductor_compile_config.freezing", bool,
        "makes the weights of the start constants of the compiled model",
        "set freezing to False",
    ),
    Refusal(
        "compilation_config.inductor_compile_config.max_autotune", lambda value: bool(value) and current_platform.is_cpu(),
        "makes the weights of the start constants of the compiled model, on CPU",
        "set max_autotune to False",
    ),
)  # fmt: skip


# Of an engine that adapters are synced to.
_LORA_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "lora_config.max_loras", lambda slots: slots < 2,
        "has no second slot, into which a version goes while requests still run on the one before",
        "start the engine with max_loras=2",
    ),
    Refusal(
        "lora_config.fully_sharded_loras", bool,
        "cuts adapters in a way that nobody has shown to come out right", "start the engine without fully_sharded_loras",
    ),
    Refusal(
        "lora_config.enable_moe_shared_loras", bool,
        "has one factor for all experts, and each has its own", "start the engine without enable_moe_shared_loras",
    ),
    Refusal(
        "lora_config.enable_mixed_moe_lora_format", bool,
        "holds adapters of experts in a way that nobody has shown to come out right",
        "start the engine without enable_mixed_moe_lora_format",
    ),
    Refusal(
        "parallel_config._api_process_count", lambda count: count > 1,
        "has several processes that take requests, and a version of adapters is made known to one of them",
        "start the server with --api-server-count=1",
    ),
    Refusal(
        "lora_config.default_mm_loras", bool,
        "has requests with pictures run on adapters of its own", "start the engine without default_mm_loras",
    ),
)  # fmt: skip


def against_adapters(vllm_config: Any, r: int | None, *, serves_adapters: bool) -> tuple[str, ...]:
    """Sentences where an engine has slots for adapters and gets none, or cannot take those that it gets; for ``check``.

    Args:
        r: rank of the adapters that are synced to it; None where its actor sends weights alone.
        serves_adapters: whether its handle has requests run on them.
    """
    config = vllm_config.lora_config
    if r is None and config is None:
        return ()
    if r is None:
        return (
            "lora_config wraps layers and keeps adapters of the former weights beside them, which a sync of weights does not renew; start "
            "the engine without enable_lora, or sync adapters with weight_sync.lora=adapter",
        )
    if config is None:
        return (
            f"it has no slots for the adapters of rank {r} that weight_sync.lora=adapter sends; start it with enable_lora=True, "
            f"max_loras=2, max_lora_rank={least_max_lora_rank(r)}, or sync merged weights with weight_sync.lora=merged",
        )
    found = list(_found(vllm_config, _LORA_REFUSALS))
    if r > config.max_lora_rank:
        found.append(
            f"lora_config.max_lora_rank={config.max_lora_rank} is less than the adapters' rank {r}; start the engine with "
            f"max_lora_rank={least_max_lora_rank(r)}"
        )
    if not serves_adapters:
        found.append(
            "its server has no routes by which requests come to adapters; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, or sync merged "
            "weights with weight_sync.lora=merged"
        )
    return tuple(found)


def check(vllm_config: Any, more: Sequence[str] = ()) -> None:
    """Raise one ConfigError for all refused features of a configuration, and for ``more``, which the caller has found; warn of settings
    that are not in ``CONSIDERED``."""
    found = (*refusals(vllm_config), *more)
    if found:
        raise ConfigError("this engine cannot be synced: " + "; ".join(found))
    unknown = unconsidered(vllm_config)
    if unknown:
        _log.warning(
            "this version of vLLM has settings that rlsync does not know, set to %s; check a synced engine with `rlsync verify`",
            ", ".join(unknown),
        )


def refusals(vllm_config: Any) -> tuple[str, ...]:
    """One sentence for each refused feature of a configuration."""
    return tuple(_found(vllm_config, REFUSALS))


def _found(vllm_config: Any, rows: Iterable[Refusal]) -> Iterator[str]:
    for row in rows:
        value = _value(vllm_config, row.path)
        if value is not None and row.asks(value):
            shown = "" if dataclasses.is_dataclass(value) or callable(value) else f"={value}"
            yield f"{row.path}{shown} {row.reason}; {row.remedy}"


def unconsidered(vllm_config: Any) -> tuple[str, ...]:
    """``path=value`` of fields that no list knows and that differ from their default."""
    found = []
    for owner, known in CONSIDERED.items():
        config = _value(vllm_config, owner) if owner else vllm_config
        for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
            value = getattr(config, field.name, None)
            if field.name not in known and not field.name.startswith("_") and value != _default(field):
                found.append(f"{f'{owner}.' if owner else ''}{field.name}={value!r}")
    return tuple(found)


def _default(field: Any) -> Any:
    """Of a dataclass field, a pydantic one too."""
    if hasattr(field.default, "get_default"):
        return field.default.get_default(call_default_factory=True)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _value(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return config


def _names(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# Owner, by path -> the names of its fields: refused above, honoured because of what is said, or without a bearing on weights.
CONSIDERED: Mapping[str, frozenset[str]] = {
    "": _names(
        # Below, or refused above; adapters are checked where it is known whether the actor sends any.
        "model_config parallel_config load_config offload_config lora_config speculative_config engram_config ec_transfer_config",
        # What `quantization` says and a quantised checkpoint says is in model_config; the object is made of it.
        "quant_config",
        # Kernels and compiled graphs: each layer is judged by what it holds and computes with, and graphs keep its addresses.
        "kernel_config compilation_config attention_config mamba_config optimization_level performance_mode",
        # Caches: forgotten after every commit, or, behind a connector that does not forget, refused.
        "cache_config kv_transfer_config kv_events_config ec_manager_config",
        "weight_transfer_config device_config",
        "scheduler_config aux_output_config watermark_config diffusion_config structured_outputs_config observability_config",
        "logging_config profiler_config reasoning_config additional_config instance_id shutdown_timeout",
    ),
    "model_config": _names(
        "quantization quantization_config allow_deprecated_quantization hf_overrides hf_config_path runner convert sleep_mode_backend",
        # The live model is recorded, whatever class, folder or format it came from.
        "model model_weights model_impl model_class_overrides hf_config hf_text_config word_embeddings_untied_by_checkpoint",
        "is_submodel_config trust_remote_code revision code_revision config_format multimodal_config",
        # Copies cast.
        "dtype",
        # Addresses survive cumem's sleep, and a sync writes what level 2 has dropped, or kept.
        "enable_sleep_mode sleep_preserve_parameter_names sleep_mode_offload_cudagraph enable_cumem_allocator enable_nccl_comm_suspend",
        "tokenizer tokenizer_mode tokenizer_revision skip_tokenizer_init seed allowed_local_media_path allowed_media_domains",
        "max_model_len spec_target_max_model_len enforce_eager return_sampling_mask max_logprobs logprobs_mode use_fp64_gumbel",
        "enable_trace_replay disable_sliding_window disable_cascade_attn enable_prompt_embeds served_model_name hf_token",
        "enable_return_routed_experts",
        "generation_config override_generation_config logits_processors io_processor_plugin renderer_num_workers pooler_config",
    ),
    "parallel_config": _names(
        "enable_eplb eplb_config enable_elastic_ep elastic_ep_max_dp_size enable_fault_tolerance fault_tolerance_config",
        # Which pieces a worker holds is recorded in that worker, and does not change without what is refused.
        "pipeline_parallel_size tensor_parallel_size prefill_context_parallel_size decode_context_parallel_size dcp_q_replicate",
        "data_parallel_size data_parallel_size_local data_parallel_rank data_parallel_rank_local data_parallel_index is_moe_model",
        "enable_expert_parallel expert_placement_strategy world_size rank node_rank nnodes",
        # Concerns files, which a sync does not read.
        "enable_ep_weight_filter max_parallel_loading_workers",
        "data_parallel_master_ip data_parallel_rpc_port dp_sync_interval data_parallel_master_port data_parallel_backend",
        "data_parallel_external_lb data_parallel_hybrid_lb enable_hc_sp enable_batch_sharded_sampling all2all_backend",
        "disable_custom_all_reduce enable_shm_tensor_arena enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold",
        "disable_nccl_for_dp_synchronization ray_workers_use_nsight ray_runtime_env placement_group distributed_executor_backend",
        "worker_cls worker_extension_cls master_addr master_port numa_bind numa_bind_nodes numa_bind_cpus assigned_physical_gpu_ids",
        "distributed_timeout_seconds cpu_distributed_timeout_seconds dcp_kv_cache_interleave_size dcp_comm_backend",
        "cp_kv_cache_interleave_size",
    ),
    "parallel_config.eplb_config": _names(
        # Nothing without enable_eplb, which is refused.
        "num_redundant_experts window_size step_interval log_balancedness log_balancedness_interval use_async policy communicator",
        "enable_migration_batching",
    ),
    "cache_config": _names(
        "calculate_kv_scales cpu_offload_gb",
        # What was computed for requests, which no commit leaves; scales are those of the model, which are recorded.
        "block_size user_specified_block_size kv_cache_layout prefix_match_unit gpu_memory_utilization cache_dtype is_attention_free",
        "num_gpu_blocks_override sliding_window enable_prefix_caching prefix_caching_hash_algo prefix_cache_retention_interval",
        "kv_cache_dtype_skip_layers mamba_page_size_padded skip_page_size_padded mamba_block_size mamba_cache_dtype",
        "mamba_ssm_cache_dtype mamba_cache_mode enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm",
        "use_kda_recoverssm num_gpu_blocks num_cpu_blocks effective_attention_block_size kv_cache_size_tokens kv_cache_max_concurrency",
        "hash_block_size cache_hit_alignment_tokens kv_sharing_fast_prefill swa_bounded_replay kv_cache_memory_bytes kv_offloading_size",
        "kv_offloading_backend",
    ),
    "load_config": _names(
        "load_format model_loader_extra_config",
        # Concern files, which a sync does not read, and where tensors stand for a moment before they are loaded.
        "download_dir safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size device ignore_patterns",
        "use_tqdm_on_load pt_load_map_location",
    ),
    "offload_config": _names("offload_backend uva prefetch"),
    "offload_config.uva": _names(
        "cpu_offload_gb",
        # Nothing without cpu_offload_gb.
        "cpu_offload_params",
    ),
    "offload_config.prefetch": _names(
        "offload_group_size",
        # Nothing without offload_group_size.
        "offload_num_in_group offload_prefetch_step offload_params",
    ),
    "weight_transfer_config": _names("backend"),
}
