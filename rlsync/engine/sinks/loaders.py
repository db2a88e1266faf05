"""HF-named tensors through the model's own loaders and vLLM's layer-wise reload. Owns their lifetimes in the slot.

The fallback where a worker's parameters cannot be placed. Here a segment is a whole HF tensor, and its buffer the HF name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rlsync.engine import compat
from rlsync.engine.sinks import Arrival
from rlsync.engine.sinks.slots import segment_in
from rlsync.staging import Segment


class LoadersSink:
    """Every bucket through ``load_weights``.

    vLLM keeps the tensors of a layer until the layer is complete, which may be in a later bucket, or (padded vocabulary)
    never before ``close``. Such tensors are copied out of the slot, all others are read where they lie. The first sync
    copies everything and learns which names are kept at the end of their bucket; every later one verifies it.

    Args:
        buckets: for each bucket its segments: whole HF tensors, dense.
    """

    differences = ()

    def __init__(self, model: torch.nn.Module, model_config: Any, buckets: tuple[tuple[Segment, ...], ...]) -> None:
        self._model, self._model_config, self._buckets = model, model_config, buckets
        self._kept: dict[int, frozenset[str]] = {}
        self._copies: list[tuple[StorageWeakRef, int]] = []
        # Most bytes of copies at the end of a bucket; vLLM's own memory for the layers in progress comes on top.
        self.peak_extra_bytes = 0

    def open(self) -> None:
        """Begin a reload; the model cannot compute until ``close`` or ``abandon``."""
        compat.begin_reload(self._model)

    def standing(self, bucket: int) -> None:
        """Nothing: tensors are read where they lie in the slot."""

    def write(self, bucket: int, arrival: Arrival, landed: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """Load bucket ``bucket`` from the arrival's slot; nothing refers to the slot afterwards.

        ``landed`` gets the tensors where they lie in the slot. Raises RuntimeError where vLLM keeps a tensor it did not keep the
        first time: the slot is then not to be reused.
        """
        slot = arrival.slot()
        landed({segment.buffer: segment_in(slot, segment) for segment in self._buckets[bucket]})
        kept = self._kept.get(bucket)
        tensors, watched = [], {}
        for segment in self._buckets[bucket]:
            if kept is None or segment.buffer in kept:
                tensor = segment_in(slot, segment).clone()
                self._copies.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
            else:
                tensor = segment_in(_own_storage(slot), segment)
            if kept is None or segment.buffer not in kept:
                watched[segment.buffer] = StorageWeakRef(tensor.untyped_storage())
            tensors.append((segment.buffer, tensor))
            del tensor
        # The iterator empties the list, so that no name here keeps a tensor alive.
        tensors.reverse()
        compat.load_weights(self._model, (tensors.pop() for _ in range(len(tensors))))
        self._copies = [(storage, nbytes) for storage, nbytes in self._copies if not storage.expired()]
        self.peak_extra_bytes = max(self.peak_extra_bytes, sum(nbytes for _, nbytes in self._copies))
        held = frozenset(name for name, storage in watched.items() if not storage.expired())
        if kept is None:
            self._kept[bucket] = held
        elif held:
            raise RuntimeError(
                f"vLLM still holds {len(held)} tensors of bucket {bucket} that it let go in the first sync, "
                f"among them {min(held)}; their slot cannot be filled again"
            )

    def close(self) -> None:
        """Complete the model: padded and attention layers, packed copies, tied heads."""
        compat.finish_reload(self._model, self._model_config)

    def abandon(self) -> None:
        """Leave a model that has no parameter on meta; its values are those of no version."""
        compat.abandon_reload(self._model)


def _own_storage(slot: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage object of its own, so that it can be seen who still refers to it."""
    return torch.from_dlpack(slot)  # type: ignore[no-any-return]
