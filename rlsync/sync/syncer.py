"""WeightSyncer: the actor's side of a connection. Owns the ring, the channel and the order of a sync.

Knows the seams only: a BucketSource fills slots, EngineHandles drive engines, the coordinator says how a sync stands.
No process group is used inside a sync, so that a dead or stopped rank is found by a deadline and not by a hang.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import torch

from rlsync.control import BucketEntry, bytes_needed
from rlsync.control import messages as m
from rlsync.control.coordinator import Expected
from rlsync.control.peer import Peer, pid_domain, to_exception
from rlsync.control.server import CoordinatorServer
from rlsync.engine.protocol import EngineHandle
from rlsync.errors import ConfigError, RlsyncError, WeightSyncError
from rlsync.sync.config import SyncConfig, SyncReport
from rlsync.sync.tasks import Lane, Outcome, Tasks
from rlsync.transport.shm import Ring, shm_domain

# The coordinator's deadline names the culprit; a peer's own, this much later, is for the case that it is gone.
GRACE_S = 2.0


class BucketSource(Protocol):
    """Where the bytes of a sync come from; one on each actor rank.

    Attributes:
        buckets: the table, in layer order, the same on all ranks.
        digest: names what is sent and how it is laid out; must be equal on all ranks.
        nbytes: bytes of all tensors.
    """

    buckets: tuple[tuple[BucketEntry, ...], ...]
    digest: str
    nbytes: int

    def begin(self, version: int) -> None:
        """Make the parameters those after the last optimizer step. May be collective over the actor ranks."""
        ...

    def fill(self, bucket: int, slot: torch.Tensor) -> int:
        """Copy this rank's pieces of a bucket into ``slot`` (1-D uint8); returns the bytes copied. Not collective."""
        ...


