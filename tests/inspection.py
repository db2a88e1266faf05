"""What engines hold, tensor by tensor, as hashes. Works beside a connection and without one; changes nothing.

The workers of running engines dial a server that collects one ``State`` from each.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

import msgspec

from rlsync.coordinator import messages as m
from rlsync.coordinator.server import CoordinatorServer
from rlsync.coordinator.state_machine import Sender
from rlsync.engine.handles import EngineHandle
from rlsync.errors import RlsyncError, WeightSyncError, error_text
from rlsync.sync.syncer import ConnectInfo
from rlsync.transport.tasks import Tasks


def inspect_engines(
    engines: Sequence[EngineHandle], *, bind_host: str = "127.0.0.1", timeout_s: float = 120.0
) -> dict[Place, dict[str, str]]:
    """Hashes by path of everything that each worker computes from; see ``rlsync.engine.state.state_hashes``.

    Two engines hold the same weights in the same form exactly when their hashes are equal. Engines should be idle. Keys are
    (engine id, worker's number). Raises WeightSyncError naming the workers that do not answer. Not collective.
    """
    token, run_id = secrets.token_urlsafe(32), secrets.token_hex(8)
    server = CoordinatorServer(bind_host, sum(e.num_workers for e in engines))
    inspection = Inspection(token, run_id, {e.engine_id: e.num_workers for e in engines}, server.send)
    server.start(inspection)
    info = ConnectInfo(server.endpoint, token, run_id)
    tasks = Tasks()
    try:
        for engine in engines:
            init_info = {**info.for_engine(engine.engine_id, timeout_s), "purpose": "inspect"}
            tasks.spawn(engine.engine_id, partial(engine.init_weight_transfer, init_info, timeout_s))
        _await(inspection.complete, tasks, timeout_s, len(engines))
        if inspection.absent():
            raise WeightSyncError(phase="connect", cause=f"no state within {timeout_s:g} s from {inspection.absent()}")
        return dict(inspection.states)
    finally:
        server.stop()


def _await(complete: threading.Event, tasks: Tasks, timeout_s: float, pending: int) -> None:
    """Until everything is here and every engine has answered, an engine's call fails, or the time is over."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and not (pending == 0 and complete.is_set()):
        for outcome in tasks.finished():
            pending -= 1
            if outcome.error is not None:
                cause = str(outcome.error) if isinstance(outcome.error, RlsyncError) else error_text(outcome.error)
                raise WeightSyncError(phase="connect", engine=outcome.key, cause=cause)
        complete.wait(0.05)


Place = tuple[str, int]


class Inspection:
    """Collects one ``State`` from every worker; fed by a server like a Coordinator.

    Attributes:
        states: (engine id, worker's number in its engine) -> hashes by path.
        complete: set when all are here.
    """

    def __init__(self, token: str, run_id: str, engines: Mapping[str, int], send: Sender) -> None:
        self._token, self._run_id, self._send = token, run_id, send
        self._expected = {(engine, place) for engine, count in engines.items() for place in range(count)}
        self._members: dict[bytes, m.WorkerHello] = {}
        self.states: dict[Place, dict[str, str]] = {}
        self.complete = threading.Event()

    def receive(self, identity: bytes, raw: bytes, now_s: float) -> None:
        """Take one message. What is no message, and who has no token, disturbs nobody."""
        hello = self._members.get(identity)
        if hello is None and len(raw) > m.MAX_HELLO_BYTES:
            return
        try:
            message = m.decode_from_peer(raw)
        except msgspec.MsgspecError:
            return
        if isinstance(message, m.WorkerHello):
            if hmac.compare_digest(message.token.encode(), self._token.encode()) and message.run_id == self._run_id:
                self._members[identity] = message
            else:
                cause = f"engine {message.engine_id} came with a wrong token; it belongs to another run"
                self._send(identity, m.Error(attempt=0, phase="connect", cause=cause))
        elif isinstance(message, m.State) and hello is not None:
            self.states[hello.engine_id, hello.worker] = message.hashes
            if self.states.keys() >= self._expected:
                self.complete.set()

    def absent(self) -> list[Place]:
        """Workers that have not answered."""
        return sorted(self._expected - self.states.keys())

    def lose(self, identity: bytes) -> None:
        """Nothing: who is gone does not answer, and the deadline says so."""

    def expire(self, now_s: float) -> None:
        """Nothing: the caller waits for ``complete`` with a deadline of its own."""

    def fail(self, cause: str) -> None:
        """Nothing: as for ``expire``."""

    def is_awaited(self) -> bool:
        """Never: as for ``expire``."""
        return False

    def process_of(self, identity: bytes) -> tuple[int, str] | None:
        """Nobody's death is watched."""
        return None
