"""State of Megatron's optimizers: what each rank keeps of a distributed one, and what Megatron 0.16 leaves undone on the way.

Knows no file; ``rlsync.megatron.state`` says what is kept where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, param_group_identifier_keys
from torch import Tensor

from rlsync.errors import CheckpointError, first_few
from rlsync.models.shards import PLANES

# Keys of a parameter group that count or hold what training made; all others are options of the run.
_TRAINED = ("params", "step")
# What tells groups apart whatever rates a run gives them. Megatron-Core 0.19 finds the saved state of a group by its rates too.
_IDENTIFYING = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def optimizer_state(optimizer: MegatronOptimizer) -> Any:
    """``optimizer.state_dict()``, also of a pipeline stage on which nothing is trained. Not collective.

    Without the classes that an optimizer on the host names in its groups of parameters: they are the run's own, and no file of tensors
    and numbers can hold them.
    """
    allocate_adam_state(optimizer)
    inner = [part.optimizer for part in distributed_parts(optimizer)]
    idle: list[Any] = [each.state for each in inner if isinstance(each, torch.optim.Adam | torch.optim.AdamW) and not each.state]
    for state in idle:
        # Megatron 0.16 asserts that some parameter has a step counter.
        state["nothing"] = {"step": torch.tensor(0.0)}
    try:
        found = optimizer.state_dict()
    finally:
        for state in idle:
            state.clear()
    parts = _parts(optimizer)
    for part, part_state in zip(parts, [found] if len(parts) == 1 else found, strict=True):
        if not getattr(part, "is_stub_optimizer", False):
            inner = _inner(part, part_state)
            # New ones, because the dictionaries may be the optimizer's own.
            inner["param_groups"] = [
                {key: value for key, value in group.items() if not isinstance(value, type)} for group in inner["param_groups"]
            ]
    return found


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
        if not getattr(part, "is_stub_optimizer", False):
            _take_over_options(_inner(part, part_state)["param_groups"], part.param_groups)
    if any(isinstance(part.optimizer, HybridDeviceOptimizer) for part in distributed_parts(optimizer)):
        for index, part in enumerate(parts):
            part_state = state if len(parts) == 1 else state[index]
            if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, HybridDeviceOptimizer):
                _load_counters(part, part_state)
            else:
                part.load_state_dict(part_state)
    else:
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
        inner = _typed(_inner(part, part_state), dict, "optimizer")
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
                pairs = zip(masters_then, masters_now, strict=False)
                then, now = next(((a, b) for a, b in pairs if a != b), (masters_then, masters_now))
                raise ValueError(f"fp32_from_fp16_params has a group of shapes {then}, and this run has {now} in its place")


def _inner(part: MegatronOptimizer, part_state: Any) -> Any:
    """The state of torch's optimizer in that of a part."""
    return part_state if isinstance(part, FP32Optimizer) else part_state["optimizer"]


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in _IDENTIFYING)


def _take_over_options(saved: Sequence[dict[str, Any]], running: Sequence[Mapping[str, Any]]) -> None:
    """Give saved groups what Megatron finds them by, from those of this run that they are."""
    by_identity = {_identity(group): group for group in running}
    for group in saved:
        own = by_identity.get(_identity(group), group)
        options = {key: own[key] for key in param_group_identifier_keys if key in own}
        for key in param_group_identifier_keys:
            group.pop(key, None)
        group.update(options)


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {type(value).__name__}, expected a {kind.__name__}")
    return value


def parameter_ranges(optimizer: MegatronOptimizer) -> list[list[list[tuple[int, int]]]]:
    """Where parameters lie in the tensors of ``distributed_optimizer_content``, by part, gradient buffer and parameter. Not collective.

    The gaps that align parameters depend on how buffers are cut into buckets, so that two cuts may have equally many elements and
    other places.
    """
    return [[_ranges(buffer) for buffer in part.buffers] for part in distributed_parts(optimizer)]


