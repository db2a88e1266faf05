"""Rules between a run configuration and the machine that it runs on: what needs GPUs, or packages beside them, where there are none.

Pure: whoever calls says what the machine has. Rules between keys alone are in ``validate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlsync.models import model_of
from workers.config.grpo import RunConfig
from workers.config.tasks import AnyConfig
from workers.config.validate import raise_all

# Sizes of a head, and of a token's cache under latent attention, that vLLM's kernels for CPU have.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_LATENT_SIZES = (576,)


def validate_machine(config: AnyConfig, *, on_gpu: bool, is_installed: Callable[[str], bool] | None = None) -> None:
    """Raise ConfigError for what needs GPUs, or packages beside them, where there are none.

    ``is_installed`` None: that of packages is not known, as on the nodes of a cluster; a rank then finds out when it has started.
    """
    if not on_gpu:
        raise_all(_asks_for_gpus(config))
    elif is_installed is not None:
        raise_all(_asks_for_packages(config, is_installed))


def _asks_for_gpus(config: AnyConfig) -> Iterator[str]:
    actor, rollout = config.actor, config.rollout
    if actor.spec_name == "te_gpt":
        yield "actor.spec_name te_gpt is TransformerEngine's layers, which need GPUs, and there are none; set it to decoder_gpt"
    if actor.optim.optimizer_cpu_offload:
        yield (
            "actor.optim.optimizer_cpu_offload=True moves the optimizer's state from GPUs to the host, and there are none; set it to False"
        )
    if actor.optim.use_precision_aware_optimizer:
        yield "actor.optim.use_precision_aware_optimizer=True needs GPUs with TransformerEngine, and there are none; set it to False"
    if actor.model.moe_token_dispatcher_type == "flex":
        yield "actor.model.moe_token_dispatcher_type flex is DeepEP's, which needs GPUs, and there are none; set it to alltoall"
    if actor.megatron.distributed_backend == "nccl":
        yield "actor.megatron.distributed_backend nccl needs GPUs, and there are none; set it to null, which is gloo then"
    if not config.has_engines:
        return
    if config.weight_sync.transport in ("ipc", "nccl"):
        yield f"weight_sync.transport {config.weight_sync.transport} is between GPUs, and there are none; set it to auto"
    # The draw after a part of a prompt is taken back, which ends vLLM 0.32 with "CPU Generator does not use offset".
    if rollout.vllm.enable_chunked_prefill and isinstance(config, RunConfig) and config.algorithm.sampling_params.seeded:
        yield (
            "rollout.vllm.enable_chunked_prefill=True ends vLLM on CPU with algorithm.sampling_params.seeded=True; set one of them to False"
        )
    tokens, length = rollout.vllm.max_num_batched_tokens, config.runner.seq_length
    is_whole = rollout.vllm.enable_chunked_prefill is None and isinstance(config, RunConfig) and config.algorithm.sampling_params.seeded
    if is_whole and tokens is not None and tokens < length:
        yield (
            f"rollout.vllm.max_num_batched_tokens ({tokens}) must be at least runner.seq_length ({length}) on CPU with "
            "algorithm.sampling_params.seeded=True, with which no prompt is cut"
        )
    if rollout.vllm.enable_expert_parallel:
        yield (
            "rollout.vllm.enable_expert_parallel=True: engines that share experts compute on GPUs alone, and there are none (on CPU vLLM's "
            "workers end at their first request); set it to False"
        )
    if rollout.enable_return_routed_experts:
        yield (
            "rollout.enable_return_routed_experts, which actor.megatron.router_replay=R3 needs, is of engines on GPUs: vLLM returns routes "
            "by its second model runner alone, which needs Triton; R2 does without"
        )


def _asks_for_packages(config: AnyConfig, is_installed: Callable[[str], bool]) -> Iterator[str]:
    actor = config.actor
    asked = (
        ("actor.spec_name te_gpt", actor.spec_name == "te_gpt", "transformer_engine", "decoder_gpt"),
        ("actor.optim.use_precision_aware_optimizer=True", actor.optim.use_precision_aware_optimizer, "transformer_engine", "False"),
        ("actor.model.moe_token_dispatcher_type flex", actor.model.moe_token_dispatcher_type == "flex", "deep_ep", "alltoall"),
    )
    for key, is_set, package, otherwise in asked:
        if is_set and not is_installed(package):
            yield f"{key} needs the package {package}, which is not installed here; install it, or set the key to {otherwise}"
    size = actor.model.context_parallel_size
    if is_installed("transformer_engine") and actor.spec_name != "local_gpt" and actor.model.precision == "fp32" and size > 1:
        yield (
            f"actor.model.precision fp32 under context_parallel_size {size}: TransformerEngine's attention does not compute it; set it to "
            "bf16, or actor.spec_name to local_gpt"
        )


def validate_engines_on_machine(config: AnyConfig, hf_config: Mapping[str, Any], *, on_gpu: bool) -> None:
    """Raise ConfigError for what vLLM cannot compute of the model of an HF ``config.json`` that a family reads, where there are no GPUs."""
    if config.has_engines and not on_gpu:
        raise_all(_beyond_engines_on_cpu(config, hf_config))


def _beyond_engines_on_cpu(config: AnyConfig, hf_config: Mapping[str, Any]) -> Iterator[str]:
    model = model_of(hf_config)
    if "num_experts" in model.dims and config.weight_sync.lora == "adapter":
        yield (
            f"weight_sync.lora=adapter: {model.architecture} has experts, which vLLM computes beside adapters by Triton kernels alone, and "
            "there are no GPUs; set it to merged"
        )
    latent = model.dims.get("kv_down")
    size, known = (model.dims["head_dim"], CPU_HEAD_SIZES) if latent is None else (latent, CPU_LATENT_SIZES)
    if size not in known:
        what = "heads of" if latent is None else "kv_lora_rank + qk_rope_head_dim of"
        yield (
            f"{config.model_path}/config.json: {what} {size}, which vLLM's attention on CPU does not compute; it has "
            f"{', '.join(map(str, known))}"
        )
    if latent is not None and model.rope.yarn is None:
        yield (
            f"{config.model_path}/config.json: latent attention without yarn, whose queries vLLM's kernel on CPU turns wrongly: engines "
            "would answer otherwise than the actor"
        )
