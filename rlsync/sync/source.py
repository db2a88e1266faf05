"""The seam of the actor's side: whose weights a sync sends."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
import torch

from rlsync.geometry import Placement, TensorSpec


class Source(Protocol):
    """Weights of the actor; one on each actor rank.

    Attributes:
        tensors: every HF tensor, in the order in which buckets carry them; the same on all ranks.
        placements: what each actor rank holds, by rank; the same on all ranks.
        buffers: memory of this rank's placement, by buffer name: contiguous tensors that stay where they are.
    """

    tensors: Sequence[TensorSpec]
    placements: Sequence[Placement]
    buffers: Mapping[str, torch.Tensor]

    def begin(self, version: int) -> None:
        """Make the weights those of ``version``. May be collective over the actor ranks."""
        ...


def source_digest(tensors: Sequence[TensorSpec], placement: Placement) -> str:
    """SHA-256 of what there is and of what one rank holds of it."""
    return hashlib.sha256(msgspec.msgpack.encode((tuple(tensors), placement))).hexdigest()
