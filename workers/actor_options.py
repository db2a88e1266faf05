"""What a run's configuration means for Megatron's parts and the policy loss: options out of keys, nothing else."""

from __future__ import annotations

from typing import Any

from rlsync.megatron.model import DdpOptions
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions
from rlsync.megatron.specs import SpecName
from workers.algorithms import PolicyLossOptions
from workers.config.actor import ActorConfig, ActorModelConfig
from workers.config.schema import AlgorithmConfig

SPECS: dict[str, SpecName] = {"decoder_gpt": "auto", "local_gpt": "local", "te_gpt": "te"}


def transformer_overrides(model: ActorModelConfig) -> dict[str, Any]:
    """``TransformerConfig`` fields by name."""
    return {
        "sequence_parallel": model.sequence_parallel,
        # Else every microbatch would be padded to the longest and tallest of them.
        "variable_seq_lengths": model.pipeline_model_parallel_size > 1,
        **model.transformer_overrides(),
    }


def ddp_options(actor: ActorConfig) -> DdpOptions:
    return DdpOptions(
        use_distributed_optimizer=actor.optim.use_distributed_optimizer,
        grad_reduce_in_fp32=actor.megatron.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=actor.optim.overlap_grad_reduce,
        overlap_param_gather=actor.optim.overlap_param_gather,
        bucket_size=actor.megatron.ddp_bucket_size,
        check_for_nan_in_grad=actor.megatron.check_for_nan_in_loss_and_grad,
    )


def optimizer_options(actor: ActorConfig, lr: float) -> OptimizerOptions:
    optim = actor.optim
    return OptimizerOptions(
        lr=lr,
        min_lr=min(optim.min_lr, lr),
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        loss_scale=optim.loss_scale,
        optimizer_cpu_offload=optim.optimizer_cpu_offload,
        optimizer_offload_fraction=optim.optimizer_offload_fraction if optim.optimizer_cpu_offload else 0.0,
        use_precision_aware_optimizer=optim.use_precision_aware_optimizer,
    )


def scheduler_options(actor: ActorConfig) -> SchedulerOptions:
    optim, schedule = actor.optim, actor.lr_sched
    assert schedule.max_lr is not None and schedule.min_lr is not None, "load_config derives both"
    first, last = schedule.start_weight_decay, schedule.end_weight_decay
    return SchedulerOptions(
        max_lr=schedule.max_lr,
        min_lr=schedule.min_lr,
        lr_decay_style=schedule.lr_decay_style,
        lr_decay_iters=schedule.lr_decay_iters,
        lr_warmup_iters=schedule.lr_warmup_iters,
        lr_warmup_fraction=schedule.lr_warmup_fraction,
        lr_warmup_init=schedule.lr_warmup_init,
        lr_wsd_decay_iters=schedule.lr_wsd_decay_iters,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
        start_weight_decay=optim.weight_decay if first is None else first,
        end_weight_decay=optim.weight_decay if last is None else last,
        weight_decay_incr_style=schedule.weight_decay_incr_style,
    )


def policy_loss_options(algorithm: AlgorithmConfig) -> PolicyLossOptions:
    low, high = algorithm.clip_ratio_low, algorithm.clip_ratio_high
    return PolicyLossOptions(
        loss_agg_func=algorithm.loss_agg_func,
        clip_ratio_low=algorithm.ratio_clip_eps if low is None else low,
        clip_ratio_high=algorithm.ratio_clip_eps if high is None else high,
        clip_ratio_c=algorithm.clip_ratio_c,
        clip_log_ratio_min=algorithm.clip_log_ratio_min,
        clip_log_ratio_max=algorithm.clip_log_ratio_max,
        early_stop_imp_ratio=algorithm.early_stop_imp_ratio,
        kl_beta=algorithm.kl_beta,
        kl_penalty_type=algorithm.kl_penalty_type,
        entropy_bonus=algorithm.entropy_bonus,
    )