def parameter_names(optimizer: MegatronOptimizer, names: Mapping[int, str]) -> list[list[list[str]]]:
    """Names of the parameters of ``parameter_ranges``, in the same form; ``names`` by ``id`` of the parameter. Not collective."""
    parts = distributed_parts(optimizer)
    return [[[names[id(parameter)] for parameter in buffer.param_index_map] for buffer in part.buffers] for part in parts]


def whole_parameter_names(optimizer: MegatronOptimizer, names: Mapping[int, str]) -> list[list[list[str]]]:
    """Names of the parameters whose state parts that are not distributed keep whole: by part and group, in the order of the state.
    ``names`` by ``id`` of the parameter. Not collective."""
    return [[[names[id(parameter)] for parameter in group] for group in _model_groups(part)] for part in _whole_parts(optimizer)]


def _whole_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The parts of an optimizer that keep the state of whole parameters."""
    return [part for part in _parts(optimizer) if not isinstance(part, DistributedOptimizer)]


def _model_groups(part: MegatronOptimizer) -> list[list[torch.nn.Parameter]]:
    """The model's parameters in the groups of a part that is not distributed, whose own may be float32 copies of them."""
    own: dict[int, torch.nn.Parameter] = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for halves, copies in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            own |= {id(copy): half for half, copy in zip(halves, copies, strict=True)}
    return [[own.get(id(parameter), parameter) for parameter in group["params"]] for group in part.param_groups]


def _ranges(buffer: Any) -> list[tuple[int, int]]:
    begins, total = [], 0
    for bucket in buffer.buckets:
        begins.append(bucket.offset - total)
        total += bucket.numel_unpadded
    return [(start - begins[bucket], end - begins[bucket]) for start, end, bucket in buffer.param_index_map.values()]


@dataclass(frozen=True, slots=True)
class SavedOrder:
    """Which parameter lies where in the flat tensors of a ``distrib_optim.pt``: for each part and gradient buffer of the optimizer that was
    saved, its parameters in order.

    Attributes:
        ranges: ``parameter_ranges`` of that optimizer, in elements.
        names: its ``parameter_names``; None where a checkpoint has none, so that only the order of parameters tells them apart.
    """

    ranges: Sequence[Sequence[Sequence[tuple[int, int]]]]
    names: Sequence[Sequence[Sequence[str]]] | None


@dataclass(frozen=True, slots=True)
class ShardedParameter:
    """What this rank keeps of the state of one parameter.

    Attributes:
        part: of the optimizer, its number.
        buffer: the number of the flat tensors in the part, which are one for each buffer of gradients.
        begin: the element of the buffer's flat tensors in ``distrib_optim.pt`` at which this rank's shard begins.
        end: the element after its last.
    """

    parameter: torch.nn.Parameter
    part: int
    buffer: int
    begin: int
    end: int


def sharded_parameters(
    optimizer: MegatronOptimizer, places: Sequence[Mapping[int, tuple[int, int]]] | None = None
) -> list[ShardedParameter]:
    """What this rank keeps of a distributed optimizer; nothing of others. Not collective.

    Args:
        places: for each part, by ``id`` of a parameter: the number of the flat tensors that it lies in, and the element at which it begins;
            by default those of ``optimizer``.
    """
    found = []
    places = _places_by_order(optimizer, parameter_ranges(optimizer)) if places is None else places
    for index, (part, begins) in enumerate(zip(distributed_parts(optimizer), places, strict=True)):
        for parameter in part.model_param_gbuf_map:
            shard, (buffer, begin) = part._get_model_param_range_map(parameter)["param"], begins[id(parameter)]
            found.append(ShardedParameter(parameter, index, buffer, begin + shard.start, begin + shard.end))
    return found


def _places_by_order(
    optimizer: MegatronOptimizer, ranges: Sequence[Sequence[Sequence[tuple[int, int]]]]
) -> list[dict[int, tuple[int, int]]]:
    """``places`` of ``sharded_parameters``, where parameters lie in the order of this run."""
    return [
        {
            id(parameter): (index, begin)
            for index, (buffer, buffer_ranges) in enumerate(zip(part.buffers, part_ranges, strict=True))
            for parameter, (begin, _) in zip(buffer.param_index_map, buffer_ranges, strict=True)
        }
        for part, part_ranges in zip(distributed_parts(optimizer), ranges, strict=True)
    ]


