"""Sections of the yaml that runs of every kind have, as frozen dataclasses: one field is one key, with its type, default, limits and
meaning.

``grpo`` and ``sft`` have the sections of one kind of run, and the whole of it: ``RunConfig`` and ``SftConfig``, which add them to
``CommonConfig``.

Owns names, types, defaults, limits and one-line meanings of the keys. Knows neither hydra nor OmegaConf (``load``), nor which values fit
together (``validate``). A key exists here only because something reads it; keys that other runners' yamls carry without effect here are
listed in ``foreign_keys``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from rlsync.cli.shapes import SHAPES, twin_of
from rlsync.errors import ConfigError
from rlsync.models import PARTS, Part
from rlsync.models.lora import ALL_LINEAR, LoraSpec
from rlsync.sync.config import SyncConfig
from workers.config.fields import ANY_NUMBER, SEED, Precision, Task, key


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorModelConfig:
    """``actor.model``: layout and execution of the Megatron model. Its architecture always comes from the HF config.

    Fields from ``recompute_method`` on are passed to Megatron's ``TransformerConfig`` under the same name when not null.
    """

    model_path: str | None = key(
        None,
        "SFT, required there: HF folder with architecture, tokenizer files and initial weights; a reasoning run has "
        "rollout.model.model_path and actor.megatron.ckpt_convertor.hf_model_path",
    )
    megatron_checkpoint: str | None = key(None, "Megatron checkpoint to start from; only with actor.megatron.use_hf_ckpt False")
    precision: Precision = key("bf16", "dtype of the parameters")
    tensor_model_parallel_size: int = key(1, "TP: ranks that share each weight matrix", min=1)
    pipeline_model_parallel_size: int = key(1, "PP: pipeline stages, each with some of the layers", min=1)
    virtual_pipeline_model_parallel_size: int | None = key(None, "virtual stages per pipeline stage", min=1)
    context_parallel_size: int = key(1, "CP: ranks that share each sequence", min=1)
    expert_model_parallel_size: int = key(1, "EP: ranks that share the experts of a layer", min=1)
    expert_tensor_parallel_size: int | None = key(
        None, "ETP: ranks that share each expert; null: TP for dense models, 1 with experts", min=1
    )
    decoder_first_pipeline_num_layers: int | None = key(None, "layers of the first pipeline stage; null: even split", min=1)
    decoder_last_pipeline_num_layers: int | None = key(None, "layers of the last pipeline stage; null: even split", min=1)
    sequence_parallel: bool = key(False, "shard activations between TP regions over TP")
    make_vocab_size_divisible_by: int = key(1, "the vocabulary is padded to a multiple of this times TP", min=1)
    freeze_language_model: bool = key(False, "vision-language models: do not train the language model")
    freeze_vision_model: bool = key(False, "vision-language models: do not train the vision tower, but for its projection")
    freeze_vision_projection: bool = key(False, "vision-language models: do not train the mergers that project the tower's features")
    logits_chunk_tokens: int = key(
        8192, "tokens of a micro-batch whose logits exist at once; those of more are computed again in the backward pass", min=1
    )
    recompute_method: Literal["block", "uniform"] | None = key(
        None,
        "recompute_granularity full: uniform: all layers, recompute_num_layers at a time; block: the first recompute_num_layers of a stage",
    )
    recompute_granularity: Literal["full", "selective"] | None = key(None, "activation recomputation; null: none")
    recompute_num_layers: int | None = key(None, "recompute_granularity full: layers, as recompute_method counts them", min=1)
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = key(
        None, "how TransformerEngine's attention exchanges keys and values under CP; null: p2p; layers without it gather them"
    )
    apply_rope_fusion: bool | None = key(None, "fused rotary embedding (TransformerEngine)")
    bias_activation_fusion: bool | None = key(None, "fuse bias and activation")
    bias_dropout_fusion: bool | None = key(None, "fuse bias and dropout")
    gradient_accumulation_fusion: bool | None = key(None, "accumulate weight gradients in the GEMM (TransformerEngine or Apex)")
    persist_layer_norm: bool | None = key(None, "persistent fused layer norm")
    attention_softmax_in_fp32: bool | None = key(None, "softmax of attention scores in fp32")
    batch_p2p_comm: bool | None = key(None, "batch pipeline sends and receives")
    variable_seq_lengths: bool | None = key(None, "pipeline stages exchange shapes first")
    use_cpu_initialization: bool | None = key(None, "initialise weights on the host")
    init_method_std: float | None = key(None, "standard deviation of fresh weights", above=0)
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] | None = key(None, "how tokens reach experts")
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] | None = key(
        None, "how the load of experts is balanced, with the weight moe_aux_loss_coeff; null: aux_loss"
    )
    moe_router_pre_softmax: bool | None = key(None, "softmax before the top-k choice")
    moe_aux_loss_coeff: float | None = key(None, "weight of the load-balancing loss", min=0)
    moe_router_bias_update_rate: float | None = key(None, "step of the router's expert bias", min=0)
    moe_permute_fusion: bool | None = key(None, "fused token permutation (TransformerEngine)")

    @property
    def frozen(self) -> dict[str, Part]:
        """Keys that freeze a part of the model, and the part."""
        switches = (self.freeze_language_model, self.freeze_vision_model, self.freeze_vision_projection)
        return {f"actor.model.freeze_{part}": part for part, is_frozen in zip(PARTS, switches, strict=True) if is_frozen}

    def transformer_overrides(self) -> dict[str, Any]:
        """Fields of Megatron's ``TransformerConfig`` that the user set, by name."""
        names = [f.name for f in fields(self)]
        passed = names[names.index("recompute_method") :]
        return {name: getattr(self, name) for name in passed if getattr(self, name) is not None}


