"""State of Megatron's optimizers: what a distributed one gathers and scatters, and what Megatron 0.16 leaves undone on the way.

Knows no file; ``rlsync.megatron.state`` says what is kept where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from torch import Tensor

from rlsync.errors import CheckpointError
from rlsync.megatron.parallel import is_first_replica

# Keys of a parameter group that count or hold what training made; all others are options of the run.
_TRAINED = ("params", "step")


def load_optimizer_state(optimizer: MegatronOptimizer, state: Any) -> None:
    """Restore moments, step counters and a dynamic loss scale from ``optimizer.state_dict()``. Not collective.

    Learning rate, betas, epsilon, weight decay and a static loss scale stay those ``optimizer`` was built with: Megatron would take
    the saved ones over. A dynamic loss scale starts anew where the saved one was static.
    """
    own = [{key: value for key, value in group.items() if key not in _TRAINED} for group in optimizer.param_groups]
    parts = _parts(optimizer)
    for index, part in enumerate(parts):
        part_state = state if len(parts) == 1 else state[index]
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None and part_state.get("grad_scaler", {}).keys() != scaler.state_dict().keys():
            part_state["grad_scaler"] = scaler.state_dict()
    optimizer.load_state_dict(state)
    separate_steps(optimizer)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def check_distributed_optimizer_state(states: Sequence[Any], optimizer: MegatronOptimizer, source: str) -> None:
    """Raise CheckpointError where ``states`` (of ``distributed_optimizer_state``) were cut into other gradient buffers.

    Megatron would fail on the first data-parallel rank alone while the others wait for it.
    """
    for part, state in zip(distributed_parts(optimizer), states, strict=True):
        for index, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
            saved = {dtypes: content["numel_unpadded"] for dtypes, content in state[index].items()}
            running = dict.fromkeys(ranges, buffer.numel_unpadded)
            if saved != running:
                raise CheckpointError(
                    f"{source}: gradient buffer {index} held {_described(saved)} then, {_described(running)} now; resume with the saved "
                    "ddp_bucket_size, overlap_grad_reduce, overlap_param_gather and accumulate_allreduce_grads_in_fp32"
                )


def _described(sizes: Mapping[Any, int]) -> str:
    return ", ".join(f"{numel} elements of {dtypes}" for dtypes, numel in sizes.items())


def distributed_optimizer_state(optimizer: MegatronOptimizer) -> list[Any] | None:
    """Content of ``distrib_optim.pt``: main parameters and moments of the whole DP group, float32 on the CPU.

    None on all data-parallel ranks but the first, and everywhere when the optimizer is not distributed. Collective over
    the DP group.
    """
    parts = distributed_parts(optimizer)
    allocate_adam_state(optimizer)
    states = [part.get_parameter_state_dp_zero() for part in parts]
    return states if parts and is_first_replica() else None


def restore_distributed_optimizer_state(states: Sequence[Any] | None, optimizer: MegatronOptimizer) -> None:
    """Put back what ``distributed_optimizer_state`` returned; ``states`` counts on the first data-parallel rank only.

    Does nothing for other optimizers. Collective over the DP group.
    """
    for index, part in enumerate(distributed_parts(optimizer)):
        # Without gradients, because float32 main parameters are views of the model's.
        with torch.no_grad(), _steps_aside(part):
            part.load_parameter_state_from_dp_zero(states[index] if states is not None else None)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Those of an optimizer, itself or chained, that keep their state in shards."""
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give a distributed optimizer that has taken no step yet the zeros that its first step would start from.

    Its ``state_dict`` of Megatron 0.16 asserts that there is a state; under fp16 the first steps may all be skipped.
    """
    for part in distributed_parts(optimizer):
        if part.optimizer is None or part.optimizer.state:
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for values in part.optimizer.state.values():
                values["step"] = torch.tensor(0.0)


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own step counter.

    ``DistributedOptimizer.load_state_dict`` of Megatron 0.16 hands one tensor to all of them, and torch's Adam then
    counts a step for each parameter.
    """
    for part in distributed_parts(optimizer):
        for values in part.optimizer.state.values() if part.optimizer is not None else ():
            if isinstance(values.get("step"), Tensor):
                values["step"] = values["step"].clone()


@contextmanager
def _steps_aside(part: DistributedOptimizer) -> Iterator[None]:
    """Hide the step counters of torch's Adam from the loading of moments, which Megatron 0.16 expects to be alone."""
    states = list(part.optimizer.state.values()) if part.optimizer is not None else []
    steps = [values.pop("step", None) for values in states]
    try:
        yield
    finally:
        for values, step in zip(states, steps, strict=True):
            if step is not None:
                values["step"] = step
