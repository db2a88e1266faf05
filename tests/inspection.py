"""What engines hold, tensor by tensor, as hashes. Works beside a connection and without one; changes nothing."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from functools import partial

from rlsync.coordinator.server import CoordinatorServer
from rlsync.engine.handles import EngineHandle
from rlsync.errors import RlsyncError, WeightSyncError
from rlsync.sync.attempt import describe
from rlsync.sync.syncer import ConnectInfo
from rlsync.transport.tasks import Tasks
from tests.inspection_collector import Inspection, Place


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
                cause = str(outcome.error) if isinstance(outcome.error, RlsyncError) else describe(outcome.error)
                raise WeightSyncError(phase="connect", engine=outcome.key, cause=cause)
        complete.wait(0.05)
