"""State of Megatron's optimizers: what a distributed one gathers and scatters, and what Megatron 0.16 leaves undone on the way.

Knows no file; ``rlsync.megatron.state`` says what is kept where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, param_group_identifier_keys
from torch import Tensor

from rlsync.errors import CheckpointError

# Keys of a parameter group that count or hold what training made; all others are options of the run.
_TRAINED = ("params", "step")


def optimizer_state(optimizer: MegatronOptimizer) -> Any:
    """``optimizer.state_dict()``, also of a pipeline stage on which nothing is trained. Not collective."""
    allocate_adam_state(optimizer)
    inner = [part.optimizer for part in distributed_parts(optimizer)]
    idle: list[Any] = [each.state for each in inner if isinstance(each, torch.optim.Adam | torch.optim.AdamW) and not each.state]
    for state in idle:
        # Megatron 0.16 asserts that some parameter has a step counter.
        state["nothing"] = {"step": torch.tensor(0.0)}
    try:
        return optimizer.state_dict()
    finally:
        for state in idle:
            state.clear()


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


def check_optimizer_state(optimizer: MegatronOptimizer, state: Any) -> None:
    """Raise what Megatron or torch would raise in :func:`load_optimizer_state`, where ``state`` has not its form. Changes nothing."""
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else _typed(state, list, "the optimizer")
    for part, part_state in zip(parts, states, strict=True):
        _typed(part_state, dict, "the optimizer")
        if getattr(part, "is_stub_optimizer", False):
            continue
        _typed(part_state.get("grad_scaler", {}), dict, "grad_scaler")
        inner = part_state if isinstance(part, FP32Optimizer) else _typed(part_state["optimizer"], dict, "optimizer")
        saved = [_typed(group, dict, "an entry of param_groups") for group in _typed(inner["param_groups"], list, "param_groups")]
        absent = {_identity(group) for group in part.param_groups} - {_identity(group) for group in saved}
        if absent:
            raise LookupError(f"no group of parameters {', '.join(map(str, sorted(absent)))}")
        if isinstance(part, DistributedOptimizer):
            continue
        sizes_then, sizes_now = ([len(group["params"]) for group in groups] for groups in (saved, part.param_groups))
        if sizes_then != sizes_now:
            raise ValueError(f"groups of {sizes_then} parameters, this run has {sizes_now}")
        for entry in _typed(inner["state"], dict, "state").values():
            _typed(entry, dict, "an entry of state")
        if isinstance(part, Float16OptimizerWithFloat16Params):
            masters_then, masters_now = (
                [[tuple(tensor.shape) for tensor in group] for group in groups]
                for groups in (part_state["fp32_from_fp16_params"], part.fp32_from_float16_groups)
            )
            if masters_then != masters_now:
                raise ValueError("fp32_from_fp16_params are of other shapes than those of this run")


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in param_group_identifier_keys)


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def parameter_ranges(optimizer: MegatronOptimizer) -> list[list[list[tuple[int, int]]]]:
    """Where parameters lie in the tensors of ``distributed_optimizer_state``, by part, gradient buffer and parameter. Not collective.

    The gaps that align parameters depend on how buffers are cut into buckets, so that two cuts may have equally many elements and
    other places.
    """
    return [[_ranges(buffer) for buffer in part.buffers] for part in distributed_parts(optimizer)]


def parameter_names(optimizer: MegatronOptimizer, names: Mapping[int, str]) -> list[list[list[str]]]:
    """Names of the parameters of ``parameter_ranges``, in the same form; ``names`` by ``id`` of the parameter. Not collective."""
    parts = distributed_parts(optimizer)
    return [[[names[id(parameter)] for parameter in buffer.param_index_map] for buffer in part.buffers] for part in parts]


def _ranges(buffer: Any) -> list[tuple[int, int]]:
    begins, total = [], 0
    for bucket in buffer.buckets:
        begins.append(bucket.offset - total)
        total += bucket.numel_unpadded
    return [(start - begins[bucket], end - begins[bucket]) for start, end, bucket in buffer.param_index_map.values()]


def fit_distributed_optimizer_state(
    states: Sequence[Any], saved: Sequence[Sequence[Sequence[tuple[int, int]]]], optimizer: MegatronOptimizer, source: str
) -> None:
    """Move parameters in ``states``, in place, from their ``saved`` ranges to those of ``optimizer``: it may have other buckets.

    ``states`` as ``distributed_optimizer_state``, ``saved`` as ``parameter_ranges`` gave them. Raises CheckpointError where they are of
    other parameters: Megatron would fail on the first data-parallel rank alone while the others wait for it.
    """
    running = parameter_ranges(optimizer)
    sizes_then, sizes_now = ([[[end - start for start, end in ranges] for ranges in part] for part in side] for side in (saved, running))
    if sizes_then != sizes_now or len(states) != len(running):
        raise CheckpointError(
            f"{source} holds optimizer state of {len(states)} parts, of parameters that {'are' if sizes_then == sizes_now else 'are not'} "
            f"those of this run, which has {len(running)} parts; load weights alone"
        )
    for part, state, then, now in zip(distributed_parts(optimizer), states, saved, running, strict=True):
        if not leads_part(part):
            continue
        for index, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
            (content,), (dtypes,) = state[index].values(), ranges
            state[index] = {dtypes: _moved(content, then[index], now[index], buffer.numel_unpadded)}


def _moved(content: Mapping[str, Any], then: Sequence[tuple[int, int]], now: Sequence[tuple[int, int]], numel: int) -> dict[str, Any]:
    """Tensors of one gradient buffer with every parameter at its range of now."""
    moved: dict[str, Any] = {"numel_unpadded": numel}
    for key in content.keys() - moved.keys():
        moved[key] = torch.zeros(numel, dtype=content[key].dtype)
        for (start, end), (new_start, new_end) in zip(then, now, strict=True):
            moved[key][new_start:new_end] = content[key][start:end]
    return moved


def distributed_optimizer_state(optimizer: MegatronOptimizer) -> list[Any] | None:
    """Content of ``distrib_optim.pt``: main parameters and moments of the whole DP group, float32 on the CPU, by part of the optimizer.

    The part of experts has another DP group than the rest. A rank that is not the first of a part's has None in its place, and one that
    is the first of none returns None, as every rank does where the optimizer is not distributed. Collective over these groups.
    """
    parts = distributed_parts(optimizer)
    allocate_adam_state(optimizer)
    states = [part.get_parameter_state_dp_zero() for part in parts]
    firsts = [leads_part(part) for part in parts]
    return [state if is_first else None for state, is_first in zip(states, firsts, strict=True)] if any(firsts) else None


def leads_part(part: DistributedOptimizer) -> bool:
    """Whether this rank is the first of a part's data-parallel group, where the state of the whole group is gathered."""
    return dist.get_rank(part.data_parallel_group) == 0


