"""WeightSyncer: the actor's side of a connection. Owns the channel, this rank's endpoints, and the order of a sync.

Knows the seams only: a Source has weights, EngineHandles drive engines, the coordinator says how a sync stands.
No collective runs inside a sync, so that a dead or stopped rank is found by a deadline and not by a hang.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from operator import index
from typing import Any

import msgspec
import torch
import zmq

from rlsync import logs
from rlsync.coordinator import messages as m
from rlsync.coordinator.client import GRACE_S, Peer, pid_domain, to_exception
from rlsync.coordinator.roster import Expected
from rlsync.coordinator.server import CoordinatorServer
from rlsync.coordinator.state_machine import Coordinator
from rlsync.copy.addresses import BufferAddresses
from rlsync.copy.cuda import compile_ahead
from rlsync.copy.speed import copy_gb_per_s
from rlsync.engine.handles import EngineHandle
from rlsync.errors import ConfigError, WeightSyncError, error_text, first_few
from rlsync.gc_pause import gc_paused
from rlsync.plan.transports import TRANSPORTS
from rlsync.plan.verification import OFF
from rlsync.sync.attempt import Attempt, Connection, blamed, receive
from rlsync.sync.config import SyncConfig
from rlsync.sync.endpoints import Endpoints
from rlsync.sync.packer import Packer
from rlsync.sync.planning import ConnectionPlan, plan_connection
from rlsync.sync.report import SyncHealth, SyncReport
from rlsync.sync.source import Source, ranges_of, source_digest
from rlsync.transport.ipc import memory_of
from rlsync.transport.shm import RingSender, shm_domain
from rlsync.transport.tasks import Lane, Tasks, Threads

_log = logging.getLogger(__name__)

# Calls of this rank's own while it connects; others are those of engines, by their ids.
_JOIN, _PREPARE = object(), object()
# Patience for a call of a failed sync that is about to end.
_LAST_CALL_S = 0.5
_NO_ENGINE = "WeightSyncer: rank 0 needs the handle of at least one engine"


class ConnectInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What rank 0 broadcasts in ``connect``: the coordinator's address, token and run id, or the error that kept rank 0 from listening."""

    endpoint: str = ""
    token: str = ""
    run_id: str = ""
    error: m.Error | None = None

    def hello(self, source: Source, actor_rank: int, world_size: int, gpu_uuid: str | None) -> m.ActorHello:
        """The first message of this process, as an actor rank."""
        return m.ActorHello(
            token=self.token,
            run_id=self.run_id,
            actor_rank=actor_rank,
            world_size=world_size,
            host=socket.gethostname(),
            shm_domain=shm_domain(),
            pid_domain=pid_domain(),
            pid=os.getpid(),
            gpu_uuid=gpu_uuid,
            digest=source_digest(source.tensors, source.placements[actor_rank]),
            memory=memory_of(source.buffers, stable_memory=source.stable_memory),
            frozen=ranges_of(source.frozen, source.tensors),
        )

    def for_engine(self, engine_id: str, timeout_s: float) -> dict[str, Any]:
        """Fields of the ``InitInfo`` of an engine's workers, ``purpose`` aside."""
        return {
            "endpoint": self.endpoint,
            "token": self.token,
            "run_id": self.run_id,
            "engine_id": engine_id,
            "timeout_s": timeout_s,
        }


