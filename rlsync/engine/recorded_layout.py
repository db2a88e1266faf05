"""What a worker holds, as the planner has it, and the sink that fills it: the vLLM model's own loaders are recorded, and say both.

Knows no channel; a record is a message for the coordinator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from rlsync.coordinator import messages as m
from rlsync.engine.adapters import AdapterSlots
from rlsync.engine.compat import reload
from rlsync.engine.recorder import Recording, record, record_adapter
from rlsync.engine.sinks import Sink
from rlsync.engine.sinks.choice import choose, not_in_place
from rlsync.engine.sinks.compare import CompareSink
from rlsync.engine.sinks.loaders import LoadersSink
from rlsync.engine.sinks.placed import PlacedSink
from rlsync.layout.geometry import Placement, TensorSpec
from rlsync.layout.recorded import placement_of, tensors_as_read
from rlsync.plan.packing import Segment

_log = logging.getLogger(__name__)

Buckets = tuple[tuple[Segment, ...], ...]


@dataclass(frozen=True, slots=True)
class RecordedLayout:
    """``record`` is sent to the coordinator; ``make_sink`` is called with the segments of every bucket once the plan is made."""

    record: m.Recorded
    make_sink: Callable[[Buckets], Sink]


def record_layout(
    model: torch.nn.Module,
    model_config: Any,
    holder: str,
    manifest: m.Manifest,
    compare: bool = False,
    adapters: AdapterSlots | None = None,
    recorded: Callable[[torch.nn.Module, Sequence[TensorSpec]], Recording] = record,
) -> RecordedLayout:
    """Record where the model's own loaders write the tensors, and choose the sink that writes, or compares, them.

    Leaves the model as it was, and makes room beside it where the manifest has adapters. Raises ConfigError where the sink that is asked
    for by name cannot keep the model right.
    """
    requested = manifest.sink
    tensors = manifest.tensors[: None if manifest.adapter is None else manifest.adapter.first]
    recording = recorded(model, tensors)
    placement, findings = placement_of(holder, tensors, recording.buffers, recording.writes)
    missing = tuple(str(f) for f in findings if f.unwritten)
    computed = tuple(str(f) for f in findings if not f.unwritten)
    problems = recording.findings + missing
    if compare:
        problems += tuple(f"it cannot be compared: {f}" for f in computed)
        return RecordedLayout(
            m.Recorded(placement, "compare", recording.unused_names, problems),
            lambda buckets: CompareSink(model, buckets, placement.padding),
        )
    choice = choose(model, [b.name for b in placement.buffers], recording.aliases, requested)
    used = sorted(set(choice.sinks.values()))
    beside: Mapping[str, torch.Tensor] = {}
    unused = recording.unused_names
    if manifest.adapter is not None and not problems:
        if computed or used == ["loaders"]:
            problems = tuple(f"the base of adapters is not written in place: {why}" for why in (*computed, *choice.reasons))
        else:
            assert adapters is not None, "adapters have slots"
            found, problems, more = _record_adapters(model, holder, manifest, adapters)
            placement = replace(placement, **{n: getattr(placement, n) + getattr(found, n) for n in ("buffers", "pieces", "padding")})
            beside, unused = adapters.staging, unused + more
            used = sorted({*used, "direct"})
    if problems or computed or used == ["loaders"]:
        if computed and requested in ("direct", "layerwise"):
            problems += tuple(f"weight_sync.sink is {requested}, but: {f}" for f in computed)
        remark = "" if requested == "loaders" else "; ".join((*computed, *choice.reasons))
        undescribed = [f.buffer for f in findings]
        return _by_loaders(model, model_config, holder, tensors, recording, undescribed, problems, remark)
    return RecordedLayout(
        m.Recorded(placement, "+".join(used), unused),
        lambda buckets: PlacedSink(model, model_config, buckets, placement.padding, choice.sinks, beside),
    )


def _record_adapters(
    model: torch.nn.Module, holder: str, manifest: m.Manifest, adapters: AdapterSlots
) -> tuple[Placement, tuple[str, ...], tuple[str, ...]]:
    """Placement of the factors in what a sync writes beside the slots, findings, and names that vLLM does not load here."""
    assert manifest.adapter is not None
    factors = manifest.tensors[manifest.adapter.first :]
    recording = record_adapter(model, factors, manifest.adapter.r)
    placement, findings = placement_of(holder, factors, recording.buffers, recording.writes)
    adapters.connect(placement.buffers, manifest.adapter.r)
    return placement, (*recording.findings, *map(str, findings)), recording.unused_names


def _by_loaders(
    model: torch.nn.Module,
    model_config: Any,
    holder: str,
    tensors: Sequence[TensorSpec],
    recording: Recording,
    computed: Sequence[str],
    findings: tuple[str, ...],
    remark: str,
) -> RecordedLayout:
    """Layout for vLLM's own loaders: the elements of HF tensors that they read. ``computed``: buffers not filled by plain copies alone."""
    unused = set(recording.unused_names)
    taken = {t.name: t for t in tensors if t.name not in unused}

    def make_sink(buckets: Buckets) -> LoadersSink:
        layers = not_in_place(model, [b.name for b in recording.buffers], computed, recording.aliases)
        _log.info("%s: loaders write its layers where they live, but for %d that vLLM rebuilds", holder, len(layers))
        return LoadersSink(model, model_config, buckets, taken, layers, reload.loading_device(model))

    placement = tensors_as_read(holder, list(taken.values()), recording.writes, recording.computed_names)
    return RecordedLayout(m.Recorded(placement, "loaders", recording.unused_names, findings, remark), make_sink)