def restore_distributed_optimizer_state(states: Sequence[Any] | None, optimizer: MegatronOptimizer) -> None:
    """Put back what ``distributed_optimizer_state`` returned; a part's state counts on the first rank of its data-parallel group only.

    Does nothing for other optimizers. Collective over these groups.
    """
    for index, part in enumerate(distributed_parts(optimizer)):
        # Without gradients, because float32 main parameters are views of the model's.
        with torch.no_grad(), _steps_aside(part):
            part.load_parameter_state_from_dp_zero(states[index] if states is not None else None)


def set_parameter_states(optimizer: MegatronOptimizer, state_of: Callable[[torch.nn.Parameter], Mapping[str, Tensor]]) -> None:
    """Set main parameters and moments of this rank's shards of a distributed optimizer. Not collective.

    Args:
        state_of: of a parameter of this rank, whole, each of PLANES in float32.
    """
    allocate_adam_state(optimizer)
    for part in distributed_parts(optimizer):
        # Without gradients, because float32 main parameters are views of the model's.
        with torch.no_grad(), _steps_aside(part):
            for parameter in part.model_param_gbuf_map:
                shard = part._get_model_param_range_map(parameter)["param"]
                states = {plane: state.reshape(-1)[shard.start : shard.end] for plane, state in state_of(parameter).items()}
                part._set_main_param_and_optimizer_states(parameter, states)


def count_steps(optimizer: MegatronOptimizer, steps: float, grad_scaler: Mapping[str, Any] | None) -> None:
    """Have a distributed optimizer go on as one that has counted ``steps``, with the state of its dynamic loss scale. Not collective."""
    state = optimizer_state(optimizer)
    for part in state if isinstance(state, list) else [state]:
        for group in part["optimizer"]["param_groups"]:
            # A group of TransformerEngine's counts whole ones.
            group["step"] = int(steps) if isinstance(group.get("step"), int) else steps
        if grad_scaler is not None and "grad_scaler" in part:
            part["grad_scaler"] = dict(grad_scaler)
    load_optimizer_state(optimizer, state)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def optimizer_config(optimizer: MegatronOptimizer) -> OptimizerConfig:
    """The options an optimizer was built with."""
    return _parts(optimizer)[0].config


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