class WeightSyncer:
    """Sends an actor's weights to engines: ``connect`` once, ``sync`` for each version, ``close``.

    Made on every actor rank. All calls are collective over the actor ranks, though no collective of a process group runs inside ``sync``
    but the source's own. A context manager that closes itself.

    Args:
        source: weights of this rank, such as a ``MegatronSource``.
        engines: on rank 0 the handle of each engine; ignored on other ranks.
        config: settings of the connection, the same on all ranks.
        rank, world_size: of this process among the actor ranks.
        broadcast: returns the bytes that rank 0 was called with, on every rank: any collective over the actor ranks, as through the
            trainer's process group. Called once in each ``connect``. None with one rank.

    Attributes:
        health: on rank 0, failed syncs by phase and the engines that are dirty.
        connect_seconds: on rank 0, seconds of the parts of the last ``connect``: ``record`` (workers record their layouts), ``plan``,
            ``attach`` (all peers open their ends of the transports, and workers bind their copies), ``prepare`` (rank 0 binds its own).

    Raises ConfigError: rank 0 has no engine, several ranks have no ``broadcast``, ``rank`` is none of ``world_size``, or the source is made
    for another number of ranks or differs from the config about adapters.
    """

    def __init__(
        self,
        source: Source,
        engines: Sequence[EngineHandle],
        config: SyncConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        broadcast: Callable[[bytes], bytes] | None = None,
    ) -> None:
        logs.set_up()
        if not 0 <= rank < world_size:
            raise ConfigError(f"WeightSyncer: rank {rank} is none of {world_size} actor ranks, which count from 0")
        if rank == 0 and not engines:
            raise ConfigError(_NO_ENGINE)
        if broadcast is None and world_size > 1:
            raise ConfigError(f"WeightSyncer: {world_size} actor ranks need a broadcast to share the coordinator's address")
        self._source, self._config = _fitting(source, config, world_size), config
        self._engines = tuple(engines) if rank == 0 else ()
        self._rank, self._world_size, self._broadcast = rank, world_size, broadcast
        self._peer: Peer | None = None
        self._endpoints = Endpoints()
        self._server: CoordinatorServer | None = None
        self._tasks, self._threads = Tasks(), Threads("rlsync-engine-calls")
        self._connection: Connection | None = None
        self._plan: ConnectionPlan | None = None
        # Also after ``close``, for the next connection.
        self._last_plan: ConnectionPlan | None = None
        self._sinks: tuple[str, ...] = ()
        self._attempt, self._version = 0, -1
        self._turn = threading.Lock()
        # Whether the last sync of this connection has committed, so that engines have all that is frozen unless they lost it.
        self._engines_hold_frozen = False
        self.health = SyncHealth()
        self.connect_seconds: dict[str, float] = {}

    # Connect.

    def connect(self, engines: Sequence[EngineHandle] | None = None, source: Source | None = None) -> None:
        """Connect to every worker of every engine: workers record their layouts, rank 0 plans, all ranks open their transports.

        Collective over the actor ranks; takes seconds. Call it again after ``close``, with other handles where engines were restarted or
        added: versions then start over, and each engine serves from the next sync on.

        Args:
            engines: new handles, on rank 0; None keeps those there are.
            source: new source of this rank, for a trainer whose parameters have become other objects; None keeps the one there is.

        Raises WeightSyncError with phase ``connect``, the same on all ranks: a peer did not come within ``config.timeout_s``, names or
        shapes do not fit, or a transport or sink cannot serve a worker. Engines are dirty then.
        """
        if self._peer is not None:
            raise WeightSyncError(phase="connect", cause="this syncer is connected; close() it first")
        if engines is not None and self._rank == 0:
            self._engines = tuple(engines)
        if source is not None:
            self._source = _fitting(source, self._config, self._world_size)
        try:
            info = self._listen() if self._rank == 0 else ConnectInfo()
            if self._broadcast is not None:
                info = msgspec.msgpack.decode(self._broadcast(msgspec.msgpack.encode(info)), type=ConnectInfo)
            if info.error is not None:
                raise to_exception(info.error)
            self._dial(info)
        except BaseException as error:
            self.health.failed(error, (engine.engine_id for engine in self._engines), "connect")
            self._mark_dirty(f"its connection to the actor failed: {error}")
            if not isinstance(error, WeightSyncError) and self._peer is not None:
                self._tell_of(error, 0, "connect")
            self.close()
            raise
        self._attempt, self._version, self._engines_hold_frozen = 0, -1, False
        if self._plan is not None:
            self._log_connection(self._plan)

    def _log_connection(self, plan: ConnectionPlan) -> None:
        _log.info(
            "connected %d actor ranks and %d workers of %d engines: %.3f GB in %d destinations and %d buckets, transport %s, sinks %s",
            self._world_size, len(plan.destination_of), len(self._engines), plan.nbytes / 1e9, plan.num_destinations,
            len(plan.parts), plan.transport, ", ".join(sorted(set(self._sinks))),
        )  # fmt: skip
        _log.info("seconds to connect: %s", ", ".join(f"{what} {seconds:.2f}" for what, seconds in self.connect_seconds.items()))
        if plan.num_frozen:
            _log.info("%.3f GB of that are frozen, and sent again only to engines that have lost them", plan.frozen_bytes / 1e9)
        for name, routes in plan.routes(self._config.num_slots).items():
            if TRANSPORTS[name].is_grouped:
                _log.info("%s serves %s", name, first_few(list(routes.workers)))
        if plan.staging:
            ranks = first_few([f"actor rank {rank}" for rank in sorted({rank for _, rank in plan.staging})])
            _log.info("%.3f GB of that go through staging rings in GPU memory of %s", plan.staged_bytes / 1e9, ranks)

    def _listen(self) -> ConnectInfo:
        """Rank 0: begin to listen. A failure travels in the ConnectInfo, for all ranks to raise."""
        try:
            if not self._engines:
                raise ConfigError(_NO_ENGINE)
            ids = [engine.engine_id for engine in self._engines]
            if len(set(ids)) != len(ids):
                raise ConfigError(f"engine ids must differ: {', '.join(ids)}")
            for engine in self._engines:
                _check_handle(engine)
            num_peers = self._world_size + sum(engine.num_workers for engine in self._engines)
            self._server = CoordinatorServer(self._config.bind_host, num_peers)
            token, run_id = secrets.token_urlsafe(32), secrets.token_hex(8)
            self._server.start(Coordinator(self._expected(token, run_id), self._server.send, time.monotonic()))
        except Exception as error:
            # Whatever it is, such as an error of somebody else's handle: the other ranks wait for word of it.
            cause = str(error) if isinstance(error, OSError | zmq.ZMQError) else error_text(error)
            return ConnectInfo(error=m.Error(attempt=0, phase="connect", cause=m.shortened(cause)))
        return ConnectInfo(self._server.endpoint, token, run_id)

    def _expected(self, token: str, run_id: str) -> Expected:
        tensors, placements = tuple(self._source.tensors), self._source.placements
        return Expected(
            token=token,
            run_id=run_id,
            num_actors=self._world_size,
            engines={engine.engine_id: engine.num_workers for engine in self._engines},
            digests=tuple(source_digest(tensors, placement) for placement in placements),
            timeout_s=self._config.timeout_s,
            manifest=m.Manifest(tensors, self._config.sink, self._source.declared.adapter),
        )

    @gc_paused()
    def _dial(self, info: ConnectInfo) -> None:
        clock = _Laps()
        hello = info.hello(self._source, self._rank, self._world_size, _gpu_uuid())
        self._peer = Peer(info.endpoint if self._server is None else self._server.own_endpoint, hello)
        device = _device()
        if device is not None:
            compile_ahead(device)
        self._tasks, self._threads = Tasks(), Threads("rlsync-engine-calls")
        for engine in self._engines:
            init_info = info.for_engine(engine.engine_id, self._config.timeout_s)
            call = partial(engine.init_weight_transfer, init_info, self._config.timeout_s + 2 * GRACE_S)
            self._threads.submit(self._tasks, engine.engine_id, call)
        assignment, packer = self._await_connected(clock, device)
        clock.lap("prepare")
        self._endpoints.seal()
        lane = Lane(lambda: None if device is None else torch.cuda.set_device(device))
        self.connect_seconds = clock.seconds
        self._connection = Connection(
            self._peer,
            assignment.num_buckets,
            lane,
            self._threads,
            self._source,
            packer,
            self._endpoints,
            self._engines,
            self._config,
            self.health,
            self._plan,
            self._sinks,
            self._link_gb_per_s(),
        )

    def _link_gb_per_s(self) -> float | None:
        """Rank 0: copy speed of the ring, where everything goes through it; None where the link cannot be measured."""
        senders = list(self._endpoints.senders.values())
        (ring,) = senders if len(senders) == 1 else (None,)
        return copy_gb_per_s(ring.slots()[0]) if self._rank == 0 and isinstance(ring, RingSender) else None

    def _await_connected(self, clock: _Laps, device: torch.device | None) -> tuple[m.ActorAssignment, Packer]:
        """This rank's assignment and its programs, when every peer has its own and every engine has answered."""
        assert self._peer is not None
        assignment, packer, failure, connected, began_s = None, None, None, False, time.monotonic()
        reports: m.Reports | None = None
        preparing: threading.Thread | None = None
        while not connected or (packer is None and failure is None):
            if connected:
                # Work of this rank alone, which no deadline is for: a kernel may have to be compiled.
                assert preparing is not None, "nobody is connected without an assignment"
                preparing.join()
                message = None
            else:
                message = receive(self._peer, self._tasks, self._config.timeout_s, since_s=began_s, attempt=0, phase="connect")
            for outcome in self._tasks.finished() if message is None else ():
                if outcome.error is not None and outcome.key in (_JOIN, _PREPARE):
                    self._peer.send(m.Failed(0, "connect", error_text(outcome.error), engine=blamed(outcome.error)))
                    # Comes back as the error of all, unless all were connected before.
                    failure = outcome.error
                elif outcome.key is _JOIN:
                    self._peer.send(m.Attached(outcome.result))
                elif outcome.key is _PREPARE:
                    packer = outcome.result
                elif outcome.error is not None:
                    self._peer.send(m.Failed(0, "connect", f"engine {outcome.key}: {error_text(outcome.error)}", engine=outcome.key))
                else:
                    self._peer.send(m.Answered(0, outcome.key, "connect"))
            if isinstance(message, m.Reports):
                reports = message if reports is None else reports.joined(message)
                if len(reports.records) < len(reports.workers):
                    continue
                clock.lap("record")
                try:
                    for part in self._plan_connection(reports).parts():
                        self._peer.send(part)
                    clock.lap("plan")
                except Exception as error:
                    # An error on this rank is sent to all peers by the coordinator.
                    self._peer.send(m.Failed(0, "connect", error_text(error)))
            elif isinstance(message, m.Assignment):
                assignment = message.actor
                assert assignment is not None
                try:
                    preparing = self._attach(assignment, device)
                except Exception as error:
                    self._peer.send(m.Failed(0, "connect", error_text(error)))
            elif isinstance(message, m.Connected):
                connected = True
                clock.lap("attach")
        if failure is not None:
            raise failure
        assert assignment is not None and packer is not None
        return assignment, packer

    def _attach(self, assignment: m.ActorAssignment, device: torch.device | None) -> threading.Thread:
        """Make this rank's senders, and in a thread have them join and bind what they send, while workers bind what they take."""
        source, addresses = self._source, BufferAddresses(self._source.buffers)
        timeout_s = self._config.timeout_s
        join = self._endpoints.attach(assignment, timeout_s, addresses, stable_memory=source.stable_memory, device=device)
        senders = list(self._endpoints.senders.values())

        def prepare() -> Packer:
            if device is not None:
                torch.cuda.set_device(device)
            packer = Packer(assignment, addresses, senders, source.declared)
            packer.prepare()
            return packer

        return self._tasks.spawn(_JOIN, join, (_PREPARE, prepare))

    def _plan_connection(self, reports: m.Reports) -> m.Planned:
        """Rank 0: plan the connection, and open what its transports need."""
        for hello, record in zip(reports.workers, reports.records, strict=True):
            if record.remark:
                _log.warning("%s takes the %s sink: %s", hello, record.sink, record.remark)
        source = self._source
        self._plan = self._last_plan = plan_connection(
            source.tensors, source.placements, reports, self._config, source.declared.transforms, self._last_plan
        )
        self._sinks = tuple(record.sink for record in reports.records)
        return m.Planned(*self._endpoints.host(self._plan, self._config))

    # Sync.

    def sync(self, version: int) -> SyncReport:
        """Bring the source's current weights to all engines as ``version``; returns when every engine serves them.

        Collective over the actor ranks. Nothing may write to the source's buffers meanwhile.

        Args:
            version: greater than that of the last sync of this connection; usually the optimizer step.

        Returns the report of rank 0, on all ranks. Raises WeightSyncError, the same on all ranks, where it did not commit: every engine is
        dirty then, and refuses to generate until a later sync commits or it is restarted. ConfigError, with nothing sent, where the version
        is no whole number.
        """
        if not self._turn.acquire(blocking=False):
            raise WeightSyncError(phase="begin", version=version, cause="another thread is inside sync() of this syncer; call it in turn")
        try:
            return self._sync(version)
        finally:
            self._turn.release()

    def _sync(self, version: int) -> SyncReport:
        if self._connection is None:
            raise WeightSyncError(phase="connect", version=version, cause="this syncer is not connected; call connect() first")
        try:
            version = index(version)
        except TypeError:
            raise ConfigError(f"sync: version is {version!r}, of type {type(version).__name__}; it must be a whole number") from None
        if version >= 2**63:
            raise ConfigError(f"sync: version is {version}; it must be less than 2**63")
        if version <= self._version:
            cause = f"version {version} is not newer than {self._version}, which the engines serve; versions only grow"
            raise WeightSyncError(phase="begin", version=version, cause=cause)
        self._attempt += 1
        # New tasks, so that a call left over from a failed sync does not answer in this one.
        self._tasks = Tasks()
        name = secrets.token_hex(8)
        try:
            without_frozen = self._may_pass_over_frozen()
            self._engines_hold_frozen = False
            report = Attempt(self._connection, self._tasks, self._attempt, version, name, without_frozen=without_frozen).run()
        except BaseException as error:
            if not isinstance(error, WeightSyncError) and self._peer is not None:
                self._tell_of(error, self._attempt, "transfer")
            self._tasks.end()
            # A call that has not begun could be a collective that other ranks never enter.
            self._connection.lane.forget(self._tasks, _LAST_CALL_S)
            self._endpoints.abandon()
            self.health.failed(error, (engine.engine_id for engine in self._engines))
            self._mark_dirty(str(error), name)
            raise
        self._version, self._engines_hold_frozen = version, True
        return report

    def _tell_of(self, error: BaseException, attempt: int, phase: str) -> None:
        """Tell the other ranks of an error of this rank alone, for which they would wait until their deadlines."""
        assert self._peer is not None
        self._peer.send(m.Failed(attempt, phase, error_text(error)))

    def _mark_dirty(self, reason: str, name: str = "") -> None:
        """Mark every engine. A handle that fails, as of an engine that is gone, keeps no other from it and takes no error's place."""
        for engine in self._engines:
            try:
                engine.mark_dirty(reason, name)
            except Exception as error:
                _log.warning("engine %s could not be marked dirty: %s", engine.engine_id, error_text(error))

    def _may_pass_over_frozen(self) -> bool:
        """Rank 0: whether frozen tensors need not be sent, because every engine has them from the sync before.

        An engine that slept at level 2 has lost them, and is dirty. What a handle does not know of, such as a server that somebody else put
        to sleep, is found by the checksums of every sync; with ``verify`` off nothing would find it, so everything is sent.
        """
        has_frozen = self._plan is not None and self._plan.num_frozen > 0 and self._config.verify != OFF
        return has_frozen and self._engines_hold_frozen and all(_is_clean(engine) for engine in self._engines)

    def close(self) -> None:
        """End the connection of this rank; engines keep serving their version. Not collective, idempotent, and waits for nobody but, where
        ``connect`` failed on rank 0, up to 2 s for those who have not dialled in, who hear why.

        A staging ring in GPU memory, which workers may still map, is freed when they have connected again or with this object.
        """
        if self._peer is not None:
            self._peer.send(m.Goodbye())
            self._peer.close()
        if self._connection is not None:
            self._connection.lane.stop()
        self._threads.stop()
        self._endpoints.close()
        if self._server is not None:
            self._server.stop()
        self._peer = self._server = self._connection = self._plan = None

    def __enter__(self) -> WeightSyncer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fitting(source: Source, config: SyncConfig, world_size: int) -> Source:
    """``source``, where it agrees with ``config`` about adapters and is of so many ranks. Raises ConfigError otherwise."""
    if (source.declared.adapter is not None) != (config.lora == "adapter"):
        has = "no adapters" if source.declared.adapter is None else "adapters beside its weights"
        raise ConfigError(f"weight_sync.lora is {config.lora}, and the source sends {has}; make it with lora={config.lora!r}")
    if len(source.placements) != world_size:
        raise ConfigError(
            f"WeightSyncer: the source has placements of {len(source.placements)} actor ranks, and world_size is {world_size}"
        )
    return source


