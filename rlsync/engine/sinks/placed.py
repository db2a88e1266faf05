"""Buckets in destination layout, written into the parameters of one worker: some where the engine computes with them (``direct``), some
in checkpoint layout, to be post-processed by vLLM module by module (``layerwise``).

Owns the order of a sync inside the worker's model, and the modules in progress. A module is materialised when its first bytes come and
completed with the bucket that brings its last ones, so that only modules in progress take memory. Those of one bucket lie in one piece of
it, which an allocator gives again at the same address, sync after sync; what vLLM's post-processing still refers to it does not give
again. Knows no channel and no ring.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsync.copy.cpu import write_padding
from rlsync.engine.compat import layers as compat_layers
from rlsync.engine.compat import reload as compat_reload
from rlsync.engine.sinks import owner, plain
from rlsync.engine.sinks.choice import SinkName
from rlsync.engine.sinks.post_processing import PostProcessingCache
from rlsync.layout.geometry import Padding
from rlsync.plan.packing import Segment
from rlsync.transport.ends import Arrival


class PlacedSink:
    """``direct`` and ``layerwise`` side by side.

    Args:
        buckets: for each bucket this worker's segments; together with ``padding`` they cover every buffer once.
        padding: elements that no segment brings; they are written in every sync, because sleep may have discarded them.
        sinks: ``direct`` or ``layerwise`` for every buffer that occurs in the model, as ``choose`` gave it.
        beside: buffers beside the model, by name; they are written where they are.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,
        buckets: tuple[tuple[Segment, ...], ...],
        padding: tuple[Padding, ...],
        sinks: Mapping[str, SinkName],
        beside: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self._model, self._model_config = model, model_config
        self._names = [tuple(dict.fromkeys(segment.buffer for segment in bucket)) for bucket in buckets]
        spans = _spans(self._names, padding)
        beside = beside or {}
        unknown = sorted(spans.keys() - sinks.keys() - beside.keys())
        assert not unknown, f"no sink was chosen for {', '.join(unknown)}"
        self._direct = DirectBuffers(model, (name for name in spans if sinks.get(name) == "direct"), beside)
        self._layerwise = LayerwiseBuffers(model, {name: span for name, span in spans.items() if sinks.get(name) == "layerwise"}, padding)
        self._is_direct = [all(name in self._direct for name in names) for names in self._names]
        attention = [layer for _, layer in compat_layers.attention_layers(model)]
        self._attention = PostProcessingCache(attention, compat_layers.attention_parts, compat_layers.ATTENTION_CACHES)
        self._standing: Mapping[int, Mapping[str, torch.Tensor]] = {}
        self._direct_padding = tuple(box for box in padding if box.buffer in self._direct)

    differences = ()

    def standing(self, bucket: int) -> Mapping[str, torch.Tensor] | None:
        """Live buffers, where all of the bucket are written directly."""
        return self._direct.group(self._names[bucket]) if self._is_direct[bucket] else None

    def _in_progress(self, bucket: int) -> dict[str, torch.Tensor]:
        """Buffers of a bucket, some of modules that are put into checkpoint layout for it."""
        return {name: self._direct[name] if name in self._direct else self._layerwise[name] for name in self._names[bucket]}

    @property
    def peak_extra_bytes(self) -> int:
        """Peak bytes of modules in progress, without the memory that vLLM's post-processing allocates itself."""
        return self._layerwise.peak_bytes

    @torch.no_grad()
    def open(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """``Sink.open``: from now on the model holds no version until ``close``."""
        self._standing = standing
        write_padding(self._direct_padding, {box.buffer: self._direct[box.buffer] for box in self._direct_padding})
        self._layerwise.complete_after(-1)

    @torch.no_grad()
    def write(self, bucket: int, arrival: Arrival, landed: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """``Sink.write``. ``landed`` gets live memory of ``direct`` buffers."""
        standing = self._standing.get(bucket)
        buffers = self._in_progress(bucket) if standing is None else standing
        arrival.land(buffers)
        landed(buffers)
        # The buffers of a module would outlive its completion.
        del buffers, standing
        self._layerwise.complete_after(bucket)

    @torch.no_grad()
    def close(self) -> None:
        """Complete state derived from several modules: absorbed and attention weights, packed copies of a shared parameter."""
        left = self._layerwise.in_progress
        assert not left, f"{len(left)} buffers are incomplete after the last bucket, among them {left[0]}"
        self._attention.run(lambda layer: compat_layers.finish_attention(layer, self._model_config))
        compat_reload.refresh_sharers(self._model)

    def abandon(self) -> None:
        """Restore the live tensors of modules in progress; the values are of no version."""
        self._layerwise.abandon()


def _spans(buckets: Sequence[Sequence[str]], padding: Sequence[Padding]) -> dict[str, tuple[int, int]]:
    """For each buffer the first and the last bucket that brings some of it; -1 where it is all padding."""
    spans = {box.buffer: (-1, -1) for box in padding}
    for number, names in enumerate(buckets):
        for name in names:
            first = spans.get(name, (-1, -1))[0]
            spans[name] = number if first < 0 else first, number
    return spans


# Direct.


class DirectBuffers:
    """Live parameters and buffers by name, looked at each time: the engine may have got others in between. Those of ``beside`` stay."""

    def __init__(self, model: torch.nn.Module, names: Iterable[str], beside: Mapping[str, torch.Tensor]) -> None:
        self._owners = {name: owner(model, name) for name in names}
        # A module whose buffers have dots in their names.
        holder = torch.nn.Module()
        holder._buffers.update(beside)
        self._owners.update((name, (holder, name)) for name in beside)
        self._known: dict[tuple[str, ...], _Group] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def __getitem__(self, name: str) -> torch.Tensor:
        module, attribute = self._owners[name]
        return plain(getattr(module, attribute))

    def group(self, names: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
        """Several at once. Costs next to nothing where they are the tensors that they were the last time, at the same addresses."""
        known = self._known.get(names)
        if known is None or not known.is_current():
            owners = [self._owners[name] for name in names]
            live = tuple((module, attribute, getattr(module, attribute)) for module, attribute in owners)
            known = _Group({name: self[name] for name in names}, live, tuple(tensor.data_ptr() for _, _, tensor in live))
            self._known[names] = known
        return known.buffers


@dataclass(frozen=True, slots=True)
class _Group:
    """Buffers as ordinary tensors, and the live ones with their modules, attributes and addresses."""

    buffers: Mapping[str, torch.Tensor]
    live: tuple[tuple[torch.nn.Module, str, torch.Tensor], ...]
    addresses: tuple[int, ...]

    def is_current(self) -> bool:
        return all(
            # Most are parameters, and getattr would look for them in three tables.
            (module._parameters.get(attribute, tensor) is tensor and module._buffers.get(attribute, tensor) is tensor)
            and tensor.data_ptr() == address
            for (module, attribute, tensor), address in zip(self.live, self.addresses, strict=True)
        )


# Layerwise.


@dataclass(frozen=True, slots=True)
class _Module:
    """``buffers``: full name -> name in the module, of filled tensors. ``keep``: tensors that stay live while the module is rebuilt."""

    layer: torch.nn.Module
    buffers: Mapping[str, str]
    keep: frozenset[str]
    padding: tuple[Padding, ...]
    first_bucket: int
    last_bucket: int
    nbytes: int


class LayerwiseBuffers:
    """Buffers by name, of modules that are put into checkpoint layout when they are asked for.

    Args:
        spans: for each buffer the buckets with the first and the last of its bytes; -1 where it is all padding.
        padding: constants to write before post-processing; those of other buffers are ignored.
    """

    def __init__(self, model: torch.nn.Module, spans: Mapping[str, tuple[int, int]], padding: Sequence[Padding]) -> None:
        self.peak_bytes = 0
        self._device = compat_reload.loading_device(model)
        self._bytes: dict[int, int] = {}
        # By bucket, bytes of the modules that begin and end there; and their memory in the present bucket, and how much is taken.
        self._shared_bytes: dict[int, int] = defaultdict(int)
        self._shared: tuple[torch.Tensor, int] | None = None
        self._module_of: dict[str, _Module] = {}
        self._ending: dict[int, list[_Module]] = defaultdict(list)
        named: dict[int, list[str]] = defaultdict(list)
        for name in spans:
            named[id(owner(model, name)[0])].append(name)
        for names in named.values():
            module = _Module(
                layer := owner(model, names[0])[0],
                buffers := {name: name.rpartition(".")[2] for name in names},
                keep := _kept_live(layer, buffers.values()),
                tuple(box for box in padding if box.buffer in buffers),
                min(spans[name][0] for name in names),
                max(spans[name][1] for name in names),
                compat_layers.room(layer, keep),
            )
            if module.first_bucket == module.last_bucket:
                self._shared_bytes[module.last_bucket] += module.nbytes
            self._module_of.update(dict.fromkeys(names, module))
            self._ending[module.last_bucket].append(module)

    def __contains__(self, name: str) -> bool:
        return name in self._module_of

    def __getitem__(self, name: str) -> torch.Tensor:
        module = self._module_of[name]
        if id(module.layer) not in self._bytes:
            # Noted first: what raises half-way is restored too.
            self._bytes[id(module.layer)] = module.nbytes
            compat_layers.materialize(module.layer, module.keep, self._memory(module))
            self.peak_bytes = max(self.peak_bytes, sum(self._bytes.values()))
        return plain(getattr(module.layer, module.buffers[name]))

    def _memory(self, module: _Module) -> torch.Tensor:
        """Memory for the tensors of a module that is materialised now."""
        if module.first_bucket != module.last_bucket:
            return torch.empty(module.nbytes, dtype=torch.uint8, device=self._device)
        if self._shared is None:
            memory = torch.empty(self._shared_bytes[module.last_bucket], dtype=torch.uint8, device=self._device)
            self._shared = memory, 0
        memory, taken = self._shared
        self._shared = memory, taken + module.nbytes
        return memory[taken : taken + module.nbytes]

    def complete_after(self, bucket: int) -> None:
        """Write the fills of, and post-process, the modules that bucket ``bucket`` completes; -1: modules without any bytes."""
        for module in self._ending[bucket]:
            write_padding(module.padding, {name: self[name] for name in module.buffers})
            compat_layers.complete(module.layer)
            del self._bytes[id(module.layer)]
        self._shared = None

    def abandon(self) -> None:
        """Give every module in progress its live tensors back, and its memory free."""
        self._shared = None
        for module in self._module_of.values():
            if self._bytes.pop(id(module.layer), None) is not None:
                compat_layers.restore(module.layer)

    @property
    def in_progress(self) -> tuple[str, ...]:
        """Buffers of modules that were begun and not completed."""
        return tuple(name for name, module in self._module_of.items() if id(module.layer) in self._bytes)


def _kept_live(layer: torch.nn.Module, filled: Iterable[str]) -> frozenset[str]:
    """Unfilled tensors keep their values. Non-persistent buffers are filled in place, because vLLM does not copy them back."""
    rebuilt = set(filled) - layer._non_persistent_buffers_set
    return frozenset(compat_layers.checkpoint_layout(layer)) & compat_layers.live_tensors(layer).keys() - rebuilt
