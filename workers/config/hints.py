"""What to say about a key that does not exist: its name here, or that the feature is not there, or the key that is nearest.

Owns two tables. ``OTHER_NAMES``: what other runners call a key of ours. ``ABSENT``: features that are not there, known by words of
the key, so that nobody is sent to a key that only looks alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

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
    "num_generations": "algorithm.group_size",
    "ppo_mini_batch_size": "algorithm.n_minibatches",
    "ppo_micro_batch_size_per_gpu": "algorithm.training_batch_size_per_gpu",
    "per_device_train_batch_size": "algorithm.training_batch_size_per_gpu",
    "log_prob_micro_batch_size_per_gpu": "algorithm.logprob_forward_micro_batch_size",
    "ppo_max_token_len_per_gpu": "runner.max_tokens_per_mbs",
    "use_dynamic_bsz": "runner.enable_dynamic_batch_size",
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
    "nnodes": "cluster.num_nodes",
    "n_gpus_per_node": "cluster.component_placement",
}

# Words of a key -> what is to be said.
ABSENT: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"lora", "peft", "adapter", "adapters", "qlora", "dora"}),
        "adapters (LoRA) are not supported; all weights are trained and synced",
    ),
    (
        frozenset({"quantization", "quant", "quantize", "fp8", "int8", "int4", "awq", "gptq", "bnb", "load_in_4bit", "4bit", "8bit"}),
        "quantization is not supported; actor.model.precision and rollout.model.precision are fp32, bf16 or fp16",
    ),
    (frozenset({"sglang"}), "SGLang is not supported; engines are vLLM, whose settings are under rollout.vllm"),
    (
        frozenset({"validation", "validate", "val", "eval", "evaluation", "test"}),
        "no validation rollout is run; evaluate the hf_model/ folder of a checkpoint with a tool of your choice",
    ),
    (
        frozenset({"convert", "converter", "convertor", "conversion", "export"}),
        "nothing has to be converted: HF weights are read directly with actor.megatron.mbridge True, and each checkpoint has hf_model/",
    ),
    (frozenset({"critic", "value", "gae", "ppo"}), "PPO is not supported; algorithm.adv_type is grpo, which has no critic"),
    (frozenset({"rm", "judge"}), "reward models are not supported; reward.reward_type math compares with the reference answers"),
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
        "asynchronous rollouts are not supported; each step syncs, rolls out and trains in turn",
    ),
    (frozenset({"vision", "image", "images", "video", "audio", "multimodal"}), "only text models are supported"),
    (frozenset({"wandb", "swanlab", "tensorboard", "mlflow"}), "loggers are named in runner.logger.logger_backends"),
    (frozenset({"ref"}), "the reference is the initial weights of the actor itself; algorithm.kl_beta above 0 keeps it"),
    (frozenset({"profiler", "profile", "nsys"}), "no profiler is built in"),
)


def hint(dotted: str, known: Sequence[str]) -> str:
    """What to say about the unknown key ``dotted``; ``known`` are the dotted names of all keys and sections."""
    parent, _, leaf = dotted.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.8)
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    ours = _other_name(dotted)
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


def _other_name(dotted: str) -> str | None:
    parts = dotted.split(".")
    return next((OTHER_NAMES[tail] for i in range(len(parts)) if (tail := ".".join(parts[i:])) in OTHER_NAMES), None)


def _absent(dotted: str) -> str | None:
    words = set(re.split(r"[._]", dotted)) | {dotted.rpartition(".")[2]}
    return next((sentence for names, sentence in ABSENT if names & words), None)