# Keys of actor.optim that give a part of a vision-language model a learning rate of its own.
PART_RATES: Mapping[str, Part] = {"vision_lr": "vision_model", "projection_lr": "vision_projection"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """``actor.lora``: low-rank adapters, which alone are trained then; ``weight_sync.lora`` says how engines get them."""

    r: int = key(0, "rank of the adapters (PEFT's r); 0: none, all weights are trained", min=0)
    alpha: float = key(32.0, "PEFT's lora_alpha: adapters are multiplied by alpha / r", above=0)
    use_rslora: bool = key(False, "multiply adapters by alpha / sqrt(r) instead of alpha / r")
    dropout: float = key(0.0, "share of an adapter's inputs that are dropped in training", min=0, below=1)
    target_modules: str | tuple[str, ...] = key(
        ALL_LINEAR,
        "layers with an adapter, by their Hugging Face names: all-linear (attention, MLPs and experts of the language model), a list of "
        "last parts of names, or a regular expression for whole names; the last two reach embed_tokens, lm_head and routers too",
    )
    exclude_modules: str | tuple[str, ...] = key((), "layers among target_modules that get no adapter; a list or a regular expression")
    init: Literal["kaiming", "gaussian"] = key("kaiming", "first values of A; B begins at zero (of embeddings: A at zero, and B normal)")
    adapter_path: str | None = key(None, "PEFT folder with the adapters to begin with; null: fresh ones")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """``actor.optim``: Megatron's optimizer."""

    optimizer: Literal["adam"] = key("adam", "optimizer")
    bf16: bool | None = key(None, "must not contradict actor.model.precision, which decides")
    fp16: bool | None = key(None, "must not contradict actor.model.precision, which decides")
    lr: float = key(1e-6, "learning rate; the peak when a schedule is used", min=0)
    min_lr: float = key(0.0, "floor of a decaying schedule", min=0)
    vision_lr: float | None = key(None, "vision-language models: learning rate of the vision tower; null: lr", min=0)
    projection_lr: float | None = key(None, "vision-language models: learning rate of the tower's mergers; null: lr", min=0)
    adam_beta1: float = key(0.9, "decay of the first moment", min=0, below=1)
    adam_beta2: float = key(0.95, "decay of the second moment", min=0, below=1)
    adam_eps: float = key(1e-8, "added to the denominator", above=0)
    weight_decay: float = key(0.01, "decoupled weight decay", min=0)
    clip_grad: float = key(1.0, "largest global norm of a gradient; 0: no clipping", min=0)
    use_distributed_optimizer: bool = key(True, "shard optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = key(False, "reduce gradients during backward")
    overlap_param_gather: bool = key(False, "gather parameters during forward; a sync gathers them first")
    loss_scale: float | None = key(None, "static fp16 loss scale; null: dynamic", above=0)
    optimizer_cpu_offload: bool = key(
        False,
        "keep the optimizer's state on the host and step there, on the rank's share of its cores; without use_precision_aware_optimizer "
        "GPUs go on holding float32 main parameters",
    )
    optimizer_offload_fraction: float = key(1.0, "share of the optimizer that optimizer_cpu_offload keeps on the host", min=0, max=1)
    use_precision_aware_optimizer: bool = key(
        False, "main parameters and moments are kept by TransformerEngine's Adam, in float32; needs use_distributed_optimizer"
    )
    log_num_zeros_in_grad: bool = key(False, "count the zeros of the gradient in each update: one more pass over it")

    @property
    def part_lr(self) -> dict[Part, float]:
        """Learning rates of parts that have their own."""
        rates = zip(PART_RATES.values(), (self.vision_lr, self.projection_lr), strict=True)
        return {part: rate for part, rate in rates if rate is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LrSchedConfig:
    """``actor.lr_sched``: Megatron's learning-rate schedule."""

    lr_warmup_fraction: float | None = key(None, "warm-up as a share of lr_decay_iters; null: lr_warmup_iters", min=0, max=1)
    lr_warmup_iters: int = key(0, "warm-up optimizer steps", min=0)
    lr_warmup_init: float = key(0.0, "first learning rate of the warm-up", min=0)
    max_lr: float | None = key(None, "peak of the schedule; null: actor.optim.lr", min=0)
    min_lr: float | None = key(None, "floor of the schedule; null: actor.optim.min_lr", min=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = key("constant", "shape after the warm-up")
    lr_decay_iters: int = key(10, "optimizer steps until min_lr; not used by constant", min=1)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = key("exponential", "shape of WSD's final decay")
    lr_wsd_decay_iters: int | None = key(None, "optimizer steps of WSD's final decay", min=1)
    start_weight_decay: float | None = key(None, "first weight decay; required unless lr_decay_style is constant, forbidden then", min=0)
    end_weight_decay: float | None = key(None, "last weight decay; required unless lr_decay_style is constant, forbidden then", min=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = key("constant", "path from start_weight_decay to end_weight_decay")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """``actor.tokenizer``."""

    tokenizer_model: str | None = key(None, "HF folder; null: the model's")
    use_fast: bool = key(True, "load the fast (Rust) tokenizer")
    trust_remote_code: bool = key(False, "run the model folder's own code")
    padding_side: Literal["right"] = key("right", "responses follow prompts without a gap")


@dataclass(frozen=True, slots=True, kw_only=True)
class CkptConvertorConfig:
    """``actor.megatron.ckpt_convertor``: where initial weights come from."""

    hf_model_path: str | None = key(
        None, "reasoning: HF folder with the initial weights; null: rollout.model.model_path. SFT reads actor.model.model_path"
    )
    save_path: str | None = key(
        None, "mbridge False: folder of the one-time conversion; null: `<output_dir>/<experiment_name>/converted_ckpts/actor`"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronConfig:
    """``actor.megatron``: runtime and checkpoint switches."""

    mbridge: bool | None = key(
        None,
        "True: read HF weights directly and save `hf_model/` too; False or null: convert once to a Megatron checkpoint",
    )
    convert_from_hf: bool = key(
        True,
        "SFT; False: pretraining: the HF folder gives config.json and tokenizer, and the first weights are random, drawn from actor.seed "
        "with the deviation actor.model.init_method_std (null: config.json's initializer_range)",
    )
    use_hf_ckpt: bool = key(True, "start from HF weights; False needs actor.model.megatron_checkpoint or runner.resume_dir")
    ckpt_convertor: CkptConvertorConfig = key(CkptConvertorConfig(), "")
    distributed_backend: Literal["nccl", "gloo"] | None = key(None, "null: nccl on GPUs, gloo without")
    distributed_timeout_minutes: float = key(30.0, "deadline of a collective", above=0)
    ddp_bucket_size: int | None = key(None, "elements in a gradient bucket; null: Megatron's default", min=1)
    accumulate_allreduce_grads_in_fp32: bool = key(True, "accumulate and reduce gradients in fp32")
    check_for_nan_in_loss_and_grad: bool = key(
        False,
        "each rank looks at its gradients before they are reduced, and says that it was there that they were not finite: a wait for the "
        "GPU for each bucket of gradients. A norm that is not finite ends a run in any case, before it changes weights",
    )
    router_replay: Literal["off", "R2", "R3"] = key(
        "off",
        "reasoning, models with experts: training sends tokens to the experts of R2: the actor's log-probabilities of the step, "
        "R3: the engines' rollout (GPUs); off: those that its routers choose now",
    )
    no_load_optim: bool = key(False, "resume without optimizer state")
    no_save_optim: bool = key(False, "checkpoints without optimizer state")
    async_save: bool = key(
        False, "training goes on while checkpoints are written, from copies that take host memory: of each rank what it writes"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorConfig:
    """``actor``: the Megatron policy."""

    group_name: str = key("ActorGroup", "Ray name prefix of the ranks")
    training_backend: Literal["megatron"] = key("megatron", "trainer of the policy")
    spec_name: Literal["decoder_gpt", "local_gpt", "te_gpt"] = key(
        "decoder_gpt", "layer implementation: local, TransformerEngine, or (decoder_gpt) TransformerEngine where installed"
    )
    offload_weight: bool = key(False, "weights are in host memory during the rollout; where actor and engines share GPUs")
    offload_grad: bool = key(False, "gradient buffers have no memory during sync and rollout; where actor and engines share GPUs")
    offload_optimizer: bool = key(False, "optimizer state is in host memory during sync and rollout; where actor and engines share GPUs")
    enable_dp_load_balance: bool = key(False, "reasoning: deal samples to data-parallel ranks by length")
    seed: int = key(1234, "seed of dropout, initialisation and shuffle_rollout", bounds=SEED)
    micro_batch_size: int | None = key(
        None, "SFT, required there: examples in a micro-batch of one data-parallel rank; reasoning: derived: "
        "algorithm.training_batch_size_per_gpu", min=1,
    )  # fmt: skip
    global_batch_size: int | None = key(
        None, "SFT, required there: examples of an optimizer step over all ranks; reasoning: derived: "
        "rollout_batch_size x group_size // n_minibatches", min=1,
    )  # fmt: skip
    eval_batch_size: int | None = key(None, "SFT: examples in a micro-batch of the validation; null: micro_batch_size", min=1)
    model: ActorModelConfig = key(ActorModelConfig(), "")
    lora: LoraConfig = key(LoraConfig(), "")
    optim: OptimConfig = key(OptimConfig(), "")
    lr_sched: LrSchedConfig = key(LrSchedConfig(), "")
    tokenizer: TokenizerConfig = key(TokenizerConfig(), "")
    megatron: MegatronConfig = key(MegatronConfig(), "")

    @property
    def lora_spec(self) -> LoraSpec | None:
        """The adapters of ``actor.lora``, or None without; fresh ones are drawn from ``actor.seed``."""
        lora = self.lora
        if not lora.r:
            return None
        return LoraSpec(lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.exclude_modules, lora.use_rslora, lora.init, self.seed)


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

    task_type: Task = key("reasoning", "kind of run: GRPO, or supervised fine-tuning; a script runs one kind")
    logger: LoggerConfig = key(LoggerConfig(), "")
    max_epochs: int = key(1, "passes over the training data", min=1)
    async_steps: int = key(
        0,
        "reasoning: steps that rollouts are ahead of training. 1: while the actor trains on the samples of a step, engines generate those "
        "of the next one with the weights before it, see docs/async.md; 0: in turn",
        min=0, max=1,
    )  # fmt: skip
    max_steps: int = key(-1, "stop after this many steps; negative: only max_epochs limits", bounds=ANY_NUMBER)
    val_check_interval: int = key(
        -1,
        "steps between validations, also one after the last step; must divide save_interval when both are on; 0 or less: none at all",
        bounds=ANY_NUMBER,
    )
    val_before_train: bool = key(False, "validate the initial weights too, as step 0")
    save_interval: int = key(-1, "steps between checkpoints, also one at the last step; 0 or less: none at all", bounds=ANY_NUMBER)
    keep_last_n: int | None = key(None, "complete checkpoints to keep; null keeps all", min=1)
    seq_length: int = key(doc="tokens of prompt and response together; must exceed data.max_prompt_length", min=2)
    enable_dynamic_batch_size: bool = key(
        False, "cut micro-batches by tokens, balanced, instead of by samples; padding counts where sequences are not packed"
    )
    max_tokens_per_mbs: int | None = key(
        None,
        "token budget of a micro-batch when enable_dynamic_batch_size, with padding where sequences are not packed; null: seq_length",
        min=1,
    )
    packing: Literal["auto", "on", "off"] = key(
        "auto",
        "the actor passes the sequences of a micro-batch one after the other, without padding; True, False, or auto: where attention is "
        "TransformerEngine's",
    )
    resume_dir: str | None = key(None, "`global_step_N` folder to continue from, `auto` for the newest complete one, null: start fresh")
    experiment_name: str = key(doc="name of the run and of its output folder")
    output_dir: str = key("results", "folder that holds the folders of all runs")
    per_worker_log: bool = key(False, "write each worker's log under `<log_path>/worker_logs`; false: Ray's session folder has them")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutModelConfig:
    """``rollout.model``: the Hugging Face model that engines serve."""

    model_path: str = key(doc="HF folder: architecture, tokenizer files and initial weights")
    model_type: str | None = key(None, "checked against the folder's config.json when given, e.g. qwen2.5, qwen3")
    precision: Precision | None = key(None, "engine dtype: fp32, bf16 or fp16; null: actor.model.precision")
    trust_remote_code: bool | None = key(None, "engines run the model folder's own code; null: actor.tokenizer.trust_remote_code")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """``rollout.vllm``: passed to vLLM; null leaves vLLM's own default."""

    attention_backend: str | None = key(None, "e.g. FLASH_ATTN")
    enable_chunked_prefill: bool | None = key(None, "split long prompts over scheduler steps")
    enable_expert_parallel: bool = key(
        False, "true: each of an engine's GPUs has some of the experts, whole; false: a part of every expert (tensor_parallel_size)"
    )
    enable_prefix_caching: bool | None = key(None, "share the KV cache of equal prompt starts, e.g. within a group")
    kv_cache_memory_bytes: int | None = key(
        None, "KV cache of each GPU; null: what rollout.gpu_memory_utilization leaves, as vLLM finds it out at its start", min=1
    )
    max_num_batched_tokens: int | None = key(None, "tokens per scheduler step; null: as many as vLLM's class LLM takes there", min=1)
    num_gpu_blocks_override: int | None = key(
        None, "blocks of an engine's KV cache, on CPU too, instead of all that its memory has room for", min=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """``rollout``: the vLLM engines."""

    group_name: str = key("RolloutGroup", "Ray name prefix of the engines")
    gpu_memory_utilization: float = key(0.55, "share of GPU memory vLLM may take (CPU: not used)", above=0, max=1)
    model: RolloutModelConfig = key(doc="")
    enforce_eager: bool = key(False, "true: no compilation and no CUDA graphs")
    distributed_executor_backend: Literal["mp", "ray"] = key("mp", "how vLLM starts its workers; only mp is supported")
    disable_log_stats: bool = key(False, "silence vLLM's statistics lines")
    detokenize: bool = key(False, "let vLLM produce text as well; rewards always use the tokenizer")
    print_outputs: bool = key(False, "log one sample a step")
    rollout_backend: Literal["vllm"] = key("vllm", "inference engine")
    vllm: VllmConfig = key(VllmConfig(), "")
    return_logprobs: bool | None = key(
        None,
        "engines report log-probabilities of their samples, for which small models take longer; null: of all where updates need them, else "
        "of every eighth prompt of an engine, for rollout/logprob_diff_mean",
    )
    enable_return_routed_experts: bool | None = key(
        None, "engines return the experts of each token, for moe/route_mismatch (GPUs); null: where actor.megatron.router_replay is R3"
    )
    tensor_parallel_size: int = key(1, "GPUs (CPU: processes) of one engine; any ratio to the actor's", min=1)
    pipeline_parallel_size: int = key(1, "only 1 is supported", min=1)
    validate_weight: bool = key(False, "before step 1 compare the engines' greedy answers with the HF weights'")
    max_running_requests: int = key(64, "sequences an engine runs at once", min=1)
    timeout_s: float = key(3600.0, "deadline of one step's rollout; an engine that gives no sign of life then counts as lost", above=0)
    max_engine_restarts: int = key(0, "lost engines that a run may replace, synced before they serve; 0: a lost engine ends the run", min=0)
    sleep_level: Literal[0, 1, 2] | None = key(
        None,
        "vLLM's sleep level of engines while the actor has their GPUs: 2: weights are dropped; 1: weights wait in host memory; 0: awake; "
        "null: 2 where actor and engines share GPUs (1 with weight_sync.lora adapter: 2 has the base sent again), else 0",
    )
    cuda_graph_max_bs: int | None = key(None, "largest batch captured in a CUDA graph; null: vLLM's default", min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticRecipe:
    """What the folder of ``ArithmeticConfig`` holds: the keys of ``arithmetic`` that its content depends on."""

    seed: int = key(0, "seed of weights and problems", bounds=SEED)
    max_operand: int = key(4, "problems are a+b with both operands from 0 to this", min=1)
    num_problems: int = key(2048, "lines of train.jsonl, drawn with repetition; val.jsonl has each problem once", min=1)
    num_supervised: int = key(4096, "lines of supervised.jsonl, drawn with repetition", min=1)
    num_held_out: int = key(0, "problems that no supervised line has, each with its answer in held_out.jsonl; 0: no such file", min=0)
    supervised_noise: float = key(0.65, "share of supervised lines with a wrong answer; what GRPO has to unlearn", min=0, below=1)
    hidden_size: int = key(128, "width of the model; a multiple of 32, the smallest head vLLM runs on CPU", min=32)
    num_layers: int = key(2, "layers of the model", min=1)
    num_documents: int = key(0, "lines of documents.jsonl, plain text for pretraining; 0: no such file", min=0)
    num_experts: int = key(0, "experts of each layer, two of them for a token: the model is a Qwen3-MoE; 0: a dense Qwen2", min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticConfig(ArithmeticRecipe):
    """``arithmetic``: the locally made model, tokenizer and problems of the CPU default; absent: none are made."""

    path: str = key(doc="folder that receives model/, train.jsonl, val.jsonl and supervised.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRecipe:
    """What the folder of ``PicturesConfig`` holds: the keys of ``pictures`` that its content depends on."""

    seed: int = key(0, "seed of weights, pictures and questions", bounds=SEED)
    num_train: int = key(8192, "rows of train.jsonl, each with a picture of its own", min=1)
    num_held_out: int = key(256, "rows of held_out.jsonl, of combinations of shape, colour and digit that train.jsonl lacks", min=1)
    hidden_size: int = key(128, "width of the language model; a multiple of 32, the smallest head vLLM runs on CPU", min=32)
    num_layers: int = key(2, "layers of the language model", min=1)
    vision_hidden_size: int = key(128, "width of the vision tower; a multiple of 32", min=32)
    vision_depth: int = key(2, "blocks of the vision tower", min=1)
    questions: tuple[Literal["shape", "colour", "digit"], ...] = key(("shape", "colour", "digit"), "what pictures are asked about")
    supervised_noise: float = key(
        0.0, "share of wrong answers in supervised.jsonl, the rows of train.jsonl once more; what GRPO has to unlearn; 0: no such file",
        min=0, below=1,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturesConfig(PictureRecipe):
    """``pictures``: the locally made vision-language model and its drawn pictures with questions; absent: none are made."""

    path: str = key(doc="folder that receives model/, train.jsonl, held_out.jsonl, the pictures of both, and supervised.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededModelConfig:
    """``seeded_model``: a model of given shapes with seeded random weights, made locally; absent: none is made."""

    path: str = key(
        doc="folder that receives it, made unless it holds it already; used where rollout.model.model_path (SFT: actor.model.model_path) "
        "names it"
    )
    seed: int = key(0, "seed of the weights, which are not made with actor.megatron.convert_from_hf False", bounds=SEED)
    hf_config: Mapping[str, Any] | str = key(
        doc="content of its config.json, or the name of a model whose shapes it has, as `rlsync plan` knows them, e.g. llama3-8b; token "
        "ids and dtype are added"
    )
    tokenizer: str | None = key(None, "HF folder whose tokenizer it gets; null: a token for each byte")
    twin: bool = key(False, "sizes are cut to those of a tiny model of the same architecture, to try a recipe on the CPU")

    @property
    def config_json(self) -> dict[str, Any]:
        """Content of its config.json, without what its tokenizer adds. Raises ConfigError for a name that no shape has."""
        shape = dict(self.hf_config) if isinstance(self.hf_config, Mapping) else SHAPES.get(self.hf_config)
        if shape is None:
            raise ConfigError(f"seeded_model.hf_config names {self.hf_config!r}; shapes are known of {', '.join(SHAPES)}")
        return twin_of(shape) if self.twin else dict(shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonConfig(ABC):
    """What every run has, in the order of the yaml; ``algorithm`` and ``data`` are typed by each kind of run."""

    cluster: ClusterConfig = key(doc="")
    runner: RunnerConfig = key(doc="")
    algorithm: Any = key(doc="")
    rollout: RolloutConfig = key(doc="")
    data: Any = key(doc="")
    actor: ActorConfig = key(ActorConfig(), "")
    weight_sync: SyncConfig = key(SyncConfig(), "")
    arithmetic: ArithmeticConfig | None = key(None, "")
    pictures: PicturesConfig | None = key(None, "")
    seeded_model: SeededModelConfig | None = key(None, "")

    @property
    def model_path(self) -> str:
        """HF folder that architecture and, unless it is named elsewhere, tokenizer and weights come from."""
        return self.rollout.model.model_path

    @property
    @abstractmethod
    def model_key(self) -> str:
        """The key that names ``model_path``, for messages."""

    @property
    @abstractmethod
    def has_engines(self) -> bool:
        """Whether engines are started."""

    @property
    @abstractmethod
    def has_reference(self) -> bool:
        """Whether the initial weights are kept beside the trained ones."""

    @property
    @abstractmethod
    def data_paths(self) -> tuple[str, ...]:
        """Every data file that the run reads."""
