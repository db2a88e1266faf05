"""Keys that are not ours: those that other runners' yamls carry and that have no effect here, and what to write in place of the rest.

Owns the list of inert keys with the reason for each, the values of switches that mean "off" (switching such a feature on is an error, not
a warning), and the hints: the nearest key by meaning, or why a feature is not there. Shipped yamls contain no inert key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rlsync.errors import ConfigError
from rlsync.models import REFUSED_SWITCHES
from workers.config.fields import Task, dotted_keys
from workers.config.tasks import CONFIG_OF_TASK


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
        "validation sees every problem of data.val_data_paths in file order, and engines schedule their own batches",
    ),
    Inert(("algorithm.max_num_gen_batches",), "raise data.rollout_batch_size instead", (1, None)),
    Inert(("algorithm.use_valid_token_scale",), "token losses are always averaged over the valid tokens of the whole mini-batch"),
    Inert(("algorithm.use_reinpp_baseline", "algorithm.reinpp_kl_beta"), "adv_type grpo only", (*_OFF, 0.0)),
    Inert(("rollout.padding", "rollout.eos", "rollout.validate_save_dir"), "set by the tokenizer and the results folder"),
    Inert(("data.process_workers", "data.process_batch_size"), "prompts are tokenised in batches by the fast tokenizer"),
    Inert(("data.use_chat_template",), "data.apply_chat_template decides"),
    Inert(("data.lazy_loading",), "data.type vlm reads rows when their turn comes, the others before the first step"),
    Inert(("data.solution_key",), "references are in data.answer_key; a reward function gets all fields of a row", (None,)),
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
    Inert(("actor.model.is_lora",), "actor.lora.r above 0 is LoRA", _OFF),
    *(Inert((f"actor.model.{name}",), why, _OFF) for name, why in REFUSED_SWITCHES.items()),
    Inert(("actor.model.mcore_customization_config",), "set the TransformerConfig field by its own key", (None, {})),
    Inert(("data.dataset_name",), "a label; runner.experiment_name names the run"),
    Inert(("rollout.vllm.enable_flash_infer_sampler",), "vLLM reads VLLM_USE_FLASHINFER_SAMPLER from the environment"),
    Inert(("rollout.vllm.torch_profiler_dir",), "no profiler in the engines", (None,)),
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
    Inert(("actor.megatron.use_dist_ckpt",), "checkpoints are rank shards", _OFF),
    Inert(("actor.megatron.ckpt_fully_parallel_save",), "all ranks write side by side, always"),
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
    Inert(("reward.group_name",), "reward processes are no Ray actors"),
    Inert(("reward.use_reward_model",), "reward models are not supported", _OFF),
    Inert(("reward.use_prompt", "reward.tokenizer"), "the verifier reads the response only"),
    Inert(("critic.use_critic_model",), "GRPO has no critic", _OFF),
    Inert(("critic",), "GRPO has no critic"),
    Inert(("inference",), "the actor recomputes log-probabilities itself"),
)


# Of RLinf's SFT configurations; these come before those of ``INERT``.
INERT_IN_SFT = (
    Inert(("algorithm.adv_type", "algorithm.loss_type"), "supervised fine-tuning has neither rewards nor advantages"),
    Inert(
        ("algorithm.sampling_params.temperature",),
        "it would divide the logits in training, so that the model answers as it was taught at that temperature only; "
        "answers of the validation are greedy",
        (1.0, None),
    ),
    Inert(("critic.use_critic_model",), "supervised fine-tuning has no critic", _OFF),
    Inert(("critic",), "supervised fine-tuning has no critic"),
    Inert(("actor.model.seq_length",), "it is runner.seq_length here, which takes its value from it"),
    Inert(("data.lazy_loading",), "rows are always read when their turn comes"),
    Inert(("data.max_prompt_length",), "runner.seq_length bounds prompt and answer together"),
    Inert(("data.answer_separator",), "an answer follows the chat template's prompt for it", ("", None)),
)


def find_inert(dotted: str, task: Task = "reasoning") -> Inert | None:
    """The first entry that covers a dotted key, or None."""
    return next((entry for entry in (*(INERT_IN_SFT if task == "sft" else ()), *INERT) if entry.covers(dotted)), None)


def inert_reason(dotted: str, value: Any, task: Task = "reasoning") -> str | None:
    """Why a key, or a section with all its keys, has no effect here; None when it is not a known one.

    Raises:
        ConfigError: it switches on a feature that is not supported.
    """
    reason = None
    for name, leaf in _leaves(dotted, value):
        entry = find_inert(name, task)
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


# Last part, or last parts, of a key elsewhere (verl, TRL, ms-swift) -> ours.
OTHER_NAMES = {
    "actor_rollout_ref.model.path": "rollout.model.model_path",
    "model.path": "rollout.model.model_path",
    "model": "rollout.model.model_path",
    "model_name_or_path": "rollout.model.model_path",
    "optim.lr": "actor.optim.lr",
    "lr": "actor.optim.lr",
    "learning_rate": "actor.optim.lr",
    "lr_warmup_steps": "actor.lr_sched.lr_warmup_iters",
    "warmup_steps": "actor.lr_sched.lr_warmup_iters",
    "warmup_ratio": "actor.lr_sched.lr_warmup_fraction",
    "lr_scheduler_type": "actor.lr_sched.lr_decay_style",
    "max_grad_norm": "actor.optim.clip_grad",
    "rollout.n": "algorithm.group_size",
    "rollout.backend": "rollout.rollout_backend",
    "rollout.model_dir": "rollout.model.model_path",
    "logger.path": "runner.logger.log_path",
    "num_generations": "algorithm.group_size",
    "ppo_mini_batch_size": "algorithm.n_minibatches",
    "ppo_micro_batch_size_per_gpu": "algorithm.training_batch_size_per_gpu",
    "per_device_train_batch_size": "algorithm.training_batch_size_per_gpu",
    "log_prob_micro_batch_size_per_gpu": "algorithm.logprob_forward_micro_batch_size",
    "ppo_max_token_len_per_gpu": "runner.max_tokens_per_mbs",
    "log_prob_max_token_len_per_gpu": "algorithm.logprob_forward_max_tokens",
    "use_dynamic_bsz": "runner.enable_dynamic_batch_size",
    "use_remove_padding": "runner.packing",
    "packing": "runner.packing",
    "bias_swiglu_fusion": "actor.model.bias_activation_fusion",
    "adv_estimator": "algorithm.adv_type",
    "kl_loss_coef": "algorithm.kl_beta",
    "kl_coef": "algorithm.kl_beta",
    "beta": "algorithm.kl_beta",
    "kl_loss_type": "algorithm.kl_penalty_type",
    "entropy_coeff": "algorithm.entropy_bonus",
    "clip_ratio": "algorithm.ratio_clip_eps",
    "epsilon": "algorithm.ratio_clip_eps",
    "epsilon_high": "algorithm.clip_ratio_high",
    "cliprange": "algorithm.ratio_clip_eps",
    "temperature": "algorithm.sampling_params.temperature",
    "top_p": "algorithm.sampling_params.top_p",
    "top_k": "algorithm.sampling_params.top_k",
    "max_response_length": "algorithm.sampling_params.max_new_tokens",
    "max_completion_length": "algorithm.sampling_params.max_new_tokens",
    "rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "max_num_seqs": "rollout.max_running_requests",
    "train_files": "data.train_data_paths",
    "dataset": "data.train_data_paths",
    "train_batch_size": "data.rollout_batch_size",
    "param_offload": "actor.offload_weight",
    "grad_offload": "actor.offload_grad",
    "optimizer_offload": "actor.offload_optimizer",
    "total_epochs": "runner.max_epochs",
    "num_train_epochs": "runner.max_epochs",
    "total_training_steps": "runner.max_steps",
    "save_freq": "runner.save_interval",
    "test_freq": "runner.val_check_interval",
    "val_files": "data.val_data_paths",
    "val_max_samples": "data.val_data_size",
    "save_steps": "runner.save_interval",
    "max_actor_ckpt_to_keep": "runner.keep_last_n",
    "save_total_limit": "runner.keep_last_n",
    "default_local_dir": "runner.output_dir",
    "resume_mode": "runner.resume_dir",
    "resume_from_path": "runner.resume_dir",
    "resume_from_checkpoint": "runner.resume_dir",
    "trainer.logger": "runner.logger.logger_backends",
    "report_to": "runner.logger.logger_backends",
    "trainer.project_name": "runner.logger.project_name",
    "trainer.experiment_name": "runner.experiment_name",
    "lora_rank": "actor.lora.r",
    "lora_r": "actor.lora.r",
    "lora_alpha": "actor.lora.alpha",
    "lora_dropout": "actor.lora.dropout",
    "lora_adapter_path": "actor.lora.adapter_path",
    "nnodes": "cluster.num_nodes",
    "n_gpus_per_node": "cluster.component_placement",
}

# The same names in an SFT run.
SFT_NAMES = {
    "model.path": "actor.model.model_path",
    "model": "actor.model.model_path",
    "model_name_or_path": "actor.model.model_path",
    "per_device_train_batch_size": "actor.micro_batch_size",
    "per_device_eval_batch_size": "actor.eval_batch_size",
    "train_batch_size": "actor.global_batch_size",
    "gradient_accumulation_steps": "actor.global_batch_size",
    "max_length": "runner.seq_length",
    "max_seq_length": "runner.seq_length",
    "eval_steps": "runner.val_check_interval",
    "eval_interval": "runner.val_check_interval",
    "val_dataset": "data.val_data_paths",
    "eval_dataset": "data.val_data_paths",
    "max_new_tokens": "validation.max_new_tokens",
}

# What a run of the other kind is called.
_KINDS: Mapping[Task, str] = {"reasoning": "a reasoning (GRPO) run", "sft": "a run of supervised fine-tuning"}

# Words of a key -> what is to be said.
ABSENT: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"lora", "peft", "adapter", "adapters"}),
        "adapters (LoRA) are set by actor.lora.r, alpha, target_modules and the other keys of actor.lora",
    ),
    (
        frozenset({"qlora", "dora"}),
        "of adapters only LoRA is supported, by actor.lora",
    ),
    (
        frozenset({"quantization", "quant", "quantize", "fp8", "int8", "int4", "awq", "gptq", "bnb", "load_in_4bit", "4bit", "8bit"}),
        "quantization is not supported; actor.model.precision and rollout.model.precision are fp32, bf16 or fp16",
    ),
    (frozenset({"sglang"}), "SGLang is not supported; engines are vLLM, whose settings are under rollout.vllm"),
    (
        frozenset({"validation", "validate", "val", "eval", "test"}),
        "validation is set by runner.val_check_interval, runner.val_before_train, data.val_data_paths and data.val_data_size",
    ),
    (
        frozenset({"convert", "converter", "convertor", "conversion", "export"}),
        "nothing has to be converted: HF weights are read directly with actor.megatron.mbridge True, and each checkpoint has hf_model/",
    ),
    (frozenset({"critic", "value", "gae", "ppo"}), "PPO is not supported; algorithm.adv_type is grpo, which has no critic"),
    (frozenset({"rm", "judge"}), "reward models are not supported; reward.reward_type takes a function of your own, as PATH.py:function"),
    (
        frozenset({"fsdp", "fsdp2", "deepspeed", "zero", "zero3"}),
        "the actor is Megatron; actor.optim.use_distributed_optimizer shards its optimizer",
    ),
    (
        frozenset({"speculative", "draft", "mtp", "eagle"}),
        "speculative decoding is not supported: a draft model's weights would not be synced",
    ),
    (
        frozenset({"async", "off_policy", "staleness"}),
        "runner.async_steps has rollouts one step ahead of training; more is not supported",
    ),
    (frozenset({"video", "videos", "audio"}), "text and pictures are read, no videos and no audio"),
    (
        frozenset({"vision", "image", "images", "multimodal", "pixels"}),
        "questions about pictures are of data.type vlm; data.image_keys names their pictures, data.min_pixels and max_pixels limit them",
    ),
    (frozenset({"wandb", "swanlab", "tensorboard", "mlflow"}), "loggers are named in runner.logger.logger_backends"),
    (frozenset({"ref"}), "the reference is the initial weights of the actor itself; algorithm.kl_beta above 0 keeps it"),
    (frozenset({"profiler", "profile", "nsys"}), "no profiler is built in"),
)


def hint(dotted: str, known: Sequence[str], task: Task = "reasoning") -> str:
    """What to say about the unknown key ``dotted``; ``known`` are the dotted names of all keys and sections of this kind of run."""
    for other, cls in CONFIG_OF_TASK.items():
        if other != task and dotted in dotted_keys(cls):
            return f"it belongs to {_KINDS[other]} (runner.task_type: {other}), and has no meaning in {_KINDS[task]}"
    parent, _, leaf = dotted.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.8)
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    ours = other_name(dotted, task)
    if near and not elsewhere:
        return f"did you mean {siblings[near[0]]}?"
    if ours is not None:
        return f"it is {ours} here"
    absent = _absent(dotted)
    if absent is not None:
        return absent
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.7)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    leaves = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.8)
    return f"did you mean {leaves[near[0]]}?" if near else "no key is like it; docs/configuration.md lists all"


def other_name(dotted: str, task: Task = "reasoning") -> str | None:
    """Our name of a key that another trainer calls ``dotted``, or None where a run of this kind has no such key."""
    known = {*dotted_keys(CONFIG_OF_TASK[task])}
    names = {name: ours for name, ours in {**OTHER_NAMES, **(SFT_NAMES if task == "sft" else {})}.items() if ours in known}
    parts = dotted.split(".")
    return next((names[tail] for i in range(len(parts)) if (tail := ".".join(parts[i:])) in names), None)


def _absent(dotted: str) -> str | None:
    words = set(re.split(r"[._]", dotted)) | {dotted.rpartition(".")[2]}
    return next((sentence for names, sentence in ABSENT if names & words), None)
