"""What a connection plan assigns, without anything opened: stand-ins for what rank 0 hosts, and the ends of every transport decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec

from rlsync.coordinator.messages import ActorAssignment, WorkerAssignment
from rlsync.sync.planning import ConnectionPlan
from rlsync.transport import ipc, p2p, shm
from rlsync.transport.rendezvous import GroupInfo

_SENDERS = {"ipc": ipc.SenderEnd, "shm": shm.SenderEnd, "nccl": p2p.SenderEnd, "gloo": p2p.SenderEnd}
_RECEIVERS = {"ipc": ipc.ReceiverEnd, "shm": shm.ReceiverEnd, "nccl": GroupInfo, "gloo": GroupInfo}


@dataclass(frozen=True)
class Assigned:
    """``senders``: by actor rank, by transport; ``receivers``: by worker."""

    actors: Sequence[ActorAssignment]
    workers: Sequence[WorkerAssignment]
    senders: Sequence[dict[str, Any]]
    receivers: Sequence[Any]

    @property
    def groups(self) -> list[p2p.SenderEnd]:
        """Ends of the actor ranks in the group, if there is one."""
        return [end for ends in self.senders for end in ends.values() if isinstance(end, p2p.SenderEnd)]

    @property
    def exporters(self) -> list[ipc.SenderEnd]:
        """By actor rank; one that exports nothing has an empty end."""
        num_buckets = self.actors[0].num_buckets
        return [ends.get("ipc", ipc.SenderEnd(0, ((),) * num_buckets, ((),) * num_buckets)) for ends in self.senders]


def assigned(plan: ConnectionPlan, num_slots: int = 2, verify: str = "off") -> Assigned:
    """Everybody's assignment, read as its transport reads it."""
    ring: Any = SimpleNamespace(path="/dev/shm/ring", token="token", num_slots=num_slots, slot_bytes=1)
    store: Any = SimpleNamespace(host="127.0.0.1", port=1234)
    actors, workers = plan.assignments(num_slots, verify, {"shm": ring, "nccl": store, "gloo": store})
    decode = msgspec.msgpack.decode
    senders = [{name: decode(end, type=_SENDERS[name]) for name, end in each.ends.items()} for each in actors]
    return Assigned(actors, workers, senders, [decode(each.end, type=_RECEIVERS[each.transport]) for each in workers])
