"""The ``actor`` section: Megatron model, optimizer, schedule, tokenizer and checkpoint switches.

Owns keys, types, defaults and meanings; the rules between them live in ``validate``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from workers.config.fields import SEED, key

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorModelConfig:
    """``actor.model``: layout and execution of the Megatron model. Its architecture always comes from the HF config.

    Fields from ``recompute_method`` on are passed to Megatron's ``TransformerConfig`` under the same name when not null.
    """

    megatron_checkpoint: str | None = key(None, "Megatron checkpoint to start from; only with actor.megatron.use_hf_ckpt False")
    precision: Precision = key("bf16", "fp32, bf16 or fp16")
    tensor_model_parallel_size: int = key(1, "TP", min=1)
    pipeline_model_parallel_size: int = key(1, "PP", min=1)
    virtual_pipeline_model_parallel_size: int | None = key(None, "virtual stages per pipeline stage", min=1)
    context_parallel_size: int = key(1, "CP", min=1)
    expert_model_parallel_size: int = key(1, "EP", min=1)
    expert_tensor_parallel_size: int | None = key(None, "ETP; null: TP for dense models, 1 with experts", min=1)
    decoder_first_pipeline_num_layers: int | None = key(None, "layers of the first pipeline stage; null: even split", min=1)
    decoder_last_pipeline_num_layers: int | None = key(None, "layers of the last pipeline stage; null: even split", min=1)
    sequence_parallel: bool = key(False, "shard activations between TP regions over TP")
    make_vocab_size_divisible_by: int = key(1, "the vocabulary is padded to a multiple of this times TP", min=1)
    recompute_method: Literal["block", "uniform"] | None = key(None, "with recompute_granularity full")
    recompute_granularity: Literal["full", "selective"] | None = key(None, "activation recomputation; null: none")
    recompute_num_layers: int | None = key(None, "with recompute_granularity full", min=1)
    apply_rope_fusion: bool | None = key(None, "fused rotary embedding (TransformerEngine)")
    bias_activation_fusion: bool | None = key(None, "fuse bias and activation")
    bias_dropout_fusion: bool | None = key(None, "fuse bias and dropout")
    gradient_accumulation_fusion: bool | None = key(None, "accumulate weight gradients in the GEMM (Apex)")
    persist_layer_norm: bool | None = key(None, "persistent fused layer norm")
    attention_softmax_in_fp32: bool | None = key(None, "softmax of attention scores in fp32")
    batch_p2p_comm: bool | None = key(None, "batch pipeline sends and receives")
    variable_seq_lengths: bool | None = key(None, "pipeline stages exchange shapes first")
    use_cpu_initialization: bool | None = key(None, "initialise weights on the host")
    init_method_std: float | None = key(None, "standard deviation of fresh weights", above=0)
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] | None = key(None, "how tokens reach experts")
    moe_router_load_balancing_type: str | None = key(None, "router load balancing, e.g. aux_loss or none")
    moe_router_pre_softmax: bool | None = key(None, "softmax before the top-k choice")
    moe_aux_loss_coeff: float | None = key(None, "weight of the load-balancing loss", min=0)
    moe_router_bias_update_rate: float | None = key(None, "step of the router's expert bias", min=0)
    moe_permute_fusion: bool | None = key(None, "fused token permutation (TransformerEngine)")

    def transformer_overrides(self) -> dict[str, Any]:
        """Fields of Megatron's ``TransformerConfig`` that the user set, by name."""
        names = [f.name for f in fields(self)]
        passed = names[names.index("recompute_method") :]
        return {name: getattr(self, name) for name in passed if getattr(self, name) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """``actor.optim``: Megatron's optimizer."""

    optimizer: Literal["adam"] = key("adam", "optimizer")
    bf16: bool | None = key(None, "must not contradict actor.model.precision, which decides")
    fp16: bool | None = key(None, "must not contradict actor.model.precision, which decides")
    lr: float = key(1e-6, "learning rate; the peak when a schedule is used", min=0)
    min_lr: float = key(0.0, "floor of a decaying schedule", min=0)
    adam_beta1: float = key(0.9, "decay of the first moment", min=0, below=1)
    adam_beta2: float = key(0.95, "decay of the second moment", min=0, below=1)
    adam_eps: float = key(1e-8, "added to the denominator", above=0)
    weight_decay: float = key(0.01, "decoupled weight decay", min=0)
    clip_grad: float = key(1.0, "global gradient norm; 0: no clipping", min=0)
    use_distributed_optimizer: bool = key(True, "shard optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = key(False, "reduce gradients during backward")
    overlap_param_gather: bool = key(False, "gather parameters during forward; a sync gathers them first")
    loss_scale: float | None = key(None, "static fp16 loss scale; null: dynamic", above=0)
    optimizer_cpu_offload: bool = key(False, "keep optimizer state and step on the host")
    optimizer_offload_fraction: float = key(1.0, "with optimizer_cpu_offload", min=0, max=1)
    use_precision_aware_optimizer: bool = key(False, "optimizer state in lower precision")


@dataclass(frozen=True, slots=True, kw_only=True)
class LrSchedConfig:
    """``actor.lr_sched``: Megatron's learning-rate schedule."""

    lr_warmup_fraction: float | None = key(None, "warm-up as a share of lr_decay_iters; null: lr_warmup_iters", min=0, max=1)
    lr_warmup_iters: int = key(0, "warm-up optimizer steps", min=0)
    lr_warmup_init: float = key(0.0, "first learning rate of the warm-up", min=0)
    max_lr: float | None = key(None, "null: actor.optim.lr", min=0)
    min_lr: float | None = key(None, "null: actor.optim.min_lr", min=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = key("constant", "shape after the warm-up")
    lr_decay_iters: int = key(10, "optimizer steps until min_lr; not used by constant", min=1)
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = key("exponential", "with WSD")
    lr_wsd_decay_iters: int | None = key(None, "with WSD", min=1)
    start_weight_decay: float | None = key(None, "required unless lr_decay_style is constant, forbidden then", min=0)
    end_weight_decay: float | None = key(None, "required unless lr_decay_style is constant, forbidden then", min=0)
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = key("constant", "path from start_weight_decay to end_weight_decay")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """``actor.tokenizer``."""

    tokenizer_model: str | None = key(None, "HF folder; null: rollout.model.model_path")
    use_fast: bool = key(True, "the Rust tokenizer")
    trust_remote_code: bool = key(False, "run the model folder's own code")
    padding_side: Literal["right"] = key("right", "responses follow prompts without a gap")


@dataclass(frozen=True, slots=True, kw_only=True)
class CkptConvertorConfig:
    """``actor.megatron.ckpt_convertor``: where initial weights come from."""

    hf_model_path: str | None = key(None, "HF folder with the initial weights; null: rollout.model.model_path")
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
    use_hf_ckpt: bool = key(True, "start from HF weights; False needs actor.model.megatron_checkpoint or runner.resume_dir")
    ckpt_convertor: CkptConvertorConfig = key(CkptConvertorConfig(), "")
    distributed_backend: Literal["nccl", "gloo"] | None = key(None, "null: nccl on GPUs, gloo without")
    distributed_timeout_minutes: float = key(30.0, "deadline of a collective", above=0)
    ddp_bucket_size: int | None = key(None, "elements in a gradient bucket; null: Megatron's default", min=1)
    accumulate_allreduce_grads_in_fp32: bool = key(True, "accumulate and reduce gradients in fp32")
    check_for_nan_in_loss_and_grad: bool = key(False, "stop at a nan")
    no_load_optim: bool = key(False, "resume without optimizer state")
    no_save_optim: bool = key(False, "checkpoints without optimizer state")


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
    enable_dp_load_balance: bool = key(False, "deal samples to data-parallel ranks by length")
    seed: int = key(1234, "of dropout, initialisation and shuffle_rollout", bounds=SEED)
    micro_batch_size: int | None = key(None, "derived: algorithm.training_batch_size_per_gpu", min=1)
    global_batch_size: int | None = key(None, "derived: rollout_batch_size x group_size // n_minibatches", min=1)
    model: ActorModelConfig = key(ActorModelConfig(), "")
    optim: OptimConfig = key(OptimConfig(), "")
    lr_sched: LrSchedConfig = key(LrSchedConfig(), "")
    tokenizer: TokenizerConfig = key(TokenizerConfig(), "")
    megatron: MegatronConfig = key(MegatronConfig(), "")
