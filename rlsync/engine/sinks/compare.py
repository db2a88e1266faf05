"""Compares an engine with what these weights would make of it. Takes buckets like any sink, and changes nothing.

Module by module: what arrives is put into checkpoint layout beside the live module and post-processed as vLLM would; then
everything the module computes from is compared, and what was live comes back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rlsync.copy.cpu import write_padding
from rlsync.engine.compat import layers as compat_layers
from rlsync.engine.sinks import owner, plain
from rlsync.engine.state import state_difference, state_hashes
from rlsync.layout.geometry import Padding
from rlsync.plan.packing import Segment
from rlsync.transport.ends import Arrival


@dataclass(frozen=True, slots=True)
class _Begun:
    """A module whose live tensors are set aside during its comparison."""

    held: Mapping[str, str]
    live: compat_layers.Snapshot


class CompareSink:
    """Compares; ``differences`` names tensors of the engine that are not what the buckets make of them.

    The engine must not compute meanwhile. What is derived from several modules (absorbed attention weights, packed copies of a
    tied embedding) is not compared: it follows from the modules that are.
    """

    def __init__(self, model: torch.nn.Module, buckets: tuple[tuple[Segment, ...], ...], padding: tuple[Padding, ...]) -> None:
        self._model, self._buckets, self._padding = model, buckets, padding
        names = dict.fromkeys([f.buffer for f in padding] + [s.buffer for bucket in buckets for s in bucket])
        last: dict[str, int] = defaultdict(lambda: -1)
        for number, bucket in enumerate(buckets):
            last.update((segment.buffer.rpartition(".")[0], number) for segment in bucket)
        self._names = {path: [n for n in names if n.rpartition(".")[0] == path] for path in {n.rpartition(".")[0] for n in names}}
        self._ending: dict[int, list[str]] = defaultdict(list)
        for path in self._names:
            self._ending[last[path]].append(path)
        self._begun: dict[str, _Begun] = {}
        self.differences: list[str] = []
        self.peak_extra_bytes = 0

    def standing(self, bucket: int) -> None:
        """Nothing: buffers are made for each comparison."""

    def open(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Begin a comparison, without the differences of an earlier one."""
        self.differences = []
        self._complete(-1)

    @torch.no_grad()
    def write(self, bucket: int, arrival: Arrival, landed: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """Write a bucket beside the live memory, and compare the modules that it completes."""
        buffers = {name: self._buffer(name) for name in dict.fromkeys(s.buffer for s in self._buckets[bucket])}
        arrival.land(buffers)
        landed(buffers)
        buffers.clear()
        self._complete(bucket)

    def close(self) -> None:
        """Check that every module has its live tensors again."""
        assert not self._begun, f"{sorted(self._begun)} are incomplete after the last bucket"

    def abandon(self) -> None:
        """Restore the live tensors of every module."""
        for path in list(self._begun):
            compat_layers.bring_back(self._begun.pop(path).live)

    def _buffer(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        layer = owner(self._model, name)[0]
        if path not in self._begun:
            held = state_hashes(layer)
            self._begun[path] = _Begun(held, compat_layers.snapshot(layer))
            self.peak_extra_bytes = max(self.peak_extra_bytes, compat_layers.stand_in(layer, self._names[path]))
        return plain(getattr(layer, attribute))

    @torch.no_grad()
    def _complete(self, bucket: int) -> None:
        for path in self._ending[bucket]:
            buffers = {name: self._buffer(name) for name in self._names[path]}
            write_padding((f for f in self._padding if f.buffer in buffers), buffers)
            layer = self._model.get_submodule(path)
            compat_layers.process_apart(layer)
            begun = self._begun[path]
            found = state_difference(begun.held, state_hashes(layer))
            self.differences += [f"{path}.{name}" for name in found]
            compat_layers.bring_back(self._begun.pop(path).live)
