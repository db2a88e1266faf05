"""Buckets as HF-named tensors, through vLLM's own loaders. Its segments are elements of HF tensors, and their buffer the HF name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rlsync.engine.compat import layers as compat_layers
from rlsync.engine.compat import reload as compat_reload
from rlsync.engine.sinks.post_processing import PostProcessingCache
from rlsync.layout.geometry import TensorSpec
from rlsync.plan.packing import Segment, side_by_side
from rlsync.transport.ends import Arrival


class LoadersSink:
    """Every bucket through ``load_weights``, out of memory in which its tensors have their whole shape.

    Elements that no segment brings are anything: no loader uses them. Loaders write layers where they live, but for those of
    ``layers``: these go through vLLM's reload, which keeps their tensors until a layer is complete; that may be in a later bucket,
    or (padded vocabulary) never before ``close``. Tensors that are still referred to when a bucket has been loaded keep the
    memory they are in, and get a copy of their own from the next sync on.

    Args:
        buckets: for each bucket its segments.
        tensors: by name, of every buffer that occurs.
        layers: what cannot be written where it lives.
    """

    differences = ()

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,
        buckets: Sequence[Sequence[Segment]],
        tensors: Mapping[str, TensorSpec],
        layers: Sequence[torch.nn.Module],
        device: torch.device,
    ) -> None:
        self._model, self._model_config, self._layers, self._device = model, model_config, layers, device
        self._buckets = [tuple(tensors[name] for name in dict.fromkeys(s.buffer for s in bucket)) for bucket in buckets]
        reloaded = {id(layer) for layer in layers}
        attention = [layer for _, layer in compat_layers.attention_layers(model) if id(layer) not in reloaded]
        self._attention = PostProcessingCache(attention, compat_layers.attention_parts, compat_layers.ATTENTION_CACHES)
        self._nbytes = max((side_by_side(spec.nbytes for spec in bucket)[-1] for bucket in self._buckets), default=0)
        self._memory: torch.Tensor | None = None
        self._views: dict[int, _Views] = {}
        # Names that were referred to at the end of their bucket, and memory that may still be, with its bytes.
        self._kept: set[str] = set()
        self._left: list[tuple[StorageWeakRef, int]] = []
        # Most bytes taken at once; vLLM's own memory for the layers in progress comes on top.
        self.peak_extra_bytes = 0

    def open(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Begin a reload; the model cannot compute until ``close`` or ``abandon``."""
        compat_reload.begin_reload(self._model, self._layers)

    def standing(self, bucket: int) -> None:
        """None: buckets share one memory."""

    def write(self, bucket: int, arrival: Arrival, landed: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """Load bucket ``bucket``. Only the elements of its segments are defined in the tensors that ``landed`` gets."""
        memory, views = self._in_memory(bucket)
        arrival.land(views.tensors)
        landed(views.tensors)
        # Nothing here refers to what a loader is given, so that a storage shows who still does.
        compat_reload.load_weights(self._model, ((n, self._copy(t) if n in self._kept else t.detach()) for n, t in views.tensors.items()))
        held = views.held()
        if held:
            self._kept |= held
            self._left.append((StorageWeakRef(memory.untyped_storage()), self._nbytes))
            # What refers to it keeps it alive.
            self._memory, self._views = None, {}
        self._left = [(storage, nbytes) for storage, nbytes in self._left if not storage.expired()]
        self.peak_extra_bytes = max(self.peak_extra_bytes, self._nbytes + sum(nbytes for _, nbytes in self._left))

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        self._left.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        return copy

    def _in_memory(self, bucket: int) -> tuple[torch.Tensor, _Views]:
        """The memory that buckets share, and the views of this bucket's tensors in it."""
        if self._memory is None:
            self._memory = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        if bucket not in self._views:
            self._views[bucket] = _Views.of(dict(_laid_out(self._buckets[bucket], self._memory)))
        return self._memory, self._views[bucket]

    def close(self) -> None:
        """Complete the model: padded and attention layers, packed copies, tied heads."""
        compat_reload.finish_reload(self._model, self._layers, self._model_config)
        self._attention.run(lambda layer: compat_layers.finish_attention(layer, self._model_config))
        compat_reload.refresh_sharers(self._model)

    def abandon(self) -> None:
        """Abandon the reload: no parameter stays on meta, and the values are of no version."""
        compat_reload.abandon_reload(self._model)


@dataclass(frozen=True, slots=True)
class _Views:
    """Tensors of a bucket, their storages, and the reference count of each storage while only this object refers to it."""

    tensors: Mapping[str, torch.Tensor]
    storages: tuple[torch.UntypedStorage, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> _Views:
        storages = tuple(tensor.untyped_storage() for tensor in tensors.values())
        return cls(tensors, storages, tuple(map(_num_references, storages)))

    def held(self) -> set[str]:
        """Names of tensors that somebody else refers to, or to a view of which."""
        counts = map(_num_references, self.storages)
        return {name for name, count, own in zip(self.tensors, counts, self.counts, strict=True) if count > own}


def _laid_out(specs: Sequence[TensorSpec], memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors one behind the other in memory (1-D uint8), by name; each has a storage object of its own."""
    for spec, begin in zip(specs, side_by_side(spec.nbytes for spec in specs), strict=False):
        yield spec.name, torch.from_dlpack(memory[begin : begin + spec.nbytes]).view(getattr(torch, spec.dtype)).view(spec.shape)


def _num_references(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)
