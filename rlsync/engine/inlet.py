"""The seam between a worker and what brings its bytes. Knows no transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from rlsync.coordinator.messages import Lender
from rlsync.engine.sinks import Arrival


class Inlet(Protocol):
    """How the bytes of buckets come to this worker. No call blocks; each raises what has failed, ConnectionError where it is a link."""

    @property
    def fd(self) -> int | None:
        """Readable when a call that gave None is worth repeating; None where no call does."""
        ...

    @property
    def lands_ahead(self) -> bool:
        """Whether buckets are put into the buffers of ``expect`` as they come, before ``Ready`` is heard of them."""
        ...

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes in this process."""
        ...

    def join(self, group: int) -> bool | None:
        """Begin a sync whose messages travel in the group of this number. True when this worker is in it."""
        ...

    def borrow(self, loans: Sequence[Lender]) -> None:
        """Take note of what actor ranks lend from now on."""
        ...

    def prepare(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Make ready what can be made before a sync: the bucket will land in these buffers."""
        ...

    def expect(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Only where it ``lands_ahead``: the buffers, by bucket, may be written from now on, once in each sync before any ``fetch``.

        They are written behind what this thread has enqueued on its current stream so far.
        """
        ...

    def fetch(self, bucket: int, buckets_ready: int) -> Arrival | None:
        """This worker's part of a bucket when it is here; it stays until a later bucket is asked for.

        Buckets ``[0, buckets_ready)`` can be had, and any where it ``lands_ahead``; they are asked for in order, and not those of
        which this worker takes nothing.
        """
        ...

    def rest(self) -> None:
        """The last bucket has landed, and nothing is in flight: let go of what does not stay."""
        ...

    def abandon(self) -> None:
        """After an error: nothing is written any more to what ``fetch`` gave."""
        ...

    def close(self) -> None:
        """Leave for good. Idempotent."""
        ...
