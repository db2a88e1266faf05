"""WeightSyncer: the actor's side of a connection. Owns the ring, the channel and the order of a sync.

Knows the seams only: a BucketSource fills slots, EngineHandles drive engines, the coordinator says how a sync stands.
No process group is used inside a sync, so that a dead or stopped rank is found by a deadline and not by a hang.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import torch
import zmq

from rlsync.control import bytes_needed
from rlsync.control import messages as m
from rlsync.control.peer import Peer, pid_domain, to_exception
from rlsync.control.roster import Expected
from rlsync.control.server import CoordinatorServer
from rlsync.engine.protocol import EngineHandle
from rlsync.errors import ConfigError, RlsyncError, WeightSyncError
from rlsync.sync.attempt import GRACE_S, Attempt, Connection, chosen, describe, receive
from rlsync.sync.config import SyncConfig, SyncReport
from rlsync.sync.source import BucketSource
from rlsync.sync.tasks import Lane, Tasks
from rlsync.transport.shm import Ring, shm_domain

_log = logging.getLogger(__name__)


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
        self._connection: Connection | None = None
        self._attempt, self._version = 0, -1

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
        if self._rank == 0:
            buckets, workers = len(self._source.buckets), sum(engine.num_workers for engine in self._engines)
            _log.info(
                "connected %d actor ranks and %d workers of %d engines: %.3f GB in %d buckets, transport %s, sink %s",
                self._world_size, workers, len(self._engines), self._source.nbytes / 1e9, buckets,
                *chosen(self._config),
            )  # fmt: skip

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
        except (RlsyncError, OSError, zmq.ZMQError) as error:
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
        ring = self._await_connected()
        ring.unlink()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        lane = Lane(lambda: None if device is None else torch.cuda.set_device(device))
        self._connection = Connection(self._peer, ring, lane, self._source, self._engines, self._config)

    def _await_connected(self) -> Ring:
        """The mapped ring, when every peer is attached and every engine has answered."""
        assert self._peer is not None
        connected, pending = False, {engine.engine_id for engine in self._engines}
        while not connected or pending:
            message = receive(self._peer, self._tasks, self._config.timeout_s, attempt=0, phase="connect")
            for outcome in self._tasks.finished() if message is None else ():
                pending.discard(outcome.key)
                if outcome.error is not None:
                    self._peer.send(m.Failed(0, "connect", f"engine {outcome.key}: {describe(outcome.error)}", engine=outcome.key))
            if isinstance(message, m.Welcome):
                if self._ring is None:
                    self._ring = self._attach(message)
                self._peer.send(m.Attached())
            elif isinstance(message, m.Connected):
                connected = True
        assert self._ring is not None
        return self._ring

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
        if self._connection is None:
            raise WeightSyncError(phase="connect", version=version, cause="this syncer is not connected; call connect() first")
        if version <= self._version:
            cause = f"version {version} is not newer than {self._version}, which the engines serve; versions only grow"
            raise WeightSyncError(phase="begin", version=version, cause=cause)
        self._attempt += 1
        # Of its own, so that a call left over from a failed sync does not answer in this one.
        self._tasks = Tasks()
        try:
            report = Attempt(self._connection, self._tasks, self._attempt, version).run()
        except BaseException as error:
            if not isinstance(error, WeightSyncError) and self._peer is not None:
                # It arose on this rank alone; the others are told instead of left to their deadline.
                self._peer.send(m.Failed(self._attempt, "transfer", f"actor rank {self._rank}: {describe(error)}"))
            for engine in self._engines:
                engine.mark_dirty(str(error))
            raise
        self._version = version
        return report

    def close(self) -> None:
        """Leave: unmap the ring, close the channel. Engines keep what they serve. Idempotent; waits for nobody."""
        if self._peer is not None:
            self._peer.send(m.Goodbye())
            self._peer.close()
        if self._connection is not None:
            self._connection.lane.stop()
        if self._ring is not None:
            self._ring.close()
        if self._server is not None:
            self._server.stop()
        self._peer = self._ring = self._server = self._connection = None

    def __enter__(self) -> WeightSyncer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