def _check_handle(engine: EngineHandle) -> None:
    """Raise ConfigError for a handle that lacks a method of a sync, or has no workers. At connect, because in a sync other engines would be
    paused already."""
    missing = [call for call in ("init_weight_transfer", "sync", "mark_dirty") if not callable(getattr(engine, call, None))]
    if missing:
        raise ConfigError(
            f"the handle of engine {engine.engine_id}, a {type(engine).__name__}, has no {', '.join(missing)}; EngineHandle of "
            "rlsync.engine.handles says what each does, and sync_in_turn beside it is a sync made of pause, update_weights and resume"
        )
    if engine.num_workers < 1:
        raise ConfigError(f"engine {engine.engine_id} has no workers: start() it before connect()")


def _is_clean(engine: EngineHandle) -> bool:
    """Whether the engine's state is clean. False for one that cannot be asked: its pause, which follows, tells all ranks why."""
    try:
        return engine.state == "clean"
    except Exception as error:
        _log.warning("engine %s did not say whether it holds what is frozen, which is sent to it again: %s", engine.engine_id, error)
        return False


class _Laps:
    """A stopwatch: ``seconds`` by name, each from the lap before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.monotonic()

    def lap(self, what: str) -> None:
        now_s = time.monotonic()
        self.seconds[what], self._last_s = now_s - self._last_s, now_s


def _device() -> torch.device | None:
    """The GPU that this process computes on, or None where it has touched none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None


def _gpu_uuid() -> str | None:
    """The UUID of that GPU."""
    device = _device()
    return None if device is None else str(torch.cuda.get_device_properties(device).uuid)
