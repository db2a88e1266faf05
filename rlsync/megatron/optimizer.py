"""Megatron's optimizer and learning-rate schedule, from typed options.

Owns the connection between model, optimizer and schedule of pipeline passes (loss scale, gradient reduction). Must not
know losses, data or files.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.utils import get_te_version

from rlsync.errors import ConfigError, GradientError
from rlsync.megatron.model import parts_of_parameters
from rlsync.megatron.parallel import compute_device
from rlsync.models import PARTS, Part

# Key of a parameter group that has a learning rate of its own.
OWN_LR = "own_lr"
DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """Adam and what surrounds it; fields as in Megatron's ``OptimizerConfig``. The precision is the model's.

    ``loss_scale`` fixes the fp16 loss scale; None lets it move between ``min_loss_scale`` and where gradients overflow,
    from ``initial_loss_scale``, doubling after ``loss_scale_window`` steps. ``clip_grad`` 0 means no clipping.
    ``optimizer_offload_fraction`` is the share of the optimizer that is on the host with ``optimizer_cpu_offload``.
    ``part_lr`` are learning rates of parts of a vision-language model in place of ``lr``; a schedule gives them its shape.
    """

    lr: float
    min_lr: float = 0.0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    loss_scale: float | None = None
    initial_loss_scale: float = 2.0**16
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    hysteresis: int = 2
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    use_precision_aware_optimizer: bool = False
    log_num_zeros_in_grad: bool = False
    part_lr: Mapping[Part, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """Learning rate and weight decay over optimizer steps; fields as in Megatron's arguments.

    Give ``lr_warmup_iters`` or ``lr_warmup_fraction`` (of ``lr_decay_iters``), not both.
    """

    max_lr: float
    min_lr: float = 0.0
    lr_decay_style: DecayStyle = "constant"
    lr_decay_iters: int = 1
    lr_warmup_iters: int = 0
    lr_warmup_fraction: float | None = None
    lr_warmup_init: float = 0.0
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    start_weight_decay: float = 0.01
    end_weight_decay: float = 0.01
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"


# What to do about gradients that are not finite.
AFTER_NAN = (
    "no weight was changed by them; go on from the last checkpoint, and where they come back, lower the learning rate, or compute in a "
    "wider precision, or look for what is odd in the data of that step"
)


class FiniteSteps(ChainedOptimizer):
    """Megatron's optimizers of a rank, stepped together and by finite gradients only.

    Where a loss is scaled, in fp16, Megatron skips a step that overflowed before it takes this norm. In bf16 and fp32 it looks at nothing,
    and one nan would become all weights.

    Attributes:
        host_threads: how many threads compute what of a step is computed on the host (``optimizer_cpu_offload``); None: as many as else.
    """

    host_threads: int | None = None

    def step(self) -> tuple[bool, float | None, int | None]:
        """As Megatron's: whether weights were changed, norm of the gradient, count of its zeros. Collective over all ranks."""
        with _threads(self.host_threads):
            done: tuple[bool, float | None, int | None] = super().step()
        return done

    def get_grad_norm(self) -> float:
        """L2 norm of the whole gradient before clipping. Collective over all ranks.

        Megatron brings it to the host to clip by, before weights change, so a look at it costs no further wait.

        Raises GradientError, on every rank, where it is not finite.
        """
        norm = float(super().get_grad_norm())
        if not math.isfinite(norm):
            raise GradientError(f"the norm of the gradients is {norm}: {AFTER_NAN}")
        return norm


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch compute on the host with ``count`` threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores_of_rank() -> int:
    """This rank's share of the cores of its host. Collective over all ranks."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return max(1, len(os.sched_getaffinity(0)) // Counter(names)[socket.gethostname()])


def build_optimizer(models: Sequence[torch.nn.Module], options: OptimizerOptions) -> MegatronOptimizer:
    """The optimizer of these chunks, connected to them. Collective over all ranks.

    It copies the parameters when the model is not fp32 or the optimizer is distributed: load weights before, or call
    its ``reload_model_params()`` after loading them. Whether it is distributed was decided by ``DdpOptions``.

    Raises:
        ConfigError: the chunks are not wrapped in Megatron's DistributedDataParallel, ``optimizer_cpu_offload`` without CUDA, or
            ``use_precision_aware_optimizer`` without TransformerEngine, whose FusedAdam it is.
    """
    if options.optimizer_cpu_offload and compute_device().type != "cuda":
        raise ConfigError("optimizer_cpu_offload moves optimizer state from a GPU to the host, and there is no GPU; set it to False")
    if options.use_precision_aware_optimizer and get_te_version() is None:
        raise ConfigError("use_precision_aware_optimizer is TransformerEngine's, which is not installed; install it or set it to False")
    for index, model in enumerate(models):
        if not isinstance(model, DistributedDataParallel):
            raise ConfigError(f"chunk {index} is a bare {type(model).__name__}; build the model with wrap_with_ddp=True to train it")
    config, ddp = models[0].config, models[0].ddp_config
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        fp16=config.fp16,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        loss_scale=options.loss_scale if config.fp16 else None,
        initial_loss_scale=options.initial_loss_scale,
        min_loss_scale=options.min_loss_scale,
        loss_scale_window=options.loss_scale_window,
        hysteresis=options.hysteresis,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
        optimizer_cpu_offload=options.optimizer_cpu_offload,
        optimizer_offload_fraction=options.optimizer_offload_fraction,
        use_precision_aware_optimizer=options.use_precision_aware_optimizer,
        # Else main parameters would not be tensors that a checkpoint could hold, but what the weights lack of them.
        store_param_remainders=False,
        log_num_zeros_in_grad=options.log_num_zeros_in_grad,
    )
    overrides = {**get_standard_config_overrides(settings), **_overrides_by_part(models, options)}
    made = get_megatron_optimizer(settings, list(models), overrides)
    optimizer = FiniteSteps(made.chained_optimizers if isinstance(made, ChainedOptimizer) else [made])
    if options.optimizer_cpu_offload:
        # Ranks have one thread each for all else (``rank_environment``): Adam of 4 billion parameters takes nine seconds with one.
        optimizer.host_threads = cores_of_rank()
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        # The schedules take one function for a single chunk and a list for several.
        functions = [model.no_sync for model in models]
        config.no_sync_func = functions[0] if len(functions) == 1 else functions
    return optimizer


def _overrides_by_part(models: Sequence[torch.nn.Module], options: OptimizerOptions) -> dict[ParamKey, ParamGroupOverride]:
    """Groups of parameters for the parts of a vision tower, none for a model of text."""
    members: dict[Part, set[int]] = {part: set() for part in PARTS}
    for parameter, part in parts_of_parameters(models):
        members[part].add(id(parameter))
    overrides: dict[ParamKey, Any] = {}
    for number, part in enumerate(PARTS):
        if part != "language_model":
            key = ParamKey(predicate=ParamPredicate(part, partial(_is_member, members[part])))
            # Megatron finds the saved state of a group by its multipliers; of this one else only ``rates_of_parts`` reads.
            overrides[key] = {"lr_mult": 1.0 + number}
            if (lr := options.part_lr.get(part)) is not None:
                overrides[key] |= {OWN_LR: lr, "lr": lr, "max_lr": lr, "min_lr": min(options.min_lr, lr)}
    return overrides


def rates_of_parts(optimizer: MegatronOptimizer) -> dict[Part, float]:
    """The present learning rate of each part of the model that is trained; equal on all ranks, as Megatron gives all the same groups."""
    return {PARTS[round(group["lr_mult"]) - 1]: float(group["lr"]) for group in optimizer.param_groups}


def _is_member(ids: Set[int], parameter: torch.nn.Parameter) -> bool:
    return id(parameter) in ids


def build_scheduler(optimizer: MegatronOptimizer, options: SchedulerOptions) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay; sets those of step 0 at once. ``step(1)`` is one optimizer step.

    Raises:
        ConfigError: options that contradict each other.
    """
    warmup = _warmup_steps(options)
    if options.min_lr > options.max_lr:
        raise ConfigError(f"min_lr {options.min_lr} is above max_lr {options.max_lr}")
    if options.lr_decay_style == "WSD" and options.lr_wsd_decay_iters is None:
        raise ConfigError("lr_decay_style WSD needs lr_wsd_decay_iters, the number of steps of its last phase")
    if options.weight_decay_incr_style == "constant" and options.start_weight_decay != options.end_weight_decay:
        raise ConfigError(
            f"start_weight_decay {options.start_weight_decay} and end_weight_decay {options.end_weight_decay} differ, "
            "but weight_decay_incr_style is constant"
        )
    for group in optimizer.param_groups:
        # What a group says comes before what the schedule is told, and every group of Megatron 0.16 says the rates of the optimizer.
        peak = group.get(OWN_LR, options.max_lr)
        group |= {"max_lr": peak, "min_lr": options.min_lr * peak / options.max_lr if options.max_lr else 0.0}
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.max_lr,
        min_lr=options.min_lr,
        lr_warmup_steps=warmup,
        # A constant rate never looks at the end of the decay, but the class wants it after the warm-up.
        lr_decay_steps=max(options.lr_decay_iters, warmup + 1) if options.lr_decay_style == "constant" else options.lr_decay_iters,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.start_weight_decay,
        end_wd=options.end_weight_decay,
        wd_incr_steps=options.lr_decay_iters,
        wd_incr_style=options.weight_decay_incr_style,
        wsd_decay_steps=options.lr_wsd_decay_iters,
        lr_wsd_decay_style=options.lr_wsd_decay_style,
    )


def _warmup_steps(options: SchedulerOptions) -> int:
    if options.lr_warmup_fraction is not None and options.lr_warmup_iters:
        raise ConfigError("give lr_warmup_fraction or lr_warmup_iters, not both")
    if options.lr_warmup_fraction is None:
        warmup = options.lr_warmup_iters
    else:
        warmup = int(options.lr_warmup_fraction * options.lr_decay_iters)
    if options.lr_decay_style != "constant" and warmup >= options.lr_decay_iters:
        raise ConfigError(f"the warm-up of {warmup} steps leaves nothing of lr_decay_iters {options.lr_decay_iters}")
    return warmup