def _places_by_name(
    optimizer: MegatronOptimizer, saved: SavedOrder, names: Mapping[int, str], source: str
) -> list[dict[int, tuple[int, int]]]:
    """``places`` of ``sharded_parameters``, where parameters lie in whatever order, and in whichever buffer of their part.

    Raises CheckpointError with the names of all parameters that are missing, doubled, unexpected or of another size.
    """
    assert saved.names is not None
    found: list[dict[int, tuple[int, int]]] = []
    findings: list[str] = []
    for index, (part, part_names) in enumerate(zip(distributed_parts(optimizer), parameter_names(optimizer, names), strict=True)):
        stored: dict[str, tuple[int, int, int]] = {}
        for number, (buffer_names, ranges) in enumerate(zip(saved.names[index], saved.ranges[index], strict=True)):
            for name, (begin, end) in zip(buffer_names, ranges, strict=True):
                if name in stored:
                    findings.append(f"{name} is doubled")
                stored[name] = number, begin, end
        live = {
            name: parameter
            for buffer, buffer_names in zip(part.buffers, part_names, strict=True)
            for parameter, name in zip(buffer.param_index_map, buffer_names, strict=True)
        }
        findings += [f"{name} is missing" for name in live if name not in stored]
        findings += [f"{name} is unexpected" for name in stored if name not in live]
        begins = {}
        for name, parameter in live.items():
            number, begin, end = stored.get(name, (0, 0, parameter.numel()))
            if end - begin != parameter.numel():
                findings.append(f"{name}: expected {parameter.numel()} elements, got {end - begin}")
            begins[id(parameter)] = number, begin
        found.append(begins)
    if findings:
        raise CheckpointError(
            f"{source} holds optimizer state of other parameters than this run's: {first_few(findings, separator='; ')}; load weights alone"
        )
    return found


def state_of_shard(optimizer: MegatronOptimizer, shard: ShardedParameter) -> dict[str, Tensor]:
    """Each of PLANES of what this rank keeps of a parameter, 1-D float32 on its device; views where they are kept so. Not collective."""
    states = distributed_parts(optimizer)[shard.part]._get_main_param_and_optimizer_states(shard.parameter)
    return {plane: states[plane].detach().reshape(-1).float() for plane in PLANES}


def distributed_optimizer_content(optimizer: MegatronOptimizer) -> list[Any] | None:
    """What ``distrib_optim.pt`` holds beside numbers, as Megatron forms it: main parameters and moments of the whole data-parallel group,
    float32 on the CPU, by part of the optimizer; the tensors are not filled, and take no memory.

    The part of experts has another data-parallel group than the rest. A rank that is not the first of a part's has None in its place, and
    one that is the first of none gets None, as every rank does where the optimizer is not distributed. Not collective.
    """
    allocate_adam_state(optimizer)
    content: list[Any] = []
    for part in distributed_parts(optimizer):
        if not leads_part(part):
            content.append(None)
            continue
        content.append({"buckets_coalesced": True})
        for index, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
            (dtypes,) = ranges
            tensors = {plane: torch.empty(buffer.numel_unpadded, dtype=torch.float32) for plane in PLANES}
            content[-1][index] = {dtypes: {**tensors, "numel_unpadded": buffer.numel_unpadded}}
    return content if any(part is not None for part in content) else None


