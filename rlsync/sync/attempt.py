"""One call of ``WeightSyncer.sync``. Owns the order of what this actor rank does in it; the coordinator owns the phases."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

import msgspec

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import GRACE_S, Peer
from rlsync.engine.handles import EngineHandle, SyncOrder
from rlsync.errors import EngineCallError, WeightSyncError, error_text
from rlsync.plan.verification import turn_of
from rlsync.sync.config import SyncConfig
from rlsync.sync.endpoints import Endpoints, join
from rlsync.sync.packer import Packed, Packer
from rlsync.sync.planning import ConnectionPlan
from rlsync.sync.report import SyncHealth, SyncReport
from rlsync.sync.source import Source
from rlsync.transport.rendezvous import GroupError
from rlsync.transport.tasks import Lane, Outcome, Tasks, Threads

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Connection:
    """State that ``connect`` makes and every sync uses. Only rank 0 has a plan, the sinks of its workers, and engines."""

    peer: Peer
    num_buckets: int
    lane: Lane
    threads: Threads
    source: Source
    packer: Packer
    endpoints: Endpoints
    engines: tuple[EngineHandle, ...]
    config: SyncConfig
    health: SyncHealth
    plan: ConnectionPlan | None = None
    sinks: tuple[str, ...] = ()
    link_gb_per_s: float | None = None


def receive(
    peer: Peer, tasks: Tasks, timeout_s: float, *, since_s: float, attempt: int, phase: str, version: int | None = None
) -> m.FromCoordinator | None:
    """Next message, or None when a task has ended first. Raises WeightSyncError, also when the coordinator is silent too long.

    Each phase begins with a message to those who wait in it, so that silence is counted from the last one, and from ``since_s`` at the
    earliest: tasks that end meanwhile, as the calls of engines whose workers give up, say nothing of the coordinator.
    """
    limit_s = timeout_s + GRACE_S
    try:
        return peer.receive(attempt, max(peer.heard_s, since_s) + limit_s, tasks.fd)
    except TimeoutError:
        cause = f"nothing was heard from the coordinator on actor rank 0 within {limit_s:g} s"
        raise WeightSyncError(phase=phase, version=version, cause=cause) from None


class Attempt:
    """One call of ``WeightSyncer.sync``: an event loop over the channel, what this rank packs, and the engines' calls."""

    def __init__(
        self, connection: Connection, tasks: Tasks, attempt: int, version: int, name: str, *, without_frozen: bool = False
    ) -> None:
        """``name`` is that of the sync to the engines. ``without_frozen``: of rank 0, whose word counts for all ranks."""
        self._link, self._tasks, self._attempt, self._version, self._name = connection, tasks, attempt, version, name
        self._source, self._engines, self._peer = connection.source, connection.engines, connection.peer
        self._timeout_s = connection.config.timeout_s
        self._packed, self._writable, self._group = 0, 0, 0
        self._without_frozen, self._verifies_all = without_frozen, False
        # One call of this rank's own at a time: begin, join, then bucket after bucket.
        self._is_busy, self._has_joined = True, False
        # Engines whose part is not over.
        self._syncing = {engine.engine_id for engine in connection.engines}
        self._all_joined, self._is_finished = False, False
        self._marks: dict[str, float] = {}
        self._seconds = {"begin": 0.0, "fill": 0.0, "resume": 0.0}
        self._engine_s: dict[str, float] = {}
        self._committed: m.AllCommitted | None = None

    def run(self) -> SyncReport:
        """Returns the report, or raises WeightSyncError."""
        self._marks["start"] = time.monotonic()
        is_idle = self._link.lane.wait_idle(min(GRACE_S, self._timeout_s / 2))
        if is_idle:
            # Engines first: they are the farthest. This rank's own work then does not delay them.
            self._call_engines()
        self._peer.send(m.Start(self._attempt, self._version, self._without_frozen))
        if not is_idle:
            # The call may still write to slots, so no sync through them can be right.
            cause = "still inside the source since a failed sync; close() and connect() anew"
            self._peer.send(m.Failed(self._attempt, "begin", cause))
        else:
            self._link.lane.submit(self._tasks, ("begin", None), self._begin)
        while True:
            message = receive(
                self._peer,
                self._tasks,
                self._timeout_s,
                since_s=self._marks["start"],
                attempt=self._attempt,
                phase="transfer",
                version=self._version,
            )
            if message is None:
                for outcome in self._tasks.finished():
                    self._take(outcome)
            elif isinstance(message, m.Writable):
                self._writable, self._group, self._without_frozen = message.buckets_writable, message.group, message.without_frozen
                self._verifies_all = message.verifies_all
                self._all_joined = message.all_joined
                _log.debug("version %d: %d buckets may be filled", self._version, self._writable)
            elif isinstance(message, m.AllCommitted):
                self._committed, self._marks["committed"] = message, time.monotonic()
            elif isinstance(message, m.Finished):
                return msgspec.msgpack.decode(message.report, type=SyncReport)
            self._pack_next()
            self._advance()

    def _begin(self) -> None:
        """Make the weights fresh."""
        self._source.begin(self._version)
        self._link.packer.check()

    def _take(self, outcome: Outcome) -> None:
        kind, which = outcome.key
        _log.debug("version %d: %s %s took %.6f s", self._version, kind, "" if which is None else which, outcome.seconds)
        if outcome.error is not None:
            phase = self._phase_of(outcome.error) if kind == "sync" else "transfer" if kind in ("fill", "sum") else "begin"
            engine, bucket = (which, None) if kind == "sync" else (blamed(outcome.error), which)
            self._peer.send(m.Failed(self._attempt, phase, error_text(outcome.error), engine=engine, bucket=bucket))
        elif kind in ("begin", "join", "fill", "sum"):
            self._seconds["fill" if kind in ("fill", "sum") else "begin"] += outcome.seconds
            self._is_busy = False
            if kind == "join":
                self._has_joined = True
                if outcome.result:
                    self._peer.send(m.Exported(self._attempt, outcome.result))
            if kind == "fill":
                self._packed = which + 1
                self._peer.send(m.Filled(self._attempt, which, outcome.result.nbytes, outcome.result.sums))
                if outcome.result.sums is None:
                    self._is_busy = True
                    packer = self._link.packer
                    sum_up = packer.sum_up_frozen if which < self._num_held else partial(packer.sum_up, which, self._turn)
                    self._link.lane.submit(self._tasks, ("sum", which), sum_up)
            if kind == "sum":
                self._peer.send(m.Summed(self._attempt, which, outcome.result))
        else:
            self._syncing.discard(which)
            if self._syncing or self._committed is None:
                # Otherwise the end of the sync says it.
                self._peer.send(m.Answered(self._attempt, which, "sync"))
            self._marks["answered"], self._engine_s[which] = time.monotonic(), outcome.seconds
            self._seconds["resume"] = max(self._seconds["resume"], outcome.result)

    def _phase_of(self, error: BaseException) -> str:
        """The phase in which an engine's part has failed; one that says nothing of it was at what its workers waited for."""
        call = error.call if isinstance(error, EngineCallError) else "update" if self._all_joined else "pause"
        # After the commit an update only resets caches.
        return ("transfer" if self._committed is None else "commit") if call == "update" else call

    def _pack_next(self) -> None:
        """Pack the next bucket as soon as its slot is free, and this rank takes part in the group that the coordinator has named."""
        bucket, group = self._packed, self._group
        if self._is_busy or bucket >= min(self._writable, self._link.num_buckets):
            return
        self._is_busy = True
        if self._has_joined and bucket < self._num_held:
            self._link.lane.submit(self._tasks, ("fill", self._num_held - 1), lambda: Packed(0, None))
        elif self._has_joined:
            self._link.lane.submit(self._tasks, ("fill", bucket), partial(self._link.packer.pack, bucket, self._turn))
        else:
            self._link.lane.submit(self._tasks, ("join", None), lambda: join(self._link.endpoints.senders, group))

    @property
    def _num_held(self) -> int:
        """Buckets, the first ones, that are not sent in this sync; they are filled, and summed up, as one."""
        return self._link.packer.num_frozen if self._without_frozen else 0

    @property
    def _turn(self) -> int:
        return turn_of(self._attempt, verifies_all=self._verifies_all)

    def _call_engines(self) -> None:
        """Rank 0: begin the sync of each engine. Nothing is written before the workers of all engines are inside their updates, and no
        engine is resumed before the workers of all have committed."""
        mode, timeout_s = self._link.config.pause_mode, self._timeout_s
        info = {"version": self._version, "attempt": self._attempt}
        if self._source.declared.adapter is not None and self._without_frozen:
            # The base stays what it is, and each version of adapters has keys of its own in every cache.
            info["keeps_caches"] = True
        # The workers and the coordinator keep the deadlines of the phases inside an update.
        order = SyncOrder(mode, self._name, info, self._version, timeout_s, 3 * (timeout_s + GRACE_S))
        for engine in self._engines:
            self._link.threads.submit(self._tasks, ("sync", engine.engine_id), partial(engine.sync, order))

    def _advance(self) -> None:
        """Rank 0: finish, when every worker has committed and every engine serves."""
        if self._committed is not None and self._engines and not self._syncing and not self._is_finished:
            self._is_finished = True
            self._peer.send(m.Finish(self._attempt, msgspec.msgpack.encode(self._report())))

    def _report(self) -> SyncReport:
        assert self._committed is not None and self._link.plan is not None
        self._link.health.committed(engine.engine_id for engine in self._engines)
        at, times, plan = self._marks, self._committed.times, self._link.plan
        moved = plan.trained_traffic if self._without_frozen else plan.traffic
        held_bytes = plan.frozen_bytes if self._without_frozen else 0
        return SyncReport(
            version=self._version,
            transport=plan.transport,
            sinks=tuple(sorted(set(self._link.sinks))),
            verify=self._link.config.verify,
            bytes=plan.nbytes - held_bytes,
            held_bytes=held_bytes,
            staged_bytes=plan.trained_staged_bytes if self._without_frozen else plan.staged_bytes,
            bytes_by_link=dict(moved.bytes_by_link),
            redundancy=dict(plan.traffic.redundancy),
            num_buckets=self._link.num_buckets,
            seconds=time.monotonic() - at["start"],
            pause_s=self._committed.begin_s,
            begin_s=self._seconds["begin"],
            fill_s=self._seconds["fill"],
            transfer_s=at["committed"] - at["start"] - self._committed.begin_s,
            wait_s=max(t.wait_s for t in times),
            pull_s=max(t.pull_s for t in times),
            verify_s=max(t.verify_s for t in times),
            finalize_s=max(t.finalize_s for t in times),
            extra_bytes=max(t.extra_bytes for t in times),
            commit_s=max(0.0, at["answered"] - at["committed"] - self._seconds["resume"]),
            resume_s=self._seconds["resume"],
            engine_s=self._engine_s,
            link_gb_per_s=self._link.link_gb_per_s,
            engines_dirty=len(self._link.health.dirty),
            failures=dict(self._link.health.failures),
            differences=self._committed.differences,
        )


def blamed(error: BaseException) -> str | None:
    """The engine that caused an error on an actor rank, where that is known."""
    return error.engine if isinstance(error, GroupError) else None