class _Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rank 0 tells the other ranks before they dial, or why there is nothing to dial."""

    endpoint: str = ""
    token: str = ""
    run_id: str = ""
    error: m.Error | None = None


class WeightSyncer:
    """Syncs engines with an actor. ``connect`` once, ``sync`` for each version, ``close``; all collective over the actor ranks.

    Args:
        source: this rank's source.
        engines: handles of all engines, on rank 0; other ranks give none.
        rank, world_size: of this actor rank among all actor ranks.
        broadcast: returns rank 0's argument on every rank; called once in ``connect``. May be any collective over the actor
            ranks, for instance through the trainer's process group; a single rank needs none.
    """

    def __init__(
        self,
        source: BucketSource,
        engines: Sequence[EngineHandle],
        config: SyncConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        broadcast: Callable[[bytes], bytes] | None = None,
    ) -> None:
        if rank == 0 and not engines:
            raise ConfigError("WeightSyncer: rank 0 needs the handle of at least one engine")
        if broadcast is None and world_size > 1:
            raise ConfigError(f"WeightSyncer: {world_size} actor ranks need a broadcast to share the coordinator's address")
        self._source, self._config = source, config
        self._engines = tuple(engines) if rank == 0 else ()
        self._rank, self._world_size, self._broadcast = rank, world_size, broadcast
        self._peer: Peer | None = None
        self._ring: Ring | None = None
        self._server: CoordinatorServer | None = None
        self._tasks = Tasks()
        self._lane: Lane | None = None
        self._attempt, self._version = 0, -1
        self._sinks = ("loaders" if config.sink == "auto" else config.sink, "shm" if config.transport == "auto" else config.transport)

    # Connect.

    def connect(self) -> None:
        """Make the ring, let all workers and ranks dial in, and judge the bucket table. Collective over the actor ranks.

        Raises the same WeightSyncError on all ranks. May be called again after ``close``.
        """
        if self._peer is not None:
            raise WeightSyncError(phase="connect", cause="this syncer is connected; close() it first")
        invitation = self._invite() if self._rank == 0 else _Invitation()
        if self._broadcast is not None:
            invitation = msgspec.msgpack.decode(self._broadcast(msgspec.msgpack.encode(invitation)), type=_Invitation)
        try:
            if invitation.error is not None:
                raise to_exception(invitation.error)
            self._dial(invitation)
        except BaseException as error:
            for engine in self._engines:
                engine.mark_dirty(f"its connection to the actor failed: {error}")
            self.close()
            raise
        self._attempt, self._version = 0, -1

    def _invite(self) -> _Invitation:
        """Rank 0: allocate the ring and open the door. A failure travels in the invitation, for all ranks to raise."""
        try:
            m.check_buckets(self._source.buckets)
            ids = [engine.engine_id for engine in self._engines]
            if len(set(ids)) != len(ids):
                raise ConfigError(f"engine ids must differ: {', '.join(ids)}")
            self._ring = Ring.create(self._config.num_slots, bytes_needed(self._source.buckets))
            self._server = CoordinatorServer(self._config.bind_host)
            token, run_id = secrets.token_urlsafe(32), secrets.token_hex(8)
            self._server.start(self._expected(token, run_id, self._ring))
        except (RlsyncError, OSError) as error:
            return _Invitation(error=m.Error(attempt=0, phase="connect", cause=str(error)))
        return _Invitation(self._server.endpoint, token, run_id)

    def _expected(self, token: str, run_id: str, ring: Ring) -> Expected:
        buckets = self._source.buckets
        return Expected(
            token=token,
            run_id=run_id,
            num_actors=self._world_size,
            engines={engine.engine_id: engine.num_workers for engine in self._engines},
            digest=self._digest(),
            host=socket.gethostname(),
            shm_domain=shm_domain(),
            timeout_s=self._config.timeout_s,
            welcome=m.Welcome(str(ring.path), ring.token, ring.num_slots, ring.slot_bytes, len(buckets), buckets),
        )

    def _digest(self) -> str:
        return f"{self._source.digest}-{m.buckets_digest(self._source.buckets)[:16]}"

    def _dial(self, invitation: _Invitation) -> None:
        hello = m.ActorHello(
            token=invitation.token,
            run_id=invitation.run_id,
            actor_rank=self._rank,
            world_size=self._world_size,
            host=socket.gethostname(),
            shm_domain=shm_domain(),
            pid_domain=pid_domain(),
            pid=os.getpid(),
            digest=self._digest(),
        )
        self._peer = Peer(invitation.endpoint, hello)
        self._tasks = Tasks()
        for engine in self._engines:
            info = {
                "endpoint": invitation.endpoint,
                "token": invitation.token,
                "run_id": invitation.run_id,
                "engine_id": engine.engine_id,
                "timeout_s": self._config.timeout_s,
            }
            self._tasks.spawn(engine.engine_id, partial(engine.init_weight_transfer, info, self._config.timeout_s + 2 * GRACE_S))
        self._await_connected()
        if self._ring is not None:
            self._ring.unlink()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._lane = Lane(lambda: None if device is None else torch.cuda.set_device(device))

    def _await_connected(self) -> None:
        """Until every peer is attached and every engine has answered."""
        assert self._peer is not None
        connected, pending = False, {engine.engine_id for engine in self._engines}
        while not connected or pending:
            message = self._receive(0, "connect", None)
            for outcome in self._tasks.finished() if message is None else ():
                pending.discard(outcome.key)
                if outcome.error is not None:
                    self._peer.send(m.Failed(0, "connect", f"engine {outcome.key}: {_cause(outcome.error)}", engine=outcome.key))
            if isinstance(message, m.Welcome):
                if self._ring is None:
                    self._ring = self._attach(message)
                self._peer.send(m.Attached())
            elif isinstance(message, m.Connected):
                connected = True

    def _attach(self, welcome: m.Welcome) -> Ring:
        assert self._peer is not None
        try:
            return Ring.attach(welcome.ring_path, welcome.ring_token, welcome.num_slots, welcome.slot_bytes)
        except ConfigError as error:
            self._peer.send(m.Failed(0, "connect", str(error)))
            raise WeightSyncError(phase="connect", cause=str(error)) from error

    # Sync.

    def sync(self, version: int) -> SyncReport:
        """Give all engines the actor's present weights under ``version``. Collective over the actor ranks.

        Returns when every engine serves them. Raises the same WeightSyncError on all ranks; the engines are dirty then.
        """
        if self._peer is None or self._ring is None or self._lane is None:
            raise WeightSyncError(phase="connect", version=version, cause="this syncer is not connected; call connect() first")
        if version <= self._version:
            cause = f"version {version} is not newer than {self._version}, which the engines serve; versions only grow"
            raise WeightSyncError(phase="begin", version=version, cause=cause)
        self._attempt += 1
        # Of its own, so that a call left over from a failed sync does not answer in this one.
        self._tasks = Tasks()
        try:
            report = _Sync(self, version).run()
        except BaseException as error:
            for engine in self._engines:
                engine.mark_dirty(str(error))
            raise
        self._version = version
        return report

    def _receive(self, attempt: int, phase: str, version: int | None) -> m.FromCoordinator | None:
        assert self._peer is not None
        limit_s = self._config.timeout_s + GRACE_S
        try:
            return self._peer.receive(attempt, time.monotonic() + limit_s, self._tasks.fd)
        except TimeoutError:
            cause = f"actor rank {self._rank} heard nothing from the coordinator on actor rank 0 within {limit_s:g} s"
            raise WeightSyncError(phase=phase, version=version, cause=cause) from None

    def close(self) -> None:
        """Leave: unmap the ring, close the channel. Engines keep what they serve. Idempotent; waits for nobody."""
        if self._peer is not None:
            self._peer.send(m.Goodbye())
            self._peer.close()
        if self._lane is not None:
            self._lane.stop()
        if self._ring is not None:
            self._ring.close()
        if self._server is not None:
            self._server.stop()
        self._peer = self._ring = self._server = self._lane = None

    def __enter__(self) -> WeightSyncer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Sync:
    """One call of ``WeightSyncer.sync``: an event loop over the channel, this rank's fills and the engines' calls."""

    def __init__(self, syncer: WeightSyncer, version: int) -> None:
        self._syncer, self._version, self._attempt = syncer, version, syncer._attempt
        self._source, self._tasks, self._engines = syncer._source, syncer._tasks, syncer._engines
        self._config = syncer._config
        assert syncer._peer is not None and syncer._ring is not None and syncer._lane is not None
        self._peer, self._ring, self._lane = syncer._peer, syncer._ring, syncer._lane
        self._slots = [self._ring.slot(i) for i in range(self._ring.num_slots)]
        self._filled, self._writable, self._filling = 0, 0, True
        self._pending: dict[str, set[str]] = {}
        self._marks: dict[str, float] = {}
        self._seconds = {"begin": 0.0, "fill": 0.0}
        self._engine_s: dict[str, float] = {}
        self._committed: m.AllCommitted | None = None

    def run(self) -> SyncReport:
        """Returns the report, or raises WeightSyncError."""
        self._marks["start"] = time.monotonic()
        self._peer.send(m.Start(self._attempt, self._version))
        if not self._lane.is_idle():
            # It may still write to a slot of this ring, so no sync over this ring can be right.
            cause = "still inside the source since a failed sync; close() and connect() anew"
            self._peer.send(m.Failed(self._attempt, "begin", cause))
        else:
            self._lane.submit(self._tasks, ("begin", None), lambda: self._source.begin(self._version))
            self._for_each_engine("pause", lambda e: e.pause(self._config.pause_mode, self._config.timeout_s))
        while True:
            message = self._syncer._receive(self._attempt, "transfer", self._version)
            if message is None:
                for outcome in self._tasks.finished():
                    self._take(outcome)
            elif isinstance(message, m.Writable):
                self._writable = message.buckets_writable
            elif isinstance(message, m.AllCommitted):
                self._committed = message
            elif isinstance(message, m.Finished):
                return msgspec.msgpack.decode(message.report, type=SyncReport)
            self._fill_next()
            self._advance()

    def _take(self, outcome: Outcome) -> None:
        kind, which = outcome.key
        if outcome.error is not None:
            phase = {"fill": "transfer", "update": "transfer", "caches": "commit"}.get(kind, kind)
            engine, bucket = (which, None) if kind not in ("begin", "fill") else (None, which)
            self._peer.send(m.Failed(self._attempt, phase, _cause(outcome.error), engine=engine, bucket=bucket))
        elif kind in ("begin", "fill"):
            self._seconds[kind] += outcome.seconds
            self._filling = False
            if kind == "fill":
                self._filled += 1
                self._peer.send(m.Filled(self._attempt, which, outcome.result))
        else:
            self._pending[kind].discard(which)
            self._marks[kind] = time.monotonic()
            if kind == "update":
                self._engine_s[which] = outcome.seconds

    def _fill_next(self) -> None:
        """Fill the next bucket as soon as its slot is free."""
        bucket = self._filled
        if not self._filling and bucket < min(self._writable, len(self._source.buckets)):
            self._filling = True
            slot = self._slots[bucket % len(self._slots)]
            self._lane.submit(self._tasks, ("fill", bucket), lambda: self._source.fill(bucket, slot))

    def _advance(self) -> None:
        """Rank 0: the engines' next call, when all of them have ended the one before."""
        if "pause" not in self._pending or not self._engines or any(self._pending.values()):
            return
        timeout_s = self._config.timeout_s
        info = {"version": self._version, "attempt": self._attempt}
        # The workers and the coordinator keep the deadlines of the phases inside an update.
        if "update" not in self._pending:
            self._for_each_engine("update", lambda e: e.update_weights(info, 3 * (timeout_s + GRACE_S)))
        elif self._committed is None:
            return
        elif "caches" not in self._pending:
            self._for_each_engine("caches", lambda e: e.reset_caches(timeout_s))
        elif "resume" not in self._pending:
            self._for_each_engine("resume", lambda e: e.resume(self._version, timeout_s))
        elif "finish" not in self._pending:
            self._pending["finish"] = set()
            self._peer.send(m.Finish(self._attempt, msgspec.msgpack.encode(self._report())))

    def _for_each_engine(self, kind: str, call: Callable[[EngineHandle], None]) -> None:
        self._pending[kind] = {engine.engine_id for engine in self._engines}
        for engine in self._engines:
            self._tasks.spawn((kind, engine.engine_id), partial(call, engine))

    def _report(self) -> SyncReport:
        assert self._committed is not None
        at = self._marks
        return SyncReport(
            version=self._version,
            sink=self._syncer._sinks[0],
            transport=self._syncer._sinks[1],
            bytes=self._source.nbytes,
            num_buckets=len(self._source.buckets),
            seconds=time.monotonic() - at["start"],
            pause_s=at["pause"] - at["start"],
            begin_s=self._seconds["begin"],
            fill_s=self._seconds["fill"],
            transfer_s=at["update"] - at["pause"],
            load_s=self._committed.load_s,
            finalize_s=self._committed.finalize_s,
            commit_s=at["caches"] - at["update"],
            resume_s=at["resume"] - at["caches"],
            engine_s=self._engine_s,
        )


def _cause(error: BaseException) -> str:
    """The sentence of an error of ours, the whole traceback of any other."""
    return str(error) if isinstance(error, RlsyncError | TimeoutError) else "".join(traceback.format_exception(error)).strip()