def saved_states(
    states: Mapping[int, Sequence[Any]], saved: SavedOrder, optimizer: MegatronOptimizer, names: Mapping[int, str], source: str
) -> list[tuple[ShardedParameter, dict[str, Tensor]]]:
    """Each of PLANES of everything that this rank keeps, as views of what files hold. Not collective.

    Args:
        states: by part of the optimizer, the content of the ``distrib_optim.pt`` that has it.
        saved: where parameters lie in it; the optimizer may have other buckets and, where there are names, another order of parameters.
        names: of this run's parameters, by ``id``, as in ``saved``.

    Raises CheckpointError where they are of other parameters, and what damaged content raises.
    """
    ranges = saved.ranges, parameter_ranges(optimizer)
    sizes_then, sizes_now = ([[[end - begin for begin, end in buffer] for buffer in part] for part in side] for side in ranges)
    counts = {len(content) for content in (*states.values(), sizes_then)} - {len(sizes_now)}
    if counts or (saved.names is None and sizes_then != sizes_now):
        raise CheckpointError(
            f"{source} holds optimizer state of {min(counts, default=len(sizes_now))} parts, of parameters that "
            f"{'are' if sizes_then == sizes_now else 'are not'} those of this run, which has {len(sizes_now)} parts; load weights alone"
        )
    by_order = saved.names is None
    places = _places_by_order(optimizer, saved.ranges) if by_order else _places_by_name(optimizer, saved, names, source)
    found = []
    for shard in sharded_parameters(optimizer, places):
        (content,) = states[shard.part][shard.part][shard.buffer].values()
        # Not a slice, which would be shorter than it should be where the tensor is.
        views = {plane: content[plane].narrow(0, shard.begin, shard.end - shard.begin) for plane in PLANES}
        found.append((shard, views))
    return found


def first_rank_of(part: DistributedOptimizer) -> int:
    """The global rank that is the first of a part's data-parallel group: its folder has the state of the whole group."""
    return dist.get_process_group_ranks(part.data_parallel_group)[0]


def leads_part(part: DistributedOptimizer) -> bool:
    """Whether this rank is the first of a part's data-parallel group."""
    return first_rank_of(part) == dist.get_rank()


def restore_shards(optimizer: MegatronOptimizer, states: Sequence[tuple[ShardedParameter, Mapping[str, Tensor]]]) -> None:
    """Put back what ``saved_states`` found. Not collective."""
    parts = distributed_parts(optimizer)
    with ExitStack() as stack:
        # Without gradients, because float32 main parameters are views of the model's.
        stack.enter_context(torch.no_grad())
        for part in parts:
            stack.enter_context(_steps_aside(part))
        for shard, planes in states:
            _set_states(parts[shard.part], shard.parameter, planes)


def set_parameter_states(optimizer: MegatronOptimizer, state_of: Callable[[torch.nn.Parameter], Mapping[str, Tensor]]) -> None:
    """Set main parameters and moments of what this rank keeps, after :func:`count_steps`. Not collective.

    Args:
        state_of: of a parameter of this rank, whole, each of PLANES in float32.
    """
    with torch.no_grad():
        for part in _whole_parts(optimizer):
            for group, parameters in zip(part.param_groups, _model_groups(part), strict=True):
                for main, parameter in zip(group["params"], parameters, strict=True):
                    for plane, state in state_of(parameter).items():
                        (main if plane == "param" else part.optimizer.state[main][plane]).copy_(state)
    for part in distributed_parts(optimizer):
        # Without gradients, because float32 main parameters are views of the model's.
        with torch.no_grad(), _steps_aside(part):
            for parameter in part.model_param_gbuf_map:
                shard = part._get_model_param_range_map(parameter)["param"]
                states = {plane: state.reshape(-1)[shard.start : shard.end] for plane, state in state_of(parameter).items()}
                _set_states(part, parameter, states)


