"""The seam of the actor's side: whose weights a sync sends."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
import torch

from rlsync.layout.geometry import Placement, TensorSpec


class Source(Protocol):
    """Weights of the actor; one on each actor rank."""

    @property
    def tensors(self) -> Sequence[TensorSpec]:
        """Every HF tensor, in the order in which buckets carry them; the same on all ranks."""
        ...

    @property
    def placements(self) -> Sequence[Placement]:
        """What each actor rank holds, by rank; the same on all ranks."""
        ...

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Memory of this rank's placement, by buffer name: contiguous tensors, the same objects for good, of constant shape and dtype."""
        ...

    @property
    def stable_memory(self) -> bool:
        """Whether the buffers stay allocated between syncs. If not, engines unmap them at the end of each sync."""
        ...

    def begin(self, version: int) -> None:
        """Make the weights those of ``version``. May be collective over the actor ranks."""
        ...


def source_digest(tensors: Sequence[TensorSpec], placement: Placement) -> str:
    """SHA-256 of the tensors and of one rank's placement."""
    return hashlib.sha256(msgspec.msgpack.encode((tuple(tensors), placement))).hexdigest()
