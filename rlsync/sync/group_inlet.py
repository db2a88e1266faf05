"""How messages of a group come to an engine worker. Owns the thread in which they are waited for; no call here blocks.

What ``abandon`` leaves to end by itself has ended before the next group is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlsync.coordinator.assignments import WorkerShare
from rlsync.coordinator.messages import Lender
from rlsync.engine.sinks import Arrival
from rlsync.engine.sinks.slots import SlotArrival
from rlsync.sync.tasks import Lane, Tasks
from rlsync.sync.wires import message_device, wire_maker
from rlsync.transport.boxes import Inbox, Ticket, Wire
from rlsync.transport.meeting import GroupError

# What is given up on a device is gone within a fraction of a second.
_CLOSE_S = 5.0


class GroupInlet:
    """A bucket is asked for as soon as there is memory for it, while those before it are taken in.

    Each group has a thread and memory of its own, so that nothing that is left over of one gets into the next.
    """

    def __init__(self, share: WorkerShare, timeout_s: float, device: torch.device) -> None:
        assert share.group is not None
        self._share, self._timeout_s, self._device = share, timeout_s, device
        self._make_wire = wire_maker(share.group, timeout_s, device)
        # On GPUs messages wait for their receiver on the device, and nobody has to hear first that they were sent.
        self.lands_ahead = share.group.transport == "nccl"
        self._wire: Wire | None = None
        self._former: Wire | None = None
        self._inbox: Inbox | None = None
        self._tasks = Tasks()
        self._lane: Lane | None = None
        self._arrived: dict[Any, Any] = {}
        self._landing: Mapping[int, Mapping[str, torch.Tensor]] = {}
        self._begun: Ticket = None
        self._num_asked = 0

    @property
    def fd(self) -> int:
        return self._tasks.fd

    @property
    def extra_bytes(self) -> int:
        return 0 if self._inbox is None else self._inbox.nbytes

    def join(self, group: int) -> bool | None:
        if self._wire is None or self._wire.number != group:
            self.abandon()
            made, former = self._make_wire(group), self._former
            self._wire = made
            self._tasks, lane = Tasks(), Lane(self._use_device, name="rlsync-inlet")
            self._lane = lane
            lane.submit(self._tasks, "open", lambda: self._open(made, former))
        self._collect()
        if "open" in self._arrived:
            self._inbox, self._former = self._arrived.pop("open"), None
        self._landing, self._num_asked = {}, 0
        return None if self._inbox is None else True

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _open(self, wire: Wire, former: Wire | None) -> Inbox:
        assert self._share.group is not None
        if former is not None and not former.rest(self._timeout_s):
            raise GroupError(f"the {self._share.group.transport} group before this one still writes to this worker; restart the engine")
        inbox = Inbox(self._share, wire, message_device(self._share.group, self._device))
        inbox.open()
        return inbox

    def borrow(self, loans: Sequence[Lender]) -> None:
        pass

    def prepare(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        if self.lands_ahead:
            assert self._inbox is not None, "join() comes first"
            self._inbox.bind(bucket, buffers)

    def expect(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        assert self._inbox is not None, "join() comes first"
        for bucket, buffers in standing.items():
            self._inbox.bind(bucket, buffers)
        self._landing, self._begun = standing, self._inbox.wire.mark()
        self._ask(self._share.num_slots)

    def fetch(self, bucket: int, buckets_ready: int) -> Arrival | None:
        window = bucket + self._share.num_slots
        self._ask(window if self.lands_ahead else min(buckets_ready, window))
        self._collect()
        if bucket not in self._arrived:
            return None
        slot = self._arrived.pop(bucket)
        return Landed(self._landing[bucket]) if slot is None else SlotArrival(slot, self._share.parts[bucket].segments)

    def _ask(self, end: int) -> None:
        """Have the buckets before ``end`` received, one after another."""
        inbox, lane = self._inbox, self._lane
        assert inbox is not None and lane is not None, "join() comes first"
        for number in range(self._num_asked, min(end, len(self._share.parts))):
            self._num_asked = number + 1
            if self._share.parts[number].nbytes:
                landing = number in self._landing
                lane.submit(self._tasks, number, partial(inbox.land, number, self._begun) if landing else partial(inbox.receive, number))

    def _collect(self) -> None:
        for outcome in self._tasks.finished():
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    # The traceback refers to this frame, and would keep a broken group until a worker at rest collects cycles.
                    del outcome
            self._arrived[outcome.key] = outcome.result

    def rest(self) -> None:
        pass

    def abandon(self) -> None:
        if self._inbox is not None:
            self._inbox.abandon()
        elif self._wire is not None:
            self._wire.abandon(())
        if self._lane is not None:
            self._lane.stop()
        if self._wire is not None:
            # Kept only while it writes: a broken group that is named anywhere keeps its port.
            self._former = None if self._wire.rest(0.0) else self._wire
        self._wire = self._inbox = self._lane = None
        # What still ends in the former thread has the former tasks, and goes with them.
        self._tasks, self._arrived, self._num_asked = Tasks(), {}, 0
        self._landing, self._begun = {}, None

    def close(self) -> None:
        """Waits for what writes to the model's memory, as another connection may be next to write there."""
        self.abandon()
        if self._former is not None:
            self._former.rest(_CLOSE_S)
            self._former = None


@dataclass(frozen=True, slots=True)
class Landed:
    """A bucket that is where it belongs: in these buffers."""

    buffers: Mapping[str, torch.Tensor]

    def land(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Nothing is left to copy. Raises RuntimeError where the buffers are no longer those that were announced."""
        moved = [name for name, tensor in buffers.items() if name not in self.buffers or self.buffers[name].data_ptr() != tensor.data_ptr()]
        if moved:
            raise RuntimeError(f"{len(moved)} parameters have moved while they were written, among them {moved[0]}")
