"""The one that knows where a sync stands: a state machine that turns messages into messages.

Owns the phases, their deadlines, and the rule that one failure becomes the same error at every peer. It reads no clock,
opens no socket and starts no thread (``server`` does), so that every fault can be told to it in a test.

    connect -> idle -> begin -> transfer -> commit -> resume -> idle ...      any but idle -> failed -> begin ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from rlsync.control import failure
from rlsync.control import messages as m
from rlsync.control.connecting import Connecting
from rlsync.control.progress import Progress
from rlsync.control.roster import Expected, Member, Roster, some
from rlsync.control.transferring import Transferring


class Sender(Protocol):
    """Hands a message to one peer; must not block."""

    def __call__(self, identity: bytes, message: m.FromCoordinator) -> None: ...


class Coordinator:
    """Drives the phases. Feed it ``receive``, ``lose`` and ``expire``; it answers through ``send``.

    Attributes:
        phase: ``connect, idle, begin, transfer, commit, resume`` or ``failed``.
        deadline: clock value at which ``expire`` fails the phase, or None when nobody is waited for.
        version: the version that every engine serves, or None before the first sync.
    """

    def __init__(self, expected: Expected, send: Sender, now: float) -> None:
        self._expected, self._send = expected, send
        self._roster = Roster(expected)
        self._members = self._roster.members
        self._sync: Progress | None = None
        self._early: list[tuple[Member, m.FromPeer]] = []
        self._failure: m.Error | None = None
        self._connecting = Connecting(expected, self._roster, send, self._fail)
        self._transferring = Transferring(self._roster, self._connecting, send, self._fail)
        self.phase, self.version = "connect", -1
        self.deadline: float | None = now + expected.timeout_s

    # Input: a message, a death, the clock.

    def receive(self, identity: bytes, raw: bytes, now: float) -> None:
        """Take one message of a peer. Strangers are answered or ignored and disturb nobody."""
        peer = self._members.get(identity)
        if peer is None and len(raw) > m.MAX_HELLO_BYTES:
            return
        try:
            message = m.decode_from_peer(raw)
        except msgspec.MsgspecError as error:
            if peer is not None:
                self._fail(f"{peer} sent what is no message of this channel: {error}", peer)
            return
        if isinstance(message, m.ActorHello | m.WorkerHello):
            self._admit(identity, message)
        elif peer is not None:
            handler = _HANDLERS.get((type(message), peer.engine is not None))
            if handler is None:
                self._fail(f"{peer} sent {type(message).__name__}, which is not its to send", peer)
            elif peer.engine is not None and self.phase in ("idle", "failed") and getattr(message, "attempt", 0) == self._next_attempt():
                # Its engine was called when rank 0 had sent its Start, and what two peers send comes in any order.
                self._early.append((peer, message))
            else:
                handler(self, peer, message, now)

    def lose(self, identity: bytes) -> None:
        """The process of a peer has ended."""
        peer = self._members.get(identity)
        if peer is None or peer.lost:
            return
        peer.lost = True
        if self.phase not in ("idle", "failed"):
            self._fail(f"the process of {peer} has ended", peer)

    def expire(self, now: float) -> None:
        """Fail the phase when its deadline has passed."""
        if self.deadline is not None and now >= self.deadline:
            self._spread(failure.late(self._roster, self._expected.timeout_s, self.phase, self._sync))

    def fail(self, cause: str) -> None:
        """Fail what is going on for a reason of the coordinator's own process."""
        if self.phase != "idle":
            self._fail(cause, None)

    def process_of(self, identity: bytes) -> tuple[int, str] | None:
        """Pid of an admitted peer and the domain in which that pid means something; None for a stranger."""
        peer = self._members.get(identity)
        return None if peer is None else (peer.hello.pid, peer.hello.pid_domain)

    # Connect.

    def _admit(self, identity: bytes, hello: m.ActorHello | m.WorkerHello) -> None:
        closed = None
        if self.phase != "connect":
            closed = self._failure.cause if self._failure else f"{Member(identity, hello)} came after the connection was complete"
        self._connecting.admit(identity, hello, closed)

    def _on_recorded(self, peer: Member, message: m.Recorded, now: float) -> None:
        if self.phase == "connect":
            self._connecting.record(peer, message)

    def _on_planned(self, peer: Member, message: m.Planned, now: float) -> None:
        if self.phase != "connect" or peer.place != 0:
            problem: str | None = f"in phase {self.phase}, when none are due from it"
        else:
            problem = self._connecting.hand_out(message)
        if problem is not None:
            self._fail(f"{peer} sent shares for {len(message.actors)} actor ranks and {len(message.workers)} workers {problem}", peer)

    def _on_attached(self, peer: Member, message: m.Attached, now: float) -> None:
        if self.phase == "connect" and not peer.attached:
            self._connecting.attach(peer, message)
            self._conclude()

    def _on_answered(self, peer: Member, message: m.Answered, now: float) -> None:
        sync = self._current(message.attempt)
        if self.phase == "connect":
            self._roster.answered.add(message.engine)
            self._conclude()
        elif sync is not None:
            sync.answered[message.engine] = message.call

    def _conclude(self) -> None:
        if self._connecting.is_complete():
            self.phase, self.deadline = "idle", None
            for actor in self._roster.actors():
                self._send(actor.identity, m.Connected())

    # A sync.

    def _on_start(self, peer: Member, message: m.Start, now: float) -> None:
        if self._sync is not None and message.attempt < self._sync.attempt:
            # It comes late to a sync that failed without it. It has been told so, and comes to this one next.
            return
        if self._sync is None or message.attempt > self._sync.attempt:
            if self.phase not in ("idle", "failed"):
                self._fail(f"{peer} started attempt {message.attempt} while one is going on", peer)
                return
            self._open(message, now)
        sync = self._sync
        assert sync is not None
        sync.started.add(peer.identity)
        if self._failure is not None:
            self._send(peer.identity, self._failure)
        elif (message.attempt, message.version) != (sync.attempt, sync.version):
            self._fail(f"{peer} started version {message.version}, another actor rank version {sync.version}", peer)
        else:
            self._transferring.tell_writable(sync, () if sync.regroups else (peer.identity,))
            self._begin_transfer(sync, now)

    def _begin_transfer(self, sync: Progress, now: float) -> None:
        """The phase of waiting for everybody ends when all actor ranks and all workers are there.

        No worker hears of a bucket before, nor touches its model: workers join from engines that are paused, and so all of them are.
        """
        if (len(sync.started), len(sync.joined)) == (self._expected.num_actors, len(self._roster.workers())):
            self._enter("transfer", now)

    def _open(self, message: m.Start, now: float) -> None:
        lost = [str(p) for p in self._members.values() if p.lost]
        connecting, failed = self._connecting, self._failure is not None
        group = 0 if self._sync is None else self._sync.group + failed
        self._sync = Progress(message.attempt, message.version, connecting.num_buckets, connecting.num_slots, group, regroups=failed)
        self._failure, self.phase, self.deadline = None, "begin", now + self._expected.timeout_s
        if lost:
            self._fail(f"the process of {some(lost)} has ended; start it again and connect() anew", None)
        elif message.version <= self.version:
            self._fail(f"version {message.version} is not newer than {self.version}, which the engines serve; versions only grow", None)
        early, self._early = self._early, []
        for peer, said in early:
            _HANDLERS[type(said), True](self, peer, said, now)

    def _on_lent(self, peer: Member, message: m.Lent, now: float) -> None:
        # Also one of a sync that is over: the memory is where it is.
        self._connecting.ledger.renew(peer.place, message.loan)

    def _on_filled(self, peer: Member, message: m.Filled, now: float) -> None:
        sync = self._current(message.attempt)
        # Before all are there, buckets are filled and no worker hears of them.
        if sync is not None and self._transferring.fill(sync, peer, message, self._expected.num_actors) and self.phase == "transfer":
            self._transferring.tell_ready(sync)

    def _on_joined(self, peer: Member, message: m.Joined, now: float) -> None:
        sync = self._sync
        if sync is None or message.attempt != sync.attempt:
            cause = f"{peer} joined attempt {message.attempt}, which the actor has not started or has left"
            self._send(
                peer.identity, m.Error(attempt=message.attempt, phase="begin", cause=cause, engine=peer.engine, version=message.version)
            )
        elif self._failure is not None:
            self._send(peer.identity, self._failure)
        elif message.version != sync.version:
            self._fail(f"{peer} joined version {message.version}, the actor started version {sync.version}", peer)
        else:
            sync.joined[peer.identity] = 0
            self._begin_transfer(sync, now)

    def _on_done(self, peer: Member, message: m.Done, now: float) -> None:
        sync = self._current(message.attempt)
        if sync is not None:
            self._transferring.take(sync, peer, message)

    def _on_loaded(self, peer: Member, message: m.Loaded, now: float) -> None:
        sync = self._current(message.attempt)
        if sync is not None and self._transferring.hold(sync, peer, message):
            self._enter("commit", now)
            for worker in self._roster.workers():
                self._send(worker.identity, m.Commit(sync.attempt, sync.version))

    def _on_committed(self, peer: Member, message: m.Committed, now: float) -> None:
        sync = self._current(message.attempt)
        if sync is None or self.phase != "commit":
            return
        sync.committed.add(peer.identity)
        if len(sync.committed) == len(self._roster.workers()):
            self._enter("resume", now)
            loaded = [sync.loaded[p.identity] for p in self._roster.workers()]
            done = m.AllCommitted(sync.attempt, tuple(x.times for x in loaded), tuple(x.differences for x in loaded))
            for identity in sync.started:
                self._send(identity, done)

    def _on_finish(self, peer: Member, message: m.Finish, now: float) -> None:
        sync = self._current(message.attempt)
        if sync is None or self.phase != "resume":
            return
        self.phase, self.deadline, self.version = "idle", None, sync.version
        for actor in self._roster.actors():
            self._send(actor.identity, m.Finished(sync.attempt, message.report))

    def _on_failed(self, peer: Member, message: m.Failed, now: float) -> None:
        if self.phase == "connect" or self._current(message.attempt) is not None:
            self._spread(failure.told(peer, message, self.phase, self._sync))

    def _on_goodbye(self, peer: Member, message: m.Goodbye, now: float) -> None:
        if self.phase in ("idle", "failed"):
            peer.lost = True
        else:
            self._fail(f"{peer} closed its connection", peer)

    # Common.

    def _next_attempt(self) -> int:
        return 1 if self._sync is None else self._sync.attempt + 1

    def _current(self, attempt: int) -> Progress | None:
        """The sync that a message belongs to, or None when it is a late one of an attempt that is over."""
        sync = self._sync
        return sync if sync is not None and sync.attempt == attempt and self.phase not in ("idle", "failed") else None

    def _enter(self, phase: str, now: float) -> None:
        """Start a phase's deadline, and with a message the ones that the peers keep themselves."""
        sync = self._sync
        assert sync is not None
        self.phase, self.deadline = phase, now + self._expected.timeout_s
        self._transferring.tell_writable(sync, sync.started)
        if phase == "transfer":
            self._transferring.tell_ready(sync)

    def _fail(self, cause: str, peer: Member | None) -> None:
        self._spread(failure.found(cause, peer, self.phase, self._sync))

    def _spread(self, error: m.Error) -> None:
        """Make the first failure everybody's; later ones are its echoes."""
        if self._failure is not None:
            return
        self._failure = error
        self.phase, self.deadline = "failed", None
        for identity in self._members:
            self._send(identity, error)


_HANDLERS: dict[tuple[type, bool], Callable[..., None]] = {
    (m.Recorded, True): Coordinator._on_recorded,
    (m.Planned, False): Coordinator._on_planned,
    (m.Attached, True): Coordinator._on_attached,
    (m.Attached, False): Coordinator._on_attached,
    (m.Answered, False): Coordinator._on_answered,
    (m.Start, False): Coordinator._on_start,
    (m.Lent, False): Coordinator._on_lent,
    (m.Filled, False): Coordinator._on_filled,
    (m.Joined, True): Coordinator._on_joined,
    (m.Done, True): Coordinator._on_done,
    (m.Loaded, True): Coordinator._on_loaded,
    (m.Committed, True): Coordinator._on_committed,
    (m.Finish, False): Coordinator._on_finish,
    (m.Failed, True): Coordinator._on_failed,
    (m.Failed, False): Coordinator._on_failed,
    (m.Goodbye, True): Coordinator._on_goodbye,
    (m.Goodbye, False): Coordinator._on_goodbye,
}
