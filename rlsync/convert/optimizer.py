"""State of optimizers in the shards of a run, distributed or not, on paper: main parameters and moments as placements of a model's tensors.

Of what rlsync saves. ``rlsync.megatron.optimizer_state`` puts it into a live optimizer of another layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from rlsync.convert.loading import restricted_to
from rlsync.convert.sources import RankFile, adapter_holdings_of, holdings_of, rank_files
from rlsync.copy.files import MappedTensors
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.safetensors import Holding, StoredTensor
from rlsync.layout.topology import Topology
from rlsync.layout.torch_files import TensorView, read_torch_file
from rlsync.models import Model
from rlsync.models.lora import Adapters
from rlsync.models.placement import held_parameters, megatron_placement
from rlsync.models.shards import DISTRIBUTED_OPTIMIZER_FILE, PADDED_VOCABULARY, PLANES, RANK_STATE_FILE, WHOLE_NAMES
from rlsync.models.stacks import Bound

# By plane and global name of a parameter: the tensor that its state lies in, and from which element to which.
_Views = dict[str, dict[str, tuple[TensorView, int, int]]]
_ADVICE = "resume under the saved layout, or start a new run from its weights"


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """What a run saved of its optimizer, but for options that are a run's own.

    Attributes:
        adam_steps: that Adam counted.
        grad_scaler: state of a dynamic loss scale, or None.
        schedule_steps: that the schedule counted; None where none was saved.
        planes: for each of PLANES every trained tensor, in float32.
    """

    adam_steps: float
    grad_scaler: Mapping[str, Any] | None
    schedule_steps: int | None
    planes: Mapping[str, tuple[Holding, ...]]


def read_optimizer(folder: Path, model: Model, adapters: Adapters | None = None) -> SavedOptimizer:
    """The optimizer of the shards in an ``iter_XXXXXXX`` folder, of a model's parameters or of its ``adapters``; reads headers and
    counters of steps.

    Raises CheckpointError where there is none that can be cut anew.
    """
    topology, files = rank_files(folder, adapters)
    planes: dict[str, list[Holding]] = {plane: [] for plane in PLANES}
    steps: set[float] = set()
    scaler: Mapping[str, Any] | None = None
    schedule: set[int | None] = set()
    for file in files:
        where = folder / file.name
        counted, views = (_sharded if _section(file, "parameter_names", where) else _whole)(file, where)
        steps |= counted
        scaler = next((part["grad_scaler"] for part in _parts_of(file, where) if "grad_scaler" in part), scaler)
        scheduler = file.content.get("opt_param_scheduler")
        schedule.add(None if scheduler is None else int(scheduler["num_steps"]))
        for plane in (plane for plane, held in views.items() if held):
            planes[plane].append(_holding(model, adapters, topology, file, views[plane], plane))
    if len(steps) != 1 or len(schedule) != 1:
        said = f"{sorted(steps)} optimizer steps and {sorted(map(str, schedule))} of the schedule"
        raise CheckpointError(f"{folder}: its ranks counted {said}, where they should agree; {_ADVICE}")
    if not planes["exp_avg"]:
        raise CheckpointError(f"{folder}: no {DISTRIBUTED_OPTIMIZER_FILE} has the state of its distributed optimizer; {_ADVICE}")
    if not planes["param"]:
        # In float32 parameters are the main ones.
        planes["param"] = [*(holdings_of(folder, model) if adapters is None else adapter_holdings_of(folder, model, adapters))]
    return SavedOptimizer(steps.pop(), scaler, schedule.pop(), {plane: tuple(holdings) for plane, holdings in planes.items()})


def _section(file: RankFile, key: str, where: Path) -> Any:
    if key not in file.content:
        raise CheckpointError(f"{where / RANK_STATE_FILE} holds no {key!r}, which its optimizer needs under another layout; {_ADVICE}")
    return file.content[key]


def _parts_of(file: RankFile, where: Path) -> list[Mapping[str, Any]]:
    """The optimizers of a rank, without those of nothing."""
    state = _section(file, "optimizer", where)
    parts = [part for part in (state if isinstance(state, list) else [state]) if part]
    if not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{where / RANK_STATE_FILE}: its optimizer is damaged; {_ADVICE}")
    return parts


def _sharded(file: RankFile, where: Path) -> tuple[set[float], _Views]:
    """Steps that a rank of a distributed optimizer counted, and what its folder has of the state of the data-parallel group."""
    path = where / DISTRIBUTED_OPTIMIZER_FILE
    ranges, names = (_section(file, key, where) for key in ("parameter_ranges", "parameter_names"))
    found: _Views = {plane: {} for plane in PLANES}
    steps: set[float] = set()
    try:
        state = file.content["optimizer"]
        for part, part_names in zip(state if isinstance(state, list) else [state], names, strict=True):
            # One that trains nothing here has counted no step.
            groups = part["optimizer"]["param_groups"] if any(part_names) else ()
            steps |= {float(group["step"]) for group in groups if group.get("step") is not None}
        for part, part_ranges, part_names in zip(read_torch_file(path), ranges, names, strict=True) if path.is_file() else ():
            # Parts that another rank keeps.
            for index, (buffer_ranges, buffer_names) in enumerate(zip(part_ranges, part_names, strict=True)) if part is not None else ():
                (content,) = part[index].values()
                for name, (begin, end) in zip(buffer_names, buffer_ranges, strict=True):
                    for plane in PLANES:
                        found[plane][name] = content[plane], begin, end
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold what {RANK_STATE_FILE} says ({type(error).__name__}: {error})") from None
    return steps, found


def _whole(file: RankFile, where: Path) -> tuple[set[float], _Views]:
    """The same of an optimizer that is not distributed: state of whole parameters, without main ones where those are the model's."""
    path, parts, names = where / RANK_STATE_FILE, _parts_of(file, where), _section(file, WHOLE_NAMES, where)
    found: _Views = {plane: {} for plane in PLANES}
    steps: set[float] = set()
    counters: dict[str, StoredTensor] = {}

    def add(plane: str, name: str, view: TensorView) -> None:
        # For what it raises of tensors that are not contiguous.
        view.stored(name)
        found[plane][name] = view, 0, prod(view.shape)

    try:
        for part, part_names in zip(parts, names, strict=True):
            # A part in half precision has torch's optimizer beside the main parameters.
            inner, mains = part.get("optimizer", part), part.get("fp32_from_fp16_params", [[]] * len(part_names))
            for group, group_names, group_mains in zip(inner["param_groups"], part_names, mains, strict=True):
                for name, main in zip(group_names, group_mains, strict=True) if group_mains else ():
                    add("param", name, main)
                for index, name in zip(group["params"], group_names, strict=True):
                    values = inner["state"][index]
                    for plane in PLANES[1:]:
                        add(plane, name, values[plane])
                    if "step" in values:
                        counters[name] = values["step"].stored(name)
                    else:
                        steps.add(float(group["step"]))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path}: the state of its optimizer is not there, or damaged ({type(error).__name__}: {error})") from None
    read = MappedTensors(counters)
    return steps | {float(read[name]) for name in counters}, found


