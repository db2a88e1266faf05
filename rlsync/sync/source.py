"""The seam of the actor's side: where the bytes of a sync come from."""

from __future__ import annotations

from typing import Protocol

import torch

from rlsync.control import BucketEntry


class BucketSource(Protocol):
    """Where the bytes of a sync come from; one on each actor rank.

    Attributes:
        buckets: the table, in layer order, the same on all ranks.
        digest: names what is sent and how it is laid out; must be equal on all ranks.
        nbytes: bytes of all tensors.
    """

    buckets: tuple[tuple[BucketEntry, ...], ...]
    digest: str
    nbytes: int

    def begin(self, version: int) -> None:
        """Make the parameters those after the last optimizer step. May be collective over the actor ranks."""
        ...

    def fill(self, bucket: int, slot: torch.Tensor) -> int:
        """Copy this rank's pieces of a bucket into ``slot`` (1-D uint8); returns the bytes copied. Not collective."""
        ...
