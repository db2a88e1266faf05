"""What carries an actor rank's bytes: the ring that it maps, and the group that it sends in. Owns both and their ends."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlsync.control.shares import ActorShare, GroupInfo, RingInfo, WorkerShare
from rlsync.sync.config import SyncConfig
from rlsync.sync.filling import make_outbox
from rlsync.sync.planning import Blueprint
from rlsync.transport.gloo import Outbox, Rendezvous
from rlsync.transport.shm import Ring


class Carriers:
    """Of one connection. Rank 0 makes what all attach to.

    Attributes:
        ring: where there is one.
        outbox: for messages, where this rank has a group to send them in.
    """

    def __init__(self) -> None:
        self.outbox: Outbox | None = None
        self.ring: Ring | None = None
        self._rendezvous: Rendezvous | None = None

    def make(self, blueprint: Blueprint, config: SyncConfig, num_actors: int) -> tuple[tuple[ActorShare, ...], tuple[WorkerShare, ...]]:
        """Rank 0: the ring and the meeting place that a plan takes, and the shares that say where they are."""
        ring, group = None, None
        if blueprint.slot_bytes:
            self.ring = Ring.create(config.num_slots, blueprint.slot_bytes)
            ring = RingInfo(str(self.ring.path), self.ring.token, self.ring.num_slots, self.ring.slot_bytes)
        if blueprint.remote:
            self._rendezvous = Rendezvous(config.bind_host, config.timeout_s)
            group = GroupInfo(config.bind_host, self._rendezvous.port, 0, blueprint.members)
        return blueprint.shares(num_actors, config.num_slots, config.verify, ring=ring, group=group)

    def attach(self, share: ActorShare, timeout_s: float) -> Callable[[], None]:
        """Take hold of what a share names. What is returned waits for the other members of the group."""
        ring = share.ring
        if ring is not None and self.ring is None:
            self.ring = Ring.attach(ring.path, ring.token, ring.num_slots, ring.slot_bytes)
        outbox = self.outbox = make_outbox(share, timeout_s)
        return lambda: None if outbox is None else outbox.join(0)

    def seal(self) -> None:
        """Everybody is attached: take away the ring's name, and nobody else can be."""
        if self.ring is not None:
            self.ring.unlink()

    def slots(self) -> list[torch.Tensor]:
        """Of the ring, 1-D uint8; none where there is no ring."""
        return [] if self.ring is None else [self.ring.slot(i) for i in range(self.ring.num_slots)]

    def abandon(self) -> None:
        """After a failed sync: what is on its way arrives nowhere."""
        if self.outbox is not None:
            self.outbox.abandon()

    def close(self) -> None:
        """Unmap the ring, leave the group, close the meeting place."""
        self.abandon()
        if self.ring is not None:
            self.ring.close()
        self.ring = self.outbox = self._rendezvous = None
