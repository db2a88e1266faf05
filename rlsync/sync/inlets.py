"""How the bytes of buckets come to an engine worker: out of the ring that it maps, as messages of a group, or out of lent memory.

All are an ``rlsync.engine.inlet.Inlet``: no call blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rlsync.coordinator.assignments import RingInfo, WorkerShare
from rlsync.coordinator.messages import Lender
from rlsync.engine.inlet import Inlet
from rlsync.engine.sinks.slots import SlotArrival
from rlsync.sync.borrowing import LoanInlet
from rlsync.sync.group_inlet import GroupInlet
from rlsync.transport.shm import Ring


def open_inlet(share: WorkerShare, timeout_s: float, device: torch.device) -> Inlet:
    """The way in that a share names. ``timeout_s``: of the phases. ``device``: of the worker."""
    if share.lenders:
        return LoanInlet(share, device)
    if share.group is not None:
        return GroupInlet(share, timeout_s, device)
    assert share.ring is not None
    return RingInlet(share, share.ring)


class RingInlet:
    """A bucket that is ready can be read. Nothing is borrowed, prepared, or let go of between syncs."""

    fd = None
    lands_ahead = False
    extra_bytes = 0

    def __init__(self, share: WorkerShare, ring: RingInfo) -> None:
        self._parts = share.parts
        self._ring = Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)

    def join(self, group: int) -> bool:
        return True

    def borrow(self, loans: Sequence[Lender]) -> None:
        pass

    def prepare(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        pass

    def expect(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        pass

    def rest(self) -> None:
        pass

    def fetch(self, bucket: int, buckets_ready: int) -> SlotArrival:
        part = self._parts[bucket]
        slot = self._ring.slot(bucket % self._ring.num_slots)
        return SlotArrival(slot[part.offset : part.offset + part.nbytes], part.segments)

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        self._ring.close()
