"""Before the first sync: who is let in, what they say they hold, and what each is given to do. Keeps no phase and no deadline."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from rlsync.control import messages as m
from rlsync.control.ledger import Ledger
from rlsync.control.roster import Expected, Member, Roster, some


class Connecting:
    """The steps of the phase ``connect``, in the order of the methods.

    Args:
        send: hands a message to one peer.
        fail: makes a cause everybody's error; the peer is the one it came from.

    Attributes:
        num_buckets, num_slots: of the plan, as soon as it is there.
        streams: worker -> its stream.
        ledger: who reads whose device memory.
    """

    def __init__(
        self,
        expected: Expected,
        roster: Roster,
        send: Callable[[bytes, m.FromCoordinator], None],
        fail: Callable[[str, Member | None], None],
    ) -> None:
        self._expected, self._roster, self._send, self._fail = expected, roster, send, fail
        self.num_buckets = self.num_slots = 0
        self.streams: dict[bytes, int] = {}
        self.ledger = Ledger()
        # How many actor ranks and workers have theirs.
        self._num_shares = (0, 0)

    def admit(self, identity: bytes, hello: m.ActorHello | m.WorkerHello, closed: str | None) -> None:
        """Let a peer in, or tell it why not. ``closed``: why nobody is let in any more, where that is so."""
        expected, peer = self._expected, Member(identity, hello)
        reason = self._refusal(peer, closed)
        if reason is not None:
            self._send(identity, m.Error(attempt=0, phase="connect", cause=reason))
            return
        self._roster.admit(peer)
        problem = self._roster.mismatch(peer)
        if problem is not None:
            self._fail(problem, peer)
            return
        if peer.engine is not None:
            self._send(identity, expected.catalogue)
        self._survey()

    def _refusal(self, peer: Member, closed: str | None) -> str | None:
        """Why a peer is not let in, or None."""
        expected, hello = self._expected, peer.hello
        if not hmac.compare_digest(hello.token.encode(), expected.token.encode()):
            return f"{peer} came with a wrong token; it belongs to another run or an earlier connection"
        if hello.run_id != expected.run_id:
            return f"{peer} belongs to run {hello.run_id}, this is run {expected.run_id}"
        if closed is not None:
            return closed
        twin = self._roster.twin(peer)
        return None if twin is None else f"{peer} is here already as pid {twin.hello.pid} on {twin.hello.host}"

    def record(self, peer: Member, message: m.Recorded) -> None:
        """A worker has said what it holds."""
        peer.recorded = message
        self._survey()

    def _survey(self) -> None:
        """When everybody is here: judge the names, and let actor rank 0 plan."""
        if not self._roster.is_recorded():
            return
        findings = [f for engine in self._expected.engines for f in self._roster.name_findings(engine)]
        if findings:
            self._fail(f"what the actor has and what the engines take do not fit: {some(findings, separator='; ')}", None)
        else:
            for part in self._roster.survey().parts():
                self._send(self._roster.actors()[0].identity, part)

    def hand_out(self, message: m.Planned) -> str | None:
        """Give the next ones the shares that actor rank 0 has made. Returns what is wrong where there are not as many, or not all here."""
        num_actors, num_workers = self._num_shares
        actors = self._roster.actors()[num_actors : num_actors + len(message.actors)]
        workers = self._roster.workers()[num_workers : num_workers + len(message.workers)]
        if not self._roster.is_recorded():
            return "before everybody is here"
        if (len(actors), len(workers)) != (len(message.actors), len(message.workers)):
            return f"while {len(self._roster.actors()) - num_actors} and {len(self._roster.workers()) - num_workers} have none"
        self._num_shares = num_actors + len(actors), num_workers + len(workers)
        for member, actor in zip(actors, message.actors, strict=True):
            self.num_buckets, self.num_slots = len(actor.parts), actor.num_slots
            self._send(member.identity, m.Share(actor=actor))
        for member, worker in zip(workers, message.workers, strict=True):
            self.streams[member.identity] = worker.stream
            self.ledger.borrows(member.identity, worker.lenders)
            self._send(member.identity, m.Share(worker=worker))
        return None

    def attach(self, peer: Member, message: m.Attached) -> None:
        """A peer has taken its share; when all have, workers learn what is lent to them."""
        peer.attached = True
        if message.loan is not None:
            self.ledger.lend(peer.place, message.loan)
        if self._roster.is_attached():
            for worker in self._roster.workers():
                self._send(worker.identity, m.Connected(self.ledger.first(worker.identity)))

    def is_complete(self) -> bool:
        """Whether all is done. An engine whose core is stuck has workers that are attached, and is no engine to sync with."""
        return self._roster.is_attached() and self._roster.answered >= set(self._expected.engines)
