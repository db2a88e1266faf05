"""The configuration of a GRPO run as frozen dataclasses: one field is one key of the yaml, with its type, default and meaning.

Owns the names, types, defaults and one-line meanings of the keys. Knows neither hydra nor OmegaConf (``load``), nor
which values fit together (``validate``). A key exists here only because something reads it; keys that other GRPO
yamls carry without effect here are listed in ``inert``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlsync.sync.config import SyncConfig
from workers.config.actor import ActorConfig, Precision
from workers.config.fields import ANY_NUMBER, SEED, key


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """``cluster``: where the components run."""

    num_nodes: int = key(1, "Ray nodes to wait for before placing anything", min=1)
    component_placement: Mapping[str, Any] = key(
        doc="devices of each component, e.g. `actor,rollout,reward: all` or `actor: 0-3`; see workers/placement.py"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """``runner.logger``: where metrics go."""

    log_path: str | None = key(None, "folder of metrics.jsonl, config.yaml and the loggers; null: `<output_dir>/<experiment_name>`")
    project_name: str = key("rlsync", "project in wandb and swanlab")
    experiment_name: str | None = key(None, "run name in wandb and swanlab; null: runner.experiment_name")
    logger_backends: tuple[Literal["tensorboard", "wandb", "swanlab"], ...] = key(
        ("tensorboard",), "loggers beside metrics.jsonl; each is imported only when named"
    )
    wandb_proxy: str | None = key(None, "HTTP(S) proxy for wandb")
    wandb_entity: str | None = key(None, "wandb team or user")
    swanlab_mode: str = key("cloud", "swanlab mode: cloud, local, offline or disabled")
    prometheus_port: int = key(
        0, "the driver shows its latest numbers at this port under /metrics, for Prometheus; 0: none", min=0, max=65535
    )
    prometheus_host: str = key("127.0.0.1", "address of that port; anybody who reaches it can read the numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """``runner``: the loop."""

    task_type: Literal["reasoning"] = key("reasoning", "kind of run")
    logger: LoggerConfig = key(LoggerConfig(), "")
    max_epochs: int = key(1, "passes over the training data", min=1)
    max_steps: int = key(-1, "stop after this many steps; negative: only max_epochs limits", bounds=ANY_NUMBER)
    val_check_interval: int = key(-1, "must divide save_interval when both are on; no validation rollout is run", bounds=ANY_NUMBER)
    save_interval: int = key(-1, "steps between checkpoints, also one at the last step; 0 or less: none at all", bounds=ANY_NUMBER)
    keep_last_n: int | None = key(None, "complete checkpoints to keep; null keeps all", min=1)
    seq_length: int = key(doc="tokens of prompt and response together; must exceed data.max_prompt_length", min=2)
    enable_dynamic_batch_size: bool = key(False, "cut micro-batches by tokens instead of by samples")
    max_tokens_per_mbs: int | None = key(None, "token budget of a micro-batch when enable_dynamic_batch_size; null: seq_length", min=1)
    resume_dir: str | None = key(None, "`global_step_N` folder to continue from, `auto` for the newest complete one, null: start fresh")
    experiment_name: str = key(doc="name of the run and of its output folder")
    output_dir: str = key("results", "folder that holds the folders of all runs")
    per_worker_log: bool = key(False, "write each worker's log under `<log_path>/worker_logs`; false: Ray's session folder has them")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """``algorithm.sampling_params``: how responses are drawn."""

    do_sample: bool = key(True, "false: greedy")
    temperature: float = key(1.0, "softmax temperature, also applied when log-probabilities are recomputed", min=0)
    top_k: int = key(1000000, "sample from this many likeliest tokens; at or above the vocabulary: all", min=-1)
    top_p: float = key(1.0, "sample from the smallest set of tokens with this probability mass", above=0, max=1)
    repetition_penalty: float = key(1.0, "1.0: none", above=0)
    max_new_tokens: int | None = key(None, "longest response in tokens; null: seq_length - max_prompt_length", min=1)
    min_new_tokens: int = key(0, "no end-of-sequence before this many tokens", min=0)
    seeded: bool = key(
        True,
        "draw each prompt's responses from a seed of its own, made of actor.seed, step and prompt, so that a resumed run draws what "
        "the uninterrupted one would; false: from the engine's one stream, which is faster with many running requests",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig:
    """``algorithm``: GRPO."""

    adv_type: Literal["grpo"] = key("grpo", "advantage estimator")
    group_size: int = key(8, "responses per prompt; at least 2", above=1)
    n_minibatches: int = key(1, "optimizer updates per step", min=1)
    training_batch_size_per_gpu: int = key(1, "samples in a training micro-batch of one data-parallel rank", min=1)
    logprob_forward_micro_batch_size: int = key(1, "samples in a micro-batch when log-probabilities are recomputed", min=1)
    recompute_logprobs: bool = key(True, "the actor computes the old log-probabilities; false: the engine's are used")
    shuffle_rollout: bool = key(False, "shuffle the samples of a step over the mini-batches, seeded by actor.seed")
    loss_type: Literal["actor"] = key("actor", "the clipped policy loss")
    loss_agg_func: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = key(
        "token-mean", "how token losses become one number"
    )
    kl_beta: float = key(0.0, "weight of the KL term to the reference (the initial weights); 0 keeps no reference", min=0)
    kl_penalty_type: Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"] = key("low_var_kl", "KL estimator")
    ratio_clip_eps: float = key(0.2, "clip range of the ratio where clip_ratio_low / high are null", min=0)
    clip_ratio_low: float | None = key(None, "clip at 1 - this", min=0, max=1)
    clip_ratio_high: float | None = key(None, "clip at 1 + this", min=0)
    clip_ratio_c: float | None = key(None, "dual clip for negative advantages; greater than 1, null: off", above=1.0)
    clip_log_ratio_min: float | None = key(None, "clamp the log ratio from below; null: off", bounds=ANY_NUMBER)
    clip_log_ratio_max: float | None = key(None, "clamp the log ratio from above; null: off", bounds=ANY_NUMBER)
    entropy_bonus: float = key(0.0, "weight of the entropy subtracted from the loss", bounds=ANY_NUMBER)
    calculate_entropy: bool = key(False, "report the entropy even when entropy_bonus is 0")
    normalize_advantages: bool = key(True, "whiten the advantages over all valid tokens of the step")
    early_stop_imp_ratio: float | None = key(None, "a micro-batch whose mean ratio exceeds this adds no gradient; null: off", above=0)
    importance_sampling_fix: bool = key(False, "multiply advantages by the clamped ratio of recomputed to engine probability")
    importance_sampling_clip: float = key(10.0, "upper clamp of that ratio", above=0)
    sampling_params: SamplingConfig = key(SamplingConfig(), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutModelConfig:
    """``rollout.model``: the Hugging Face model that engines serve."""

    model_path: str = key(doc="HF folder: architecture, tokenizer files and initial weights")
    model_type: str | None = key(None, "checked against the folder's config.json when given, e.g. qwen2.5, qwen3")
    precision: Precision | None = key(None, "engine dtype: fp32, bf16 or fp16; null: actor.model.precision")
    trust_remote_code: bool | None = key(None, "null: actor.tokenizer.trust_remote_code")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """``rollout.vllm``: passed to vLLM; null leaves vLLM's own default."""

    attention_backend: str | None = key(None, "e.g. FLASH_ATTN")
    enable_chunked_prefill: bool | None = key(None, "split long prompts over scheduler steps")
    enable_prefix_caching: bool | None = key(None, "share the KV cache of equal prompt starts, e.g. within a group")
    kv_cache_memory_bytes: int | None = key(
        None, "KV cache of each GPU; null: what rollout.gpu_memory_utilization leaves, as vLLM finds it out at its start", min=1
    )
    max_num_batched_tokens: int | None = key(None, "tokens per scheduler step", min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """``rollout``: the vLLM engines."""

    group_name: str = key("RolloutGroup", "Ray name prefix of the engines")
    gpu_memory_utilization: float = key(0.55, "share of GPU memory vLLM may take (CPU: not used)", above=0, max=1)
    model: RolloutModelConfig = key(doc="")
    enforce_eager: bool = key(False, "true: no compilation and no CUDA graphs")
    distributed_executor_backend: Literal["mp", "ray"] = key("mp", "how vLLM starts its workers")
    disable_log_stats: bool = key(False, "silence vLLM's statistics lines")
    detokenize: bool = key(False, "let vLLM produce text as well; rewards always use the tokenizer")
    print_outputs: bool = key(False, "log one sample a step")
    rollout_backend: Literal["vllm"] = key("vllm", "inference engine")
    vllm: VllmConfig = key(VllmConfig(), "")
    return_logprobs: bool | None = key(None, "engines report log-probabilities of their samples; null: not recompute_logprobs")
    tensor_parallel_size: int = key(1, "GPUs (CPU: processes) of one engine; any ratio to the actor's", min=1)
    pipeline_parallel_size: int = key(1, "only 1 is supported", min=1)
    validate_weight: bool = key(False, "before step 1 compare the engines' greedy answers with the HF weights'")
    max_running_requests: int = key(64, "sequences an engine runs at once", min=1)
    timeout_s: float = key(3600.0, "deadline of one step's rollout; an engine that gives no sign of life then counts as lost", above=0)
    max_engine_restarts: int = key(0, "lost engines that a run may replace, synced before they serve; 0: a lost engine ends the run", min=0)
    sleep_level: Literal[0, 1, 2] | None = key(
        None,
        "what engines give back while the actor has their GPUs: 2: all; 1: weights wait in host memory; 0: nothing; "
        "null: 2 where actor and engines share GPUs, else 0",
    )
    cuda_graph_max_bs: int | None = key(None, "largest batch captured in a CUDA graph; null: vLLM's default", min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """``data``: prompts and reference answers."""

    type: Literal["math", "reasoning"] = key("math", "both names mean the math form")
    train_data_paths: tuple[str, ...] = key(doc="JSONL / JSON files with the training problems")
    val_data_paths: tuple[str, ...] = key((), "further files with the same form, checked to exist and to parse")
    prompt_key: str = key("prompt", "field with the prompt: a string, or a message list; GSM8K: question")
    answer_key: str = key("solutions", "field with the reference answer(s): string or list; GSM8K: answer (the part after ####)")
    on_bad_sample: Literal["error", "skip"] = key(
        "error",
        "rows whose prompt or reference answer cannot be used; error: name them and end, skip: leave them out and say how many",
    )
    max_prompt_length: int = key(1024, "tokens", min=1)
    filter_prompt_by_length: bool = key(True, "drop longer prompts; false: keep their last max_prompt_length tokens")
    apply_chat_template: bool = key(False, "render the prompt with the tokenizer's chat template")
    system_prompt: str | None = key(None, "system message put before a string prompt when apply_chat_template")
    prompt_suffix: str = key("", "text appended to a string prompt, e.g. an instruction to box the answer")
    rollout_batch_size: int = key(doc="prompts per step over all ranks", min=1)
    num_workers: int = key(0, "loader processes; 0: in the driver", min=0)
    shuffle: bool = key(True, "a new order each epoch, derived from seed")
    seed: int = key(1234, "of the order", bounds=SEED)
    data_size: int | None = key(None, "use only the first this many problems; null: all", min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """``reward``: the verifier."""

    group_name: str = key("RewardGroup", "Ray name prefix")
    reward_type: Literal["math"] = key("math", "verifier")
    reward_scale: float = key(1.0, "multiplies the reward", above=0)
    reward_min_val: float = key(-1.0, "reward of a wrong answer before scaling", bounds=ANY_NUMBER)
    reward_max_val: float = key(1.0, "reward of a correct answer before scaling", bounds=ANY_NUMBER)
    num_processes: int = key(2, "verifier processes", min=1)
    timeout_s: float = key(10.0, "a response whose check takes longer counts as wrong and its process is replaced", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStartConfig:
    """``warm_start``: supervised steps through the actor before GRPO; absent: none."""

    data_paths: tuple[str, ...] = key(doc="JSONL with `prompt` and `response`")
    num_steps: int = key(doc="optimizer steps", min=1)
    batch_size: int = key(64, "examples per step over all ranks", min=1)
    lr: float = key(1e-3, "learning rate", above=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticConfig:
    """``arithmetic``: the locally made model, tokenizer and problems of the CPU default; absent: none are made."""

    path: str = key(doc="folder that receives model/, train.jsonl and supervised.jsonl")
    seed: int = key(0, "of weights and problems", bounds=SEED)
    max_operand: int = key(4, "problems are a+b with both operands from 0 to this", min=1)
    num_problems: int = key(2048, "lines of train.jsonl, drawn with repetition", min=1)
    num_supervised: int = key(4096, "lines of supervised.jsonl, drawn with repetition", min=1)
    supervised_noise: float = key(0.65, "share of supervised lines with a wrong answer; what GRPO has to unlearn", min=0, below=1)
    hidden_size: int = key(128, "of the model; a multiple of 32, the smallest head vLLM runs on CPU", min=32)
    num_layers: int = key(2, "of the model", min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededModelConfig:
    """``seeded_model``: a model of given shapes with seeded random weights, made locally; absent: none is made."""

    path: str = key(doc="folder that receives it, made unless it holds it already; used where rollout.model.model_path names it")
    seed: int = key(0, "of the weights", bounds=SEED)
    hf_config: Mapping[str, Any] = key(doc="content of its config.json; token ids and dtype are added")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole run, validated. ``load_config`` makes it; components receive the parts they need as plain arguments."""

    cluster: ClusterConfig = key(doc="")
    runner: RunnerConfig = key(doc="")
    algorithm: AlgorithmConfig = key(AlgorithmConfig(), "")
    rollout: RolloutConfig = key(doc="")
    data: DataConfig = key(doc="")
    actor: ActorConfig = key(ActorConfig(), "")
    reward: RewardConfig = key(RewardConfig(), "")
    weight_sync: SyncConfig = key(SyncConfig(), "")
    warm_start: WarmStartConfig | None = key(None, "")
    arithmetic: ArithmeticConfig | None = key(None, "")
    seeded_model: SeededModelConfig | None = key(None, "")
