"""Keys that GRPO yamls written for other runners carry and that have no effect here.

Owns the list, the reason for each, and for switches the values that mean "off"; switching such a feature on is an
error, not a warning. Shipped yamls contain none of these keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rlsync.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Inert:
    """Keys (shell patterns on the dotted name, each also covering everything below it) without effect, and why.

    ``only`` lists the accepted values; empty accepts every value.
    """

    patterns: tuple[str, ...]
    reason: str
    only: tuple[Any, ...] = ()

    def covers(self, dotted: str) -> bool:
        return any(fnmatchcase(dotted, pattern) or fnmatchcase(dotted, f"{pattern}.*") for pattern in self.patterns)


_HF = "taken from the Hugging Face config"
_OFF = (False, None)

INERT = (
    Inert(("rollout.sglang", "rollout.weight_reload"), "SGLang only; engines are vLLM"),
    Inert(("cluster.auto_scheduler",), "automatic scheduling is not supported", _OFF),
    Inert(
        ("cluster.use_pre_process_policy", "cluster.use_wait_before_last_iter_policy", "cluster.recreate_nccl_groups"),
        "automatic scheduling only",
    ),
    Inert(("cluster.profiling", "cluster.tracer"), "no cluster profiler"),
    Inert(
        (
            "algorithm.rollout_batch_size_per_gpu",
            "algorithm.val_rollout_batch_size_per_gpu",
            "data.val_rollout_batch_size",
            "data.validation_shuffle",
        ),
        "no validation rollout is run and engines schedule their own batches",
    ),
    Inert(("algorithm.max_num_gen_batches",), "raise data.rollout_batch_size instead", (1, None)),
    Inert(("algorithm.use_valid_token_scale",), "token losses are always averaged over the valid tokens of the whole mini-batch"),
    Inert(("algorithm.use_reinpp_baseline", "algorithm.reinpp_kl_beta"), "adv_type grpo only", (*_OFF, 0.0)),
    Inert(("rollout.padding", "rollout.eos", "rollout.validate_save_dir"), "set by the tokenizer and the results folder"),
    Inert(("data.process_workers", "data.process_batch_size"), "prompts are tokenised in batches by the fast tokenizer"),
    Inert(
        (
            "actor.mcore_gpt",
            "actor.model.add_bias_linear",
            "actor.model.activation",
            "actor.model.normalization",
            "actor.model.position_embedding_type",
            "actor.model.seq_length",
            "actor.model.encoder_seq_length",
            "actor.model.max_position_embeddings",
            "actor.model.moe_router_topk",
            "actor.model.multi_latent_attention",
            "actor.model.add_qkv_bias",
            "actor.model.qk_layernorm",
            "actor.model.model_type",
        ),
        _HF,
    ),
    Inert(("actor.model.is_lora",), "LoRA is not supported", _OFF),
    Inert(("actor.model.mcore_customization_config",), "set the TransformerConfig field by its own key", (None, {})),
    Inert(("data.dataset_name",), "a label; runner.experiment_name names the run"),
    Inert(("rollout.vllm.enable_flash_infer_sampler",), "vLLM reads VLLM_USE_FLASHINFER_SAMPLER from the environment"),
    Inert(("rollout.vllm.torch_profiler_dir",), "no profiler in the engines", (None,)),
    Inert(
        ("actor.model.freeze_language_model", "actor.model.freeze_vision_model", "actor.model.freeze_vision_projection"),
        "no vision-language models",
        _OFF,
    ),
    Inert(("actor.model.moe_grouped_gemm",), "expert weights are laid out by the installed Megatron spec"),
    Inert(("actor.optim.overlap_param_gather_with_optimizer_step",), "not supported", _OFF),
    Inert(("actor.megatron.no_load_rng", "actor.megatron.no_save_rng"), "random-number state travels with the weights", _OFF),
    Inert(("actor.calculate_flops",), "no FLOP counter", _OFF),
    Inert(("actor.optim.optimizer_enable_pin",), "offload buffers are always pinned"),
    Inert(
        ("actor.megatron.tp_comm_bootstrap_backend", "actor.megatron.tp_comm_overlap_cfg"),
        "no communication overlap in TransformerEngine",
    ),
    Inert(("actor.megatron.use_profiler",), "no profiler in the actor", _OFF),
    Inert(("actor.megatron.profiler",), "no profiler in the actor"),
    Inert(("actor.megatron.ckpt_format",), "checkpoints are rank shards", ("torch", None)),
    Inert(
        ("actor.megatron.use_dist_ckpt", "actor.megatron.ckpt_fully_parallel_save", "actor.megatron.async_save"),
        "checkpoints are rank shards",
        _OFF,
    ),
    Inert(
        ("actor.megatron.exit_on_missing_checkpoint", "actor.megatron.finetune", "actor.megatron.train_iters"),
        "runner.resume_dir and runner.max_steps decide",
    ),
    Inert(
        tuple(
            f"actor.megatron.ckpt_convertor.{name}"
            for name in (
                "model",
                "use_gpu_num",
                "use_gpu_index",
                "process_num",
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "expert_model_parallel_size",
                "expert_tensor_parallel_size",
                "grouped_gemm",
                "te_*",
            )
        ),
        "the conversion follows the HF config and the actor's own layout",
    ),
    Inert(("reward.use_reward_model",), "reward models are not supported", _OFF),
    Inert(("reward.use_prompt", "reward.tokenizer"), "the verifier reads the response only"),
    Inert(("critic.use_critic_model",), "GRPO has no critic", _OFF),
    Inert(("critic",), "GRPO has no critic"),
    Inert(("inference",), "the actor recomputes log-probabilities itself"),
)


def find_inert(dotted: str) -> Inert | None:
    """The first entry that covers a dotted key, or None."""
    return next((entry for entry in INERT if entry.covers(dotted)), None)


def inert_reason(dotted: str, value: Any) -> str | None:
    """Why a key, or a section with all its keys, has no effect here; None when it is not a known one.

    Raises:
        ConfigError: it switches on a feature that is not supported.
    """
    reason = None
    for name, leaf in _leaves(dotted, value):
        entry = find_inert(name)
        if entry is None:
            return None
        if entry.only and leaf not in entry.only:
            raise ConfigError(f"{name}={leaf!r}: {entry.reason}; set it to {entry.only[0]!r} or remove it")
        reason = entry.reason
    return reason


def _leaves(dotted: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{dotted}.{name}", inner)
    else:
        yield dotted, value