def count_steps(optimizer: MegatronOptimizer, steps: float, grad_scaler: Mapping[str, Any] | None) -> None:
    """Have an optimizer go on as one that has counted ``steps``, with the state of its dynamic loss scale. Not collective."""
    for part in _whole_parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
    state = optimizer_state(optimizer)
    for part, part_state in zip(_parts(optimizer), state if isinstance(state, list) else [state], strict=True):
        inner = _inner(part, part_state)
        if not isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            # By itself torch's counts for each parameter.
            for values in inner["state"].values():
                values["step"] = torch.tensor(float(steps))
        else:
            for group in inner["param_groups"]:
                # A group of TransformerEngine's counts whole ones, and has no count before its first step.
                group["step"] = int(steps) if isinstance(group.get("step", 0), int) else steps
        if grad_scaler is not None and "grad_scaler" in part_state:
            part_state["grad_scaler"] = dict(grad_scaler)
    load_optimizer_state(optimizer, state)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def optimizer_config(optimizer: MegatronOptimizer) -> OptimizerConfig:
    """The options an optimizer was built with."""
    return _parts(optimizer)[0].config


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers, which keep their state in shards, among those that an optimizer is made of."""
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give a distributed optimizer that has taken no step yet the zeros that its first step would start from.

    Its ``state_dict`` of Megatron 0.16 asserts that there is a state; under fp16 the first steps may all be skipped.
    """
    for part in distributed_parts(optimizer):
        if part.optimizer is None or part.optimizer.state:
            continue
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            _allocate_on_host(part.optimizer)
            continue
        if part.config.use_precision_aware_optimizer:
            # Megatron 0.16 calls this without what TransformerEngine 2.1 and later ask for.
            for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
                part.optimizer.initialize_state(parameter, part.config.store_param_remainders)
            continue
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for values in part.optimizer.state.values():
                values["step"] = torch.tensor(0.0)


def reload_main_parameters(optimizer: MegatronOptimizer) -> None:
    """``optimizer.reload_model_params()``, also where Megatron 0.16 leaves out the main parameters: where Adam keeps them among its state,
    or on the host. Not collective."""
    optimizer.reload_model_params()
    for part in distributed_parts(optimizer):
        if not isinstance(part.optimizer, HybridDeviceOptimizer) and not (
            part.config.use_precision_aware_optimizer and part.optimizer.state
        ):
            continue
        with torch.no_grad():
            for parameter in part.model_param_gbuf_map:
                shard = part._get_model_param_range_map(parameter)["param"]
                _set_states(part, parameter, {"param": parameter.detach().reshape(-1)[shard.start : shard.end].float()})


def _set_states(part: DistributedOptimizer, parameter: torch.nn.Parameter, planes: Mapping[str, Tensor]) -> None:
    """Megatron's setter, and what it should do for an optimizer whose parameters are copies on the host."""
    if not isinstance(part.optimizer, HybridDeviceOptimizer):
        part._set_main_param_and_optimizer_states(parameter, planes)
        return
    group, order = part.model_param_group_index_map[parameter]
    main = part.optimizer.param_groups[group]["params"][order]
    for plane, values in planes.items():
        # Of a parameter on the host there are two: the one that is stepped there, and what it is copied to.
        targets = (main, part.optimizer.param_to_inner_param[main]) if plane == "param" else (part.optimizer.state[main][plane],)
        for target in targets:
            target.data.copy_(values)


def _allocate_on_host(optimizer: HybridDeviceOptimizer) -> None:
    """Zeros as moments and counters, by a step that moves nothing: this optimizer makes its state in no other way."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if getattr(parameter, "decoupled_grad", parameter) is None:
                # The step would take it for the gradient.
                del parameter.decoupled_grad
    # It draws gradients.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        optimizer.dummy_step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for inner in optimizer.sub_optimizers:
        for group in inner.param_groups:
            group.pop("step", None)
        for values in inner.state.values():
            for name in {"exp_avg", "exp_avg_sq", "step"} & values.keys():
                values[name].zero_()


def _load_counters(part: DistributedOptimizer, state: Mapping[str, Any]) -> None:
    """What ``state_dict`` says beside options of an optimizer on the host: steps, and the loss scale. Megatron 0.16 would take in copies of
    moments and parameters for those that are stepped."""
    if not part.optimizer.state:
        _allocate_on_host(part.optimizer)
    for step in {group["step"] for group in state["optimizer"]["param_groups"] if group.get("step") is not None}:
        for inner in part.optimizer.sub_optimizers:
            counts = False
            for values in inner.state.values():
                if "step" in values:
                    values["step"].fill_(step)
                    counts = True
            if not counts:
                # TransformerEngine's Adam counts in its groups.
                for group in inner.param_groups:
                    group["step"] = int(step)
    if part.grad_scaler is not None and "grad_scaler" in state:
        part.grad_scaler.load_state_dict(state["grad_scaler"])


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
