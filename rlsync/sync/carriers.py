"""What carries an actor rank's bytes: the ring that it maps, the group that it sends in, the memory that it lends. Owns their ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rlsync.coordinator.assignments import ActorShare, GroupInfo, Loan, RingInfo, WorkerShare
from rlsync.sync.config import SyncConfig
from rlsync.sync.lending import Lender
from rlsync.sync.planning import Blueprint
from rlsync.sync.wires import message_device, wire_maker
from rlsync.transport.boxes import Outbox
from rlsync.transport.meeting import Rendezvous
from rlsync.transport.shm import Ring


class Carriers:
    """Of one connection. Rank 0 makes what all attach to.

    Attributes:
        ring: where there is one.
        outbox: for messages, where this rank has a group to send them in.
        lender: of what workers read in device memory, where they do.
    """

    def __init__(self) -> None:
        self.outbox: Outbox | None = None
        self.lender: Lender | None = None
        self.ring: Ring | None = None
        self._rendezvous: Rendezvous | None = None

    def make(self, blueprint: Blueprint, config: SyncConfig, num_actors: int) -> tuple[tuple[ActorShare, ...], tuple[WorkerShare, ...]]:
        """Rank 0: the ring and the meeting place that a plan takes, and the shares that say where they are."""
        ring, group = None, None
        if blueprint.slot_bytes:
            self.ring = Ring.create(config.num_slots, blueprint.slot_bytes)
            ring = RingInfo(str(self.ring.path), self.ring.token, self.ring.num_slots, self.ring.slot_bytes)
        if blueprint.members:
            self._rendezvous = Rendezvous(config.bind_host, config.timeout_s)
            group = GroupInfo(
                config.bind_host,
                self._rendezvous.port,
                0,
                blueprint.members,
                blueprint.group_transport,
                blueprint.num_steps,
                blueprint.engines,
            )
        return blueprint.shares(num_actors, config.num_slots, config.verify, ring=ring, group=group)

    def attach(
        self, share: ActorShare, timeout_s: float, buffers: Mapping[str, torch.Tensor], *, stays: bool, device: torch.device | None
    ) -> Callable[[], Loan | None]:
        """Take hold of what a share names. What is returned waits for the other members of the group, and says what is lent.

        ``buffers``, ``stays`` and ``device`` are as for a Lender.
        """
        ring = share.ring
        if ring is not None and self.ring is None:
            self.ring = Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)
        lender = None
        if share.lent or share.stage_bytes:
            assert device is not None, "a rank without a device lends nothing"
            lender = self.lender = Lender(share, buffers, stays=stays, device=device)
        outbox = self.outbox = make_outbox(share, timeout_s, device)

        def enter() -> Loan | None:
            if outbox is not None:
                outbox.join(0)
            return None if lender is None else lender.loan()

        return enter

    def seal(self) -> None:
        """Everybody is attached: take away the ring's name, and nobody else can be."""
        if self.ring is not None:
            self.ring.unlink()

    def slots(self) -> list[torch.Tensor]:
        """Of the ring in host memory, 1-D uint8; none where there is no ring."""
        return [] if self.ring is None else [self.ring.slot(i) for i in range(self.ring.num_slots)]

    def abandon(self) -> None:
        """After a failed sync: what is on its way arrives nowhere."""
        if self.outbox is not None:
            self.outbox.abandon()

    def close(self) -> None:
        """Unmap the ring, leave the group, close the meeting place, give the staging ring back."""
        self.abandon()
        if self.lender is not None:
            self.lender.close()
        if self.ring is not None:
            self.ring.close()
        self.ring = self.outbox = self.lender = self._rendezvous = None


def make_outbox(share: ActorShare, timeout_s: float, device: torch.device | None) -> Outbox | None:
    """Memory for what an actor rank sends, or None where there is no group."""
    if share.group is None:
        return None
    return Outbox(share, wire_maker(share.group, timeout_s, device), message_device(share.group, device))