def _holding(
    model: Model,
    adapters: Adapters | None,
    topology: Topology,
    file: RankFile,
    views: Mapping[str, tuple[TensorView, int, int]],
    plane: str,
) -> Holding:
    """One plane of one rank; buffers are called as under the local spec."""
    divisor = file.content["options"][PADDED_VOCABULARY] // topology.tp_size
    expected = megatron_placement(model, topology, file.rank, make_vocab_size_divisible_by=divisor, adapters=adapters)
    shapes = {buffer.name: buffer.shape for buffer in expected.buffers}
    held = held_parameters(model, topology, file.rank)
    stored = dict(_stored(held if adapters is None else adapters.parameters(held), file, views, shapes))
    there = restricted_to(expected, stored.keys())
    buffers = tuple(replace(buffer, dtype="float32") for buffer in there.buffers)
    return Holding(replace(there, holder=f"{plane} of {file.name}", buffers=buffers), stored)


def _stored(
    parameters: Iterable[Bound],
    file: RankFile,
    views: Mapping[str, tuple[TensorView, int, int]],
    shapes: Mapping[str, Sequence[int]],
) -> Iterator[tuple[str, StoredTensor]]:
    for bound in parameters:
        for name in dict.fromkeys((bound.local, bound.te)):
            if name in views:
                view, begin, end = views[name]
                shape = tuple(shapes[bound.local])
                if end - begin != prod(shape) or not 0 <= begin <= end <= prod(view.shape) or view.dtype != "float32":
                    said = f"{end - begin} elements of {prod(view.shape)} in {view.dtype}"
                    raise CheckpointError(f"{file.name}: the state of {name} {shape} is {said}; {_ADVICE}")
                spec = TensorSpec(bound.local, "float32", shape)
                yield bound.local, StoredTensor(spec, view.file, view.begin + 4 * begin, view.begin + 4 * end)
