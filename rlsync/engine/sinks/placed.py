"""Buckets in destination layout, written into the parameters of one worker: some directly, some module by module.

Owns the order of a sync inside the worker's model. Knows no channel and no ring: a slot is a tensor that it reads and forgets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlsync.copy.cpu import write_fills
from rlsync.engine import compat, compat_attention
from rlsync.engine.finishing import Finishing
from rlsync.engine.sinks.choice import SinkName
from rlsync.engine.sinks.direct import DirectBuffers
from rlsync.engine.sinks.layerwise import LayerwiseBuffers
from rlsync.layout.geometry import Fill
from rlsync.plan.packing import Segment
from rlsync.transport.ends import Arrival


class PlacedSink:
    """``direct`` and ``layerwise`` side by side.

    Args:
        buckets: for each bucket this worker's segments; together with ``fills`` they cover every buffer once.
        fills: elements that no segment brings; they are written in every sync, because sleep may have discarded them.
        sinks: ``direct`` or ``layerwise`` for every buffer that occurs, as ``choose`` gave it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,
        buckets: tuple[tuple[Segment, ...], ...],
        fills: tuple[Fill, ...],
        sinks: Mapping[str, SinkName],
    ) -> None:
        self._model, self._model_config = model, model_config
        self._names = [tuple(dict.fromkeys(segment.buffer for segment in bucket)) for bucket in buckets]
        spans = _spans(self._names, fills)
        unknown = sorted(spans.keys() - sinks.keys())
        assert not unknown, f"no sink was chosen for {', '.join(unknown)}"
        self._direct = DirectBuffers(model, (name for name in spans if sinks[name] == "direct"))
        self._layerwise = LayerwiseBuffers(model, {name: span for name, span in spans.items() if sinks[name] == "layerwise"}, fills)
        self._is_direct = [all(name in self._direct for name in names) for names in self._names]
        attention = [layer for _, layer in compat_attention.attention_layers(model)]
        self._attention = Finishing(attention, compat_attention.attention_parts, compat_attention.ATTENTION_CACHES)
        self._standing: list[Mapping[str, torch.Tensor] | None] = []
        self._direct_fills = tuple(fill for fill in fills if fill.buffer in self._direct)

    differences = ()

    def standing(self, bucket: int) -> Mapping[str, torch.Tensor] | None:
        """Live buffers, where all of the bucket are written directly."""
        return self._direct.group(self._names[bucket]) if self._is_direct[bucket] else None

    def _in_progress(self, bucket: int) -> dict[str, torch.Tensor]:
        """Buffers of a bucket, some of modules that are put into checkpoint layout for it."""
        return {name: self._direct[name] if name in self._direct else self._layerwise[name] for name in self._names[bucket]}

    @property
    def peak_extra_bytes(self) -> int:
        """Most bytes that modules in progress have taken at once, without what vLLM's post-processing takes for itself."""
        return self._layerwise.peak_bytes

    @torch.no_grad()
    def open(self) -> None:
        """Begin: from now on the model holds no version until ``close``."""
        # Nothing else runs in this process until the bytes have landed.
        self._standing = [self.standing(bucket) for bucket in range(len(self._names))]
        write_fills(self._direct_fills, {fill.buffer: self._direct[fill.buffer] for fill in self._direct_fills})
        self._layerwise.complete_after(-1)

    @torch.no_grad()
    def write(self, bucket: int, arrival: Arrival, landed: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """As every sink. ``landed`` gets live memory where the sink is ``direct``."""
        standing = self._standing[bucket]
        buffers = self._in_progress(bucket) if standing is None else standing
        arrival.land(buffers)
        landed(buffers)
        # The buffers of a module would outlive its completion.
        del buffers, standing
        self._layerwise.complete_after(bucket)

    @torch.no_grad()
    def close(self) -> None:
        """Complete what is made from several modules: absorbed and attention weights, packed copies of a shared parameter."""
        left = self._layerwise.in_progress
        assert not left, f"{len(left)} buffers are incomplete after the last bucket, among them {left[0]}"
        self._attention.run(lambda layer: compat_attention.finish_attention(layer, self._model_config))
        compat.refresh_sharers(self._model)

    def abandon(self) -> None:
        """Leave a model without a parameter in checkpoint layout; its values are those of no version."""
        self._layerwise.abandon()


def _spans(buckets: Sequence[Sequence[str]], fills: Sequence[Fill]) -> dict[str, tuple[int, int]]:
    """For each buffer the first and the last bucket that brings some of it; -1 where it is all fills."""
    spans = {fill.buffer: (-1, -1) for fill in fills}
    for number, names in enumerate(buckets):
        for name in names:
            first = spans.get(name, (-1, -1))[0]
            spans[name] = number if first < 0 else first, number
    return spans
