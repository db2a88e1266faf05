"""While bytes move: which buckets are filled, taken and held, and who hears of it. Keeps no phase and no deadline."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rlsync.control import messages as m
from rlsync.control.connecting import Connecting
from rlsync.control.progress import Progress
from rlsync.control.roster import Member, Roster


class Transferring:
    """The steps of the phase ``transfer``.

    Args:
        connecting: has what was agreed on: the workers' streams, and the ledger of what is lent.
        send: hands a message to one peer.
        fail: makes a cause everybody's error; the peer is the one it came from.
    """

    def __init__(
        self,
        roster: Roster,
        connecting: Connecting,
        send: Callable[[bytes, m.FromCoordinator], None],
        fail: Callable[[str, Member | None], None],
    ) -> None:
        self._roster, self._connecting, self._send, self._fail = roster, connecting, send, fail

    def tell_writable(self, sync: Progress, actors: Iterable[bytes]) -> None:
        """Say which slots are free."""
        for identity in actors:
            self._send(identity, m.Writable(sync.attempt, sync.buckets_writable, sync.group))

    def tell_ready(self, sync: Progress) -> None:
        """Say to all workers that have joined which buckets are complete, and what each has not heard of them."""
        for identity in sync.joined:
            sums = sync.untold(identity, self._connecting.streams[identity])
            loans = self._connecting.ledger.renewed(identity, sync.attempt) if sync.buckets_ready else ()
            self._send(identity, m.Ready(sync.attempt, sync.buckets_ready, sums, sync.group, loans))

    def fill(self, sync: Progress, peer: Member, message: m.Filled, num_actors: int) -> bool:
        """An actor rank has filled a bucket. Returns whether more buckets are ready now."""
        outcome = sync.fill(peer.identity, message.bucket, message.sums, num_actors)
        if isinstance(outcome, str):
            self._fail(f"{peer} {outcome}", peer)
            return False
        return outcome

    def take(self, sync: Progress, peer: Member, message: m.Done) -> None:
        """A worker is done with a bucket, whose slot may be free now."""
        outcome = sync.take(peer.identity, message.bucket, len(self._roster.workers()))
        if isinstance(outcome, str):
            self._fail(f"{peer} {outcome}", peer)
        elif outcome:
            self.tell_writable(sync, sync.started)

    def hold(self, sync: Progress, peer: Member, message: m.Loaded) -> bool:
        """A worker holds every bucket. Returns whether all do."""
        if sync.done.get(peer.identity, 0) != sync.num_buckets:
            self._fail(f"{peer} says loaded after {sync.done.get(peer.identity, 0)} of {sync.num_buckets} buckets", peer)
            return False
        sync.loaded[peer.identity] = message
        return len(sync.loaded) == len(self._roster.workers())
