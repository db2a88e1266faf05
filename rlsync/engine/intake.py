"""What a worker holds and how it will take bytes in: found out once per connection, on the live model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsync.coordinator.messages import Recorded
from rlsync.engine import compat_reload
from rlsync.engine.recorder import Recording, record
from rlsync.engine.sinks import Sink
from rlsync.engine.sinks.choice import choose, not_in_place
from rlsync.engine.sinks.compare import CompareSink
from rlsync.engine.sinks.loaders import LoadersSink
from rlsync.engine.sinks.placed import PlacedSink
from rlsync.layout.geometry import TensorSpec
from rlsync.layout.recorded import placement_of, tensors_as_read
from rlsync.plan.packing import Segment

_log = logging.getLogger(__name__)

Buckets = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True, slots=True)
class Intake:
    """``record`` goes to the coordinator; ``make_sink`` is called with the segments of every bucket when the plan is there."""

    record: Recorded
    make_sink: Callable[[Buckets], Sink]


def take_stock(
    model: torch.nn.Module, model_config: Any, holder: str, tensors: Sequence[TensorSpec], requested: str, compare: bool = False
) -> Intake:
    """Record what the model's own loaders make of ``tensors``, and choose how it will be written, or compared.

    Leaves the model as it was. Raises ConfigError where the sink that is asked for by name cannot keep the model right.
    """
    recording = record(model, tensors)
    placement, findings = placement_of(holder, tensors, recording.buffers, recording.writes)
    missing = tuple(str(f) for f in findings if f.unwritten)
    computed = tuple(str(f) for f in findings if not f.unwritten)
    problems = recording.findings + missing
    if compare:
        problems += tuple(f"it cannot be compared: {f}" for f in computed)
        return Intake(
            Recorded(placement, "compare", recording.unused_names, problems), lambda buckets: CompareSink(model, buckets, placement.fills)
        )
    choice = choose(model, [b.name for b in placement.buffers], recording.aliases, requested)
    used = sorted(set(choice.sinks.values()))
    if problems or computed or used == ["loaders"]:
        if computed and requested in ("direct", "layerwise"):
            problems += tuple(f"weight_sync.sink is {requested}, but: {f}" for f in computed)
        remark = "" if requested == "loaders" else "; ".join((*computed, *choice.reasons))
        undescribed = [f.buffer for f in findings]
        return _by_loaders(model, model_config, holder, tensors, recording, undescribed, problems, remark)
    return Intake(
        Recorded(placement, "+".join(used), recording.unused_names),
        lambda buckets: PlacedSink(model, model_config, buckets, placement.fills, choice.sinks),
    )


def _by_loaders(
    model: torch.nn.Module,
    model_config: Any,
    holder: str,
    tensors: Sequence[TensorSpec],
    recording: Recording,
    computed: Sequence[str],
    findings: tuple[str, ...],
    remark: str,
) -> Intake:
    """The worker is sent what it reads of the HF tensors. ``computed``: buffers that are not filled by copies alone."""
    unused = set(recording.unused_names)
    taken = {t.name: t for t in tensors if t.name not in unused}

    def make_sink(buckets: Buckets) -> LoadersSink:
        layers = not_in_place(model, [b.name for b in recording.buffers], computed, recording.aliases)
        _log.info("%s: loaders write its layers where they live, but for %d that vLLM rebuilds", holder, len(layers))
        return LoadersSink(model, model_config, buckets, taken, layers, compat_reload.loading_device(model))

    placement = tensors_as_read(holder, list(taken.values()), recording.writes, recording.computed_names)
    return Intake(Recorded(placement, "loaders", recording.unused_names, findings, remark), make_sink)
