"""State of distributed optimizers in the shards of a run, on paper: main parameters and moments as placements of a model's tensors.

Of what rlsync saves. ``rlsync.megatron.optimizer_state`` puts it into a live optimizer of another layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from rlsync.convert.filling import restricted_to
from rlsync.convert.sources import RankFile, rank_files
from rlsync.errors import CheckpointError
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.safetensors import Holding, StoredTensor
from rlsync.layout.topology import Topology
from rlsync.layout.torch_files import TensorView, read_torch_file
from rlsync.models import Model
from rlsync.models.lora import Adapters
from rlsync.models.placement import held_parameters, megatron_placement
from rlsync.models.shards import DISTRIBUTED_OPTIMIZER_FILE, PADDED_VOCABULARY, PLANES, RANK_STATE_FILE
from rlsync.models.stacks import Bound

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
    """The optimizer of the shards in an ``iter_XXXXXXX`` folder, of a model's parameters or of its ``adapters``; reads headers only.

    Raises CheckpointError where there is none that can be cut anew.
    """
    topology, files = rank_files(folder, adapters)
    planes: dict[str, list[Holding]] = {plane: [] for plane in PLANES}
    steps: set[float] = set()
    scaler: Mapping[str, Any] | None = None
    schedule: set[int | None] = set()
    for file in files:
        where = folder / file.name
        for part, keeps_something in _parts_of(file, where):
            groups = part["optimizer"]["param_groups"] if keeps_something else ()
            steps |= {float(group["step"]) for group in groups if group.get("step") is not None}
            scaler = part.get("grad_scaler", scaler)
        scheduler = file.content.get("opt_param_scheduler")
        schedule.add(None if scheduler is None else int(scheduler["num_steps"]))
        path = where / DISTRIBUTED_OPTIMIZER_FILE
        for plane, views in (_views(file, path) if path.is_file() else {}).items():
            planes[plane].append(_holding(model, adapters, topology, file, views, plane))
    if len(steps) != 1 or len(schedule) != 1:
        counted = f"{sorted(steps)} optimizer steps and {sorted(map(str, schedule))} of the schedule"
        raise CheckpointError(f"{folder}: its ranks counted {counted}, where they should agree; {_ADVICE}")
    if not planes["param"]:
        raise CheckpointError(f"{folder}: no {DISTRIBUTED_OPTIMIZER_FILE}, so its optimizer was not distributed; {_ADVICE}")
    return SavedOptimizer(steps.pop(), scaler, schedule.pop(), {plane: tuple(holdings) for plane, holdings in planes.items()})


def _section(file: RankFile, key: str, where: Path) -> Any:
    if key not in file.content:
        raise CheckpointError(f"{where / RANK_STATE_FILE} holds no {key!r}, which its optimizer needs under another layout; {_ADVICE}")
    return file.content[key]


def _parts_of(file: RankFile, where: Path) -> list[tuple[Mapping[str, Any], bool]]:
    """The optimizers of a rank, each with whether it trains anything there: one that does not has counted no step."""
    state = _section(file, "optimizer", where)
    parts, names = state if isinstance(state, list) else [state], _section(file, "parameter_names", where)
    are_whole = all(isinstance(part, dict) and "param_groups" in (part.get("optimizer") or ()) for part in parts if part)
    if not are_whole or not isinstance(names, list) or len(names) != len(parts):
        raise CheckpointError(f"{where / RANK_STATE_FILE}: its optimizer was not distributed, or is damaged; {_ADVICE}")
    return [(part, any(buffers)) for part, buffers in zip(parts, names, strict=True) if part]


def _views(file: RankFile, path: Path) -> dict[str, dict[str, tuple[TensorView, int, int]]]:
    """By plane and global name of a parameter: the flat tensor that it lies in, and from where to where."""
    ranges, names = (_section(file, key, path.parent) for key in ("parameter_ranges", "parameter_names"))
    found: dict[str, dict[str, tuple[TensorView, int, int]]] = {plane: {} for plane in PLANES}
    try:
        for part, part_ranges, part_names in zip(read_torch_file(path), ranges, names, strict=True):
            # Parts that another rank keeps.
            for index, (buffer_ranges, buffer_names) in enumerate(zip(part_ranges, part_names, strict=True)) if part is not None else ():
                (content,) = part[index].values()
                for name, (begin, end) in zip(buffer_names, buffer_ranges, strict=True):
                    for plane in PLANES:
                        found[plane][name] = content[plane], begin, end
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} does not hold what {RANK_STATE_FILE} says ({type(error).__name__}: {error})") from None
    return found


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
