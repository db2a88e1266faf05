"""How the bytes of buckets come to an engine worker: out of the ring that it maps, as messages of a group, or out of lent memory.

All are an ``rlsync.engine.inlet.Inlet``: no call blocks. Owns the thread in which messages are waited for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from rlsync.control.messages import Lender
from rlsync.control.shares import RingInfo, WorkerShare
from rlsync.engine.inlet import Inlet
from rlsync.engine.sinks.slots import SlotArrival
from rlsync.sync.borrowing import LoanInlet
from rlsync.sync.tasks import Lane, Tasks
from rlsync.transport.gloo import Group, Inbox
from rlsync.transport.shm import Ring


def open_inlet(share: WorkerShare, timeout_s: float, device: torch.device) -> Inlet:
    """The way in that a share names. ``timeout_s``: of the phases. ``device``: of the worker."""
    if share.lenders:
        return LoanInlet(share, device)
    if share.group is not None:
        return GroupInlet(share, timeout_s)
    assert share.ring is not None
    return RingInlet(share, share.ring)


class _Lasting:
    """What borrows nothing, prepares nothing, and lets go of nothing between syncs."""

    def borrow(self, loans: Sequence[Lender]) -> None:
        pass

    def prepare(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        pass

    def rest(self) -> None:
        pass


class RingInlet(_Lasting):
    """A bucket that is ready can be read."""

    fd = None
    extra_bytes = 0

    def __init__(self, share: WorkerShare, ring: RingInfo) -> None:
        self._parts = share.parts
        self._ring = Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)

    def join(self, group: int) -> bool:
        return True

    def fetch(self, bucket: int, buckets_ready: int) -> SlotArrival:
        part = self._parts[bucket]
        slot = self._ring.slot(bucket % self._ring.num_slots)
        return SlotArrival(slot[part.offset : part.offset + part.nbytes], part.segments)

    def abandon(self) -> None:
        pass

    def close(self) -> None:
        self._ring.close()


class GroupInlet(_Lasting):
    """A bucket that is ready is asked for as soon as there is memory for it, while those before it are taken in.

    Each group has a thread and memory of its own, so that nothing that is left over of one gets into the next.
    """

    def __init__(self, share: WorkerShare, timeout_s: float) -> None:
        self._share, self._timeout_s = share, timeout_s
        self._group: Group | None = None
        self._inbox: Inbox | None = None
        self._tasks = Tasks()
        self._lane: Lane | None = None
        self._arrived: dict[Any, Any] = {}
        self._num_asked = 0

    @property
    def fd(self) -> int:
        return self._tasks.fd

    @property
    def extra_bytes(self) -> int:
        return 0 if self._inbox is None else self._inbox.nbytes

    def join(self, group: int) -> bool | None:
        if self._group is None or self._group.number != group:
            self.abandon()
            assert self._share.group is not None
            made = self._group = Group(self._share.group, group, self._timeout_s)
            self._tasks, lane = Tasks(), Lane(lambda: None, name="rlsync-inlet")
            self._lane = lane
            lane.submit(self._tasks, "open", lambda: self._open(made))
        self._collect()
        self._inbox = self._arrived.pop("open", self._inbox)
        self._num_asked = 0
        return None if self._inbox is None else True

    def _open(self, group: Group) -> Inbox:
        group.open()
        return Inbox(group, self._share.parts, self._share.num_slots)

    def fetch(self, bucket: int, buckets_ready: int) -> SlotArrival | None:
        inbox, lane = self._inbox, self._lane
        assert inbox is not None and lane is not None, "join() comes first"
        for number in range(self._num_asked, min(buckets_ready, bucket + self._share.num_slots)):
            self._num_asked = number + 1
            if self._share.parts[number].nbytes:
                lane.submit(self._tasks, number, partial(inbox.receive, number))
        self._collect()
        memory = self._arrived.pop(bucket, None)
        return None if memory is None else SlotArrival(memory, self._share.parts[bucket].segments)

    def _collect(self) -> None:
        for outcome in self._tasks.finished():
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    # The traceback refers to this frame, and would keep a broken group until a worker at rest collects cycles.
                    del outcome
            self._arrived[outcome.key] = outcome.result

    def abandon(self) -> None:
        if self._group is not None:
            self._group.abandon()
        if self._lane is not None:
            self._lane.stop()
        self._group = self._inbox = self._lane = None
        # What still ends in the former thread has the former tasks, and goes with them.
        self._tasks, self._arrived, self._num_asked = Tasks(), {}, 0

    def close(self) -> None:
        self.abandon()
