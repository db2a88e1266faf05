"""This process's ends of the transports of a connection: what rank 0 opens for all, and the senders of this actor rank."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch

from rlsync.coordinator.messages import ActorAssignment, WorkerAssignment
from rlsync.copy.addresses import BufferAddresses
from rlsync.sync.config import SyncConfig
from rlsync.sync.planning import ConnectionPlan
from rlsync.transport.ends import Hosted, HostSettings, Sender, SenderContext, transport


class Endpoints:
    """The ends of one connection that are in this process.

    Attributes:
        hosted: by transport, what rank 0 keeps open.
        senders: of this rank, by transport.
    """

    def __init__(self) -> None:
        self.hosted: dict[str, Hosted] = {}
        self.senders: dict[str, Sender] = {}
        self._on_abandon: list[Callable[[], None]] = []
        self._on_next: list[Callable[[], None]] = []
        # Where no connection follows; at the end of the process it goes by itself.
        weakref.finalize(self, _call_all, self._on_next).atexit = False

    def host(self, plan: ConnectionPlan, config: SyncConfig) -> tuple[tuple[ActorAssignment, ...], tuple[WorkerAssignment, ...]]:
        """Rank 0: open what the plan's transports attach to; returns everybody's assignment."""
        settings = HostSettings(config.bind_host, config.num_slots, config.timeout_s)
        for name, routes in plan.routes(config.num_slots).items():
            hosted = transport(name).host(routes, settings)
            if hosted is not None:
                self.hosted[name] = hosted
        return plan.assignments(config.num_slots, config.verify, self.hosted)

    def attach(
        self,
        assignment: ActorAssignment,
        timeout_s: float,
        addresses: BufferAddresses,
        *,
        stable_memory: bool,
        device: torch.device | None,
    ) -> Callable[[], dict[str, bytes]]:
        """Make this rank's senders, when all workers have dialed in. What is returned waits for the other members of groups, and says what
        this rank exports."""
        _call_all(self._on_next)
        for name, end in assignment.ends.items():
            context = SenderContext(addresses, stable_memory, timeout_s, device, self.hosted.get(name), self._on_abandon, self._on_next)
            self.senders[name] = transport(name).make_sender(end, context)
        return lambda: join(self.senders, 0)

    def seal(self) -> None:
        """Everybody is attached: nobody else may be."""
        for hosted in self.hosted.values():
            hosted.seal()

    def abandon(self) -> None:
        """After a failed sync: messages in flight arrive nowhere."""
        for call in self._on_abandon:
            call()

    def close(self) -> None:
        """Leave for good; memory that workers may still map is given back by the next ``attach``, or with this object. Idempotent."""
        ends: Sequence[Sender | Hosted] = (*self.senders.values(), *self.hosted.values())
        self.senders, self.hosted, self._on_abandon = {}, {}, []
        for end in ends:
            end.close()


def _call_all(calls: list[Callable[[], None]]) -> None:
    """Call each of them, once."""
    while calls:
        calls.pop()()


def join(senders: Mapping[str, Sender], group: int) -> dict[str, bytes]:
    """Take part in the next sync; returns what this rank exports anew, by transport. Collective over the members of the group."""
    exports = ((name, sender.join(group)) for name, sender in senders.items())
    return {name: export for name, export in exports if export is not None}
