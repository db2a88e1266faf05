"""The coordinator of a connection: a state machine that turns messages into messages.

Owns the phases, their deadlines, and the rule that one failure becomes the same error at every peer. It reads no clock,
opens no socket and starts no thread (``server`` does), so that a test can feed it every fault.

    connect -> idle -> begin -> transfer -> commit -> resume -> idle ...      any but idle -> failed -> begin ...
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from rlsync.coordinator import messages as m
from rlsync.coordinator.progress import Progress
from rlsync.coordinator.roster import Expected, ExportRegistry, Member, Roster
from rlsync.errors import first_few


class Sender(Protocol):
    """Hands a message to one peer; must not block."""

    def __call__(self, identity: bytes, message: m.FromCoordinator) -> None: ...


class Coordinator:
    """Drives the phases. Feed it ``receive``, ``lose`` and ``expire``; it answers through ``send``.

    Attributes:
        phase: ``connect, idle, begin, transfer, commit, resume`` or ``failed``.
        deadline_s: clock value at which ``expire`` fails the phase, or None when nobody is waited for. All clock values are seconds of one
            monotonic clock.
        version: the version that every engine serves, or -1 before the first sync.
    """

    def __init__(self, expected: Expected, send: Sender, now_s: float) -> None:
        self._expected, self._send = expected, send
        self._roster = Roster(expected)
        self._members = self._roster.members
        self._sync: Progress | None = None
        self._early: list[tuple[Member, m.FromPeer]] = []
        # Who came when the connection had failed, and was told why.
        self._too_late: set[tuple[str | None, int]] = set()
        self._has_expired = False
        self._failure: m.Error | None = None
        self._connecting = Connecting(expected, self._roster, send, self._fail)
        self._transferring = Transferring(self._roster, self._connecting, send, self._fail)
        self.phase, self.version = "connect", -1
        self.deadline_s: float | None = now_s + expected.timeout_s

    # Input: a message, a death, the clock.

    def receive(self, identity: bytes, raw: bytes, now_s: float) -> None:
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
                self._fail(f"{peer} sent {type(message).__name__}, which is not allowed from this peer", peer)
            elif peer.engine is not None and self.phase in ("idle", "failed") and getattr(message, "attempt", 0) == self._next_attempt():
                # The engine was called after rank 0 had sent Start, but messages of two peers come in any order.
                self._early.append((peer, message))
            else:
                handler(self, peer, message, now_s)

    def lose(self, identity: bytes) -> None:
        """The process of a peer has ended."""
        peer = self._members.get(identity)
        if peer is None or peer.lost:
            return
        peer.lost = True
        if self.phase not in ("idle", "failed"):
            self._fail(f"the process of {peer} has ended", peer)

    def expire(self, now_s: float) -> None:
        """Fail the phase when its deadline has passed."""
        if self.deadline_s is not None and now_s >= self.deadline_s:
            self._has_expired = True
            self._spread(_deadline_error(self._roster, self._expected.timeout_s, self.phase, self._sync))

    def fail(self, cause: str) -> None:
        """Fail what is going on for a reason of the coordinator's own process."""
        if self.phase != "idle":
            self._fail(cause, None)

    def is_awaited(self) -> bool:
        """Whether the connection has failed before everybody was there to hear of it.

        Not after its deadline, and nobody awaits workers of the engine on which it failed: they may never come.
        """
        failure = self._failure
        if failure is None or failure.attempt != 0 or self._has_expired:
            return False
        absent = self._roster.not_here() - self._too_late
        return any(engine is None or engine != failure.engine for engine, _ in absent)

    def process_of(self, identity: bytes) -> tuple[int, str] | None:
        """Pid of an admitted peer and the domain in which that pid means something; None for a stranger."""
        peer = self._members.get(identity)
        return None if peer is None else (peer.hello.pid, peer.hello.pid_domain)

    # Connect.

    def _admit(self, identity: bytes, hello: m.ActorHello | m.WorkerHello) -> None:
        peer, closed = Member(identity, hello), None
        if self._failure is not None and self._failure.attempt == 0:
            closed = self._failure
        elif self.phase != "connect":
            closed = _turned_away(f"{peer} came after the connection was complete")
        refusal = self._connecting.refusal(peer, closed)
        if refusal is None:
            self._connecting.admit(peer)
            return
        if refusal is self._failure:
            self._too_late.add((peer.engine, peer.place))
        self._send(identity, refusal)

    def _on_recorded(self, peer: Member, message: m.Recorded, now_s: float) -> None:
        if self.phase == "connect":
            self._connecting.record(peer, message)

    def _on_planned(self, peer: Member, message: m.Planned, now_s: float) -> None:
        if self.phase != "connect" or peer.place != 0:
            problem: str | None = f"in phase {self.phase}, when none are due from it"
        else:
            problem = self._connecting.hand_out(message)
        if problem is not None:
            self._fail(f"{peer} sent assignments for {len(message.actors)} actor ranks and {len(message.workers)} workers {problem}", peer)

    def _on_attached(self, peer: Member, message: m.Attached, now_s: float) -> None:
        if self.phase == "connect" and not peer.attached:
            self._connecting.attach(peer, message)
            self._conclude()

    def _on_answered(self, peer: Member, message: m.Answered, now_s: float) -> None:
        sync = self._current(message.attempt)
        if self.phase == "connect":
            self._roster.answered.add(message.engine)
            self._conclude()
        elif sync is not None:
            sync.answered.add(message.engine)

    def _conclude(self) -> None:
        if self._connecting.is_complete():
            self.phase, self.deadline_s = "idle", None
            for actor in self._roster.actors():
                self._send(actor.identity, m.Connected())

    # A sync.

    def _on_start(self, peer: Member, message: m.Start, now_s: float) -> None:
        if self._sync is not None and message.attempt < self._sync.attempt:
            # Late for a sync that failed without this rank. It was sent that error, and starts the current attempt next.
            return
        if self._sync is None or message.attempt > self._sync.attempt:
            if self.phase not in ("idle", "failed"):
                self._fail(f"{peer} started attempt {message.attempt} while one is going on", peer)
                return
            self._open(message, now_s)
        sync = self._sync
        assert sync is not None
        sync.started.add(peer.identity)
        if self._failure is not None:
            self._send(peer.identity, self._failure)
        elif (message.attempt, message.version) != (sync.attempt, sync.version):
            self._fail(f"{peer} started version {message.version}, another actor rank version {sync.version}", peer)
        else:
            if peer.place == 0:
                sync.without_frozen = message.without_frozen
            # What to fill is known from rank 0 on: who came before it has waited.
            known = sync.without_frozen is not None and not sync.regroups
            self._transferring.tell_writable(sync, () if not known else sync.started if peer.place == 0 else (peer.identity,))
            self._begin_transfer(sync, now_s)

    def _begin_transfer(self, sync: Progress, now_s: float) -> None:
        """The phase of waiting for everybody ends when all actor ranks and all workers are there.

        No worker hears of a bucket before, nor touches its model: workers join from engines that are paused, and so all of them are.
        """
        if (len(sync.started), len(sync.joined)) == (self._expected.num_actors, len(self._roster.workers())):
            self._enter("transfer", now_s)

    def _open(self, message: m.Start, now_s: float) -> None:
        lost = [str(p) for p in self._members.values() if p.lost]
        left = [str(p) for p in self._members.values() if p.left]
        connecting, failed = self._connecting, self._failure is not None
        group = 0 if self._sync is None else self._sync.group + failed
        self._sync = Progress(
            message.attempt, message.version, connecting.num_buckets, connecting.num_slots, connecting.num_frozen, group, regroups=failed,
            verifies_all=failed, began_s=now_s,
        )  # fmt: skip
        self._failure, self.phase, self.deadline_s = None, "begin", now_s + self._expected.timeout_s
        if lost:
            self._fail(f"the process of {first_few(lost)} has ended; start it again and connect() anew", None)
        elif left:
            self._fail(f"{first_few(left)} closed its connection, as when an engine is connected to another actor; connect() anew", None)
        elif message.version <= self.version:
            self._fail(f"version {message.version} is not newer than {self.version}, which the engines serve; versions only grow", None)
        early, self._early = self._early, []
        for peer, said in early:
            _HANDLERS[type(said), True](self, peer, said, now_s)

    def _on_exported(self, peer: Member, message: m.Exported, now_s: float) -> None:
        # Exports of a sync that is over count too: the memory has moved.
        self._connecting.exports.renew(peer.place, message.exports)

    def _on_filled(self, peer: Member, message: m.Filled, now_s: float) -> None:
        sync = self._current(message.attempt)
        # Before all have joined, buckets are filled, and no worker is told.
        if sync is not None and self._transferring.fill(sync, peer, message, self._expected.num_actors) and self.phase == "transfer":
            self._transferring.tell_ready(sync)

    def _on_summed(self, peer: Member, message: m.Summed, now_s: float) -> None:
        sync = self._current(message.attempt)
        if sync is not None and self._transferring.sum_up(sync, peer, message, self._expected.num_actors) and self.phase == "transfer":
            self._transferring.tell_ready(sync)

    def _on_joined(self, peer: Member, message: m.Joined, now_s: float) -> None:
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
            self._begin_transfer(sync, now_s)

    def _on_done(self, peer: Member, message: m.Done, now_s: float) -> None:
        sync = self._current(message.attempt)
        if sync is not None:
            self._transferring.take(sync, peer, message)

    def _on_loaded(self, peer: Member, message: m.Loaded, now_s: float) -> None:
        sync = self._current(message.attempt)
        if sync is not None and self._transferring.hold(sync, peer, message):
            for worker in self._roster.workers():
                self._send(worker.identity, m.Commit(sync.attempt, sync.version))
            self._enter("commit", now_s)

    def _on_committed(self, peer: Member, message: m.Committed, now_s: float) -> None:
        sync = self._current(message.attempt)
        if sync is None or self.phase != "commit":
            return
        sync.committed.add(peer.identity)
        if len(sync.committed) == len(self._roster.workers()):
            self.phase, self.deadline_s = "resume", now_s + self._expected.timeout_s
            for worker in self._roster.workers():
                self._send(worker.identity, m.Serve(sync.attempt))
            loaded = [sync.loaded[p.identity] for p in self._roster.workers()]
            done = m.AllCommitted(sync.attempt, tuple(x.times for x in loaded), tuple(x.differences for x in loaded), sync.begin_s)
            for identity in sync.started:
                self._send(identity, done)

    def _on_finish(self, peer: Member, message: m.Finish, now_s: float) -> None:
        sync = self._current(message.attempt)
        if sync is None or self.phase != "resume":
            return
        self.phase, self.deadline_s, self.version = "idle", None, sync.version
        for actor in self._roster.actors():
            self._send(actor.identity, m.Finished(sync.attempt, message.report))

    def _on_failed(self, peer: Member, message: m.Failed, now_s: float) -> None:
        if self.phase == "connect" or self._current(message.attempt) is not None:
            self._spread(_reported_error(peer, message, self.phase, self._sync))

    def _on_goodbye(self, peer: Member, message: m.Goodbye, now_s: float) -> None:
        if self.phase in ("idle", "failed"):
            peer.left = True
        else:
            self._fail(f"{peer} closed its connection", peer)

    # Common.

    def _next_attempt(self) -> int:
        return 1 if self._sync is None else self._sync.attempt + 1

    def _current(self, attempt: int) -> Progress | None:
        """The sync that a message belongs to, or None when it is a late one of an attempt that is over."""
        sync = self._sync
        return sync if sync is not None and sync.attempt == attempt and self.phase not in ("idle", "failed") else None

    def _enter(self, phase: str, now_s: float) -> None:
        """Start a phase's deadline, and with a message the ones that the peers keep themselves. Workers hear first: they are waited for."""
        sync = self._sync
        assert sync is not None
        self.phase, self.deadline_s = phase, now_s + self._expected.timeout_s
        if phase == "transfer":
            sync.all_joined, sync.begin_s = True, now_s - sync.began_s
            self._transferring.tell_ready(sync)
        self._transferring.tell_writable(sync, sync.started)

    def _fail(self, cause: str, peer: Member | None) -> None:
        self._spread(_detected_error(cause, peer, self.phase, self._sync))

    def _spread(self, error: m.Error) -> None:
        """Send the first failure to all peers; later ones are its echoes."""
        if self._failure is not None:
            return
        self._failure = error
        self.phase, self.deadline_s = "failed", None
        for identity in self._members:
            self._send(identity, error)


