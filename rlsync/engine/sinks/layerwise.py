"""Buffers that are written in checkpoint layout and then post-processed by vLLM, module by module.

Owns the modules in progress. A module is materialised when its first bytes come and completed with the bucket that brings its last
ones, so that only modules in progress take memory. Those of one bucket lie in one piece of it, which an allocator gives again at the
same address, sync after sync; what vLLM's post-processing still refers to it does not give again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlsync.copy.cpu import write_fills
from rlsync.engine import compat_layers, compat_reload
from rlsync.engine.sinks.choice import owner
from rlsync.engine.sinks.direct import plain
from rlsync.layout.geometry import Fill


@dataclass(frozen=True, slots=True)
class _Module:
    """``buffers``: full name -> name in the module, of what is filled. ``keep``: what stays live while the module is rebuilt."""

    layer: torch.nn.Module
    buffers: Mapping[str, str]
    keep: frozenset[str]
    fills: tuple[Fill, ...]
    first_bucket: int
    last_bucket: int
    nbytes: int


class LayerwiseBuffers:
    """Buffers by name, of modules that are put into checkpoint layout when they are asked for.

    Args:
        spans: for each buffer the buckets with the first and the last of its bytes; -1 where it is all fills.
        fills: constants to write before post-processing; those of other buffers are ignored.
    """

    def __init__(self, model: torch.nn.Module, spans: Mapping[str, tuple[int, int]], fills: Sequence[Fill]) -> None:
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
                tuple(fill for fill in fills if fill.buffer in buffers),
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
        """For the tensors of a module that is begun now."""
        if module.first_bucket != module.last_bucket:
            return torch.empty(module.nbytes, dtype=torch.uint8, device=self._device)
        if self._shared is None:
            memory = torch.empty(self._shared_bytes[module.last_bucket], dtype=torch.uint8, device=self._device)
            self._shared = memory, 0
        memory, taken = self._shared
        self._shared = memory, taken + module.nbytes
        return memory[taken : taken + module.nbytes]

    def complete_after(self, bucket: int) -> None:
        """Fill up and post-process the modules whose last bytes bucket ``bucket`` brought; -1 stands for those without any."""
        for module in self._ending[bucket]:
            write_fills(module.fills, {name: self[name] for name in module.buffers})
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
    """What is not filled keeps its values. Buffers that no checkpoint holds are filled in place: vLLM would not copy them back."""
    rebuilt = set(filled) - layer._non_persistent_buffers_set
    return frozenset(compat_layers.checkpoint_layout(layer)) & compat_layers.live_tensors(layer).keys() - rebuilt
