"""What a worker holds and how it will take bytes in: found out once per connection, on the live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace

from rlsync.control.messages import Recorded
from rlsync.engine.recorder import Recording, record
from rlsync.engine.sinks import Sink
from rlsync.engine.sinks.choice import choose
from rlsync.engine.sinks.compare import CompareSink
from rlsync.engine.sinks.loaders import LoadersSink
from rlsync.engine.sinks.placed import PlacedSink
from rlsync.geometry import TensorSpec, contiguous_strides
from rlsync.placement.huggingface import whole_tensors
from rlsync.placement.vllm import placement_of
from rlsync.staging import Segment

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
        return _by_loaders(model, model_config, holder, tensors, recording, problems, remark)
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
    findings: tuple[str, ...],
    remark: str,
) -> Intake:
    """The worker is sent whole HF tensors, those that it reads."""
    unused = set(recording.unused_names)
    taken = [t for t in tensors if t.name not in unused]
    shapes = {t.name: t.shape for t in taken}
    return Intake(
        Recorded(whole_tensors(holder, taken), "loaders", recording.unused_names, findings, remark),
        lambda buckets: LoadersSink(model, model_config, _shaped(buckets, shapes)),
    )


def _shaped(buckets: Buckets, shapes: Mapping[str, tuple[int, ...]]) -> Buckets:
    """Segments are whole tensors here, in the shape in which loaders expect them."""
    return tuple(
        tuple(replace(s, shape=shapes[s.buffer], strides=contiguous_strides(shapes[s.buffer])) for s in bucket) for bucket in buckets
    )