_HANDLERS: dict[tuple[type, bool], Callable[..., None]] = {
    (m.Recorded, True): Coordinator._on_recorded,
    (m.Planned, False): Coordinator._on_planned,
    (m.Attached, True): Coordinator._on_attached,
    (m.Attached, False): Coordinator._on_attached,
    (m.Answered, False): Coordinator._on_answered,
    (m.Start, False): Coordinator._on_start,
    (m.Exported, False): Coordinator._on_exported,
    (m.Filled, False): Coordinator._on_filled,
    (m.Summed, False): Coordinator._on_summed,
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


class Connecting:
    """The steps of the phase ``connect``, in the order of the methods.

    Args:
        send: hands a message to one peer.
        fail: reports a cause to all peers; the peer is the one that it came from.

    Attributes:
        num_buckets, num_slots, num_frozen: of the plan, as soon as it is there.
        destinations: worker -> its destination in the plan.
        exports: who reads whose exported memory.
    """

    def __init__(
        self,
        expected: Expected,
        roster: Roster,
        send: Callable[[bytes, m.FromCoordinator], None],
        fail: Callable[[str, Member | None], None],
    ) -> None:
        self._expected, self._roster, self._send, self._fail = expected, roster, send, fail
        self.num_buckets = self.num_slots = self.num_frozen = 0
        self.destinations: dict[bytes, int] = {}
        self.exports = ExportRegistry()
        # Numbers of actor ranks and workers that have their assignments.
        self._num_assigned = (0, 0)

    def refusal(self, peer: Member, closed: m.Error | None) -> m.Error | None:
        """Why a peer is not let in, or None. ``closed``: why nobody is any more, where that is so."""
        expected, hello = self._expected, peer.hello
        if not hmac.compare_digest(hello.token.encode(), expected.token.encode()):
            return _turned_away(f"{peer} came with a wrong token; it belongs to another run or an earlier connection")
        if hello.run_id != expected.run_id:
            return _turned_away(f"{peer} belongs to run {hello.run_id}, this is run {expected.run_id}")
        if closed is not None:
            return closed
        twin = self._roster.twin(peer)
        return None if twin is None else _turned_away(f"{peer} is here already as pid {twin.hello.pid} on {twin.hello.host}")

    def admit(self, peer: Member) -> None:
        """Let a peer in."""
        self._roster.admit(peer)
        problem = self._roster.mismatch(peer)
        if problem is not None:
            self._fail(problem, peer)
            return
        if peer.engine is not None:
            self._send(peer.identity, self._expected.manifest)
        self._report()

    def record(self, peer: Member, message: m.Recorded) -> None:
        """A worker has said what it holds."""
        peer.recorded = message
        self._report()

    def _report(self) -> None:
        """When all peers have reported: compare tensor names, and let actor rank 0 plan."""
        if not self._roster.is_recorded():
            return
        findings = [f for engine in self._expected.engines for f in self._roster.name_findings(engine)]
        if findings:
            self._fail(f"what the actor has and what the engines take do not fit: {first_few(findings, separator='; ')}", None)
        else:
            for part in self._roster.reports().parts():
                self._send(self._roster.actors()[0].identity, part)

    def hand_out(self, message: m.Planned) -> str | None:
        """Give the next ones the assignments that actor rank 0 has made. Returns what is wrong where they are too many or too early."""
        num_actors, num_workers = self._num_assigned
        actors = self._roster.actors()[num_actors : num_actors + len(message.actors)]
        workers = self._roster.workers()[num_workers : num_workers + len(message.workers)]
        if not self._roster.is_recorded():
            return "before everybody is here"
        if (len(actors), len(workers)) != (len(message.actors), len(message.workers)):
            return f"while {len(self._roster.actors()) - num_actors} and {len(self._roster.workers()) - num_workers} have none"
        self._num_assigned = num_actors + len(actors), num_workers + len(workers)
        for member, actor in zip(actors, message.actors, strict=True):
            self.num_buckets, self.num_slots, self.num_frozen = actor.num_buckets, actor.num_slots, actor.num_frozen
            self._send(member.identity, m.Assignment(actor=actor))
        for member, worker in zip(workers, message.workers, strict=True):
            self.destinations[member.identity] = worker.destination
            self.exports.add_reader(member.identity, worker.transport, worker.imports)
            self._send(member.identity, m.Assignment(worker=worker))
        return None

    def attach(self, peer: Member, message: m.Attached) -> None:
        """A peer has taken its assignment; when all have, workers learn what is exported to them."""
        peer.attached = True
        if message.exports:
            self.exports.add(peer.place, message.exports)
        if self._roster.is_attached():
            for worker in self._roster.workers():
                self._send(worker.identity, m.Connected(self.exports.first(worker.identity)))

    def is_complete(self) -> bool:
        """Whether the connection is complete. An engine whose core is stuck has attached workers, and still cannot be synced."""
        return self._roster.is_attached() and self._roster.answered >= set(self._expected.engines)


class Transferring:
    """The steps of the phase ``transfer``.

    Args:
        connecting: knows the workers' destinations and the exports that they read.
        send: hands a message to one peer.
        fail: reports a cause to all peers; the peer is the one that it came from.
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
            without = bool(sync.without_frozen)
            self._send(identity, m.Writable(sync.attempt, sync.buckets_writable, sync.group, without, sync.verifies_all, sync.all_joined))

    def tell_ready(self, sync: Progress) -> None:
        """Tell all joined workers which buckets are readable, with the checksums and exports that each was not sent before."""
        for identity in sync.joined:
            sums = sync.unsent_sums(identity, self._connecting.destinations[identity])
            exports = self._connecting.exports.renewed(identity, sync.attempt) if sync.buckets_ready else ()
            without = bool(sync.without_frozen)
            self._send(
                identity,
                m.Ready(sync.attempt, sync.buckets_ready, sums, sync.group, exports, without, sync.verifies_all, sync.buckets_summed),
            )

    def fill(self, sync: Progress, peer: Member, message: m.Filled, num_actors: int) -> bool:
        """An actor rank has filled a bucket. Returns whether more buckets are ready or summed up now."""
        return self._counted(peer, sync.fill(peer.identity, message.bucket, message.sums, num_actors))

    def sum_up(self, sync: Progress, peer: Member, message: m.Summed, num_actors: int) -> bool:
        """An actor rank has summed up a bucket that it had filled. Returns whether more buckets are summed up now."""
        return self._counted(peer, sync.sum_up(peer.identity, message.bucket, message.sums, num_actors))

    def _counted(self, peer: Member, outcome: str | bool) -> bool:
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


def _turned_away(cause: str) -> m.Error:
    """What one peer is told that is not let in."""
    return m.Error(attempt=0, phase="connect", cause=cause)


def _detected_error(cause: str, peer: Member | None, phase: str, sync: Progress | None) -> m.Error:
    """An error that the coordinator has detected; ``peer`` is the one that caused it, if one did."""
    return _error(cause, phase, sync, None if peer is None else peer.engine, _bucket(peer, phase, sync))


def _reported_error(peer: Member, message: m.Failed, phase: str, sync: Progress | None) -> m.Error:
    """An error that a peer reports. It knows better than the coordinator where in the sync it was, and which engine caused it."""
    cause, engine = f"{peer}: {message.cause}", peer.engine if message.engine is None else message.engine
    if phase == "connect":
        return _error(cause, phase, sync, engine, None)
    return _error(cause, message.phase, sync, engine, _bucket(peer, phase, sync) if message.bucket is None else message.bucket)


def _deadline_error(roster: Roster, timeout_s: float, phase: str, sync: Progress | None) -> m.Error:
    """The error of a phase that took too long. It names the stragglers, as many as fill a host or two; the first counts as the culprit."""
    if phase == "connect":
        absent = roster.absent()
        stragglers, culprit, engine = [words for _, words in absent], None, absent[0][0] if absent else None
    else:
        assert sync is not None
        slow = sync.stragglers(phase, roster.actors(), roster.workers())
        stragglers, culprit = [f"{p}, which was {what}" for p, what in slow], slow[0][0] if slow else None
        engine = culprit.engine if culprit else None
    cause = f"nothing within {timeout_s:g} s from {first_few(stragglers, 16, separator='; ')}"
    return _error(cause, phase, sync, engine, _bucket(culprit, phase, sync))


def _bucket(peer: Member | None, phase: str, sync: Progress | None) -> int | None:
    """The bucket that a peer is at, while buckets move."""
    return sync.bucket_of(peer) if phase == "transfer" and sync is not None and peer is not None else None


def _error(cause: str, phase: str, sync: Progress | None, engine: str | None, bucket: int | None) -> m.Error:
    attempt, version = (0, None) if sync is None else (sync.attempt, sync.version)
    return m.Error(attempt=attempt, phase=phase, cause=m.shortened(cause), engine=engine, version=version, bucket=bucket)
