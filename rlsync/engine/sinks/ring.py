"""Where a worker puts the tensors of a bucket. Owns their lifetimes in the slot; knows no channel and no transport.

A sink has ``open``, ``write`` for each bucket in order, and ``close``; after an error ``abandon`` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rlsync.engine import compat

if TYPE_CHECKING:
    from rlsync.control import BucketEntry


class SlotReader(Protocol):
    """A ring of slots, as the sink sees it."""

    def tensor(self, index: int, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A typed view of a part of slot ``index``, with a storage object of its own."""
        ...


class LoadersSink:
    """HF-named tensors through the model's own loaders and vLLM's layer-wise reload.

    vLLM keeps the tensors of a layer until the layer is complete, which may be in a later bucket, or (padded vocabulary)
    never before ``close``. Such tensors are copied out of the slot, all others are read where they lie. The first sync
    copies everything and learns which names are kept at the end of their bucket; every later one verifies it.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, buckets: tuple[tuple[BucketEntry, ...], ...]) -> None:
        self._model, self._model_config, self._buckets = model, model_config, buckets
        self._kept: dict[int, frozenset[str]] = {}

    def open(self) -> None:
        """Begin a reload; the model cannot compute until ``close`` or ``abandon``."""
        compat.begin_reload(self._model)

    def write(self, bucket: int, slot: int, ring: SlotReader) -> None:
        """Load bucket ``bucket`` from slot ``slot``; nothing refers to the slot afterwards.

        Raises RuntimeError where vLLM keeps a tensor it did not keep the first time: the slot is then not to be reused.
        """
        kept = self._kept.get(bucket)
        tensors, watched = [], {}
        for entry in self._buckets[bucket]:
            tensor = ring.tensor(slot, entry.offset_bytes, tuple(entry.shape), getattr(torch, entry.dtype))
            if kept is None or entry.name in kept:
                tensor = tensor.clone()
            if kept is None or entry.name not in kept:
                watched[entry.name] = StorageWeakRef(tensor.untyped_storage())
            tensors.append((entry.name, tensor))
            del tensor
        # The iterator empties the list, so that no name here keeps a tensor alive.
        tensors.reverse()
        compat.load_weights(self._model, (tensors.pop() for _ in range(len(tensors))))
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
