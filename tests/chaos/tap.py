"""Where in a sync something is made to happen: moments, and the tap on the coordinator and the engines' handles that finds them.

Sees what passes, in the thread in which it passes, before it goes on. Causes nothing by itself.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from rlsync.coordinator import messages as m
from rlsync.coordinator.server import CoordinatorServer
from rlsync.coordinator.state_machine import Coordinator
from rlsync.engine.handles.local import Engine

# How far through its buckets a sync is.
BUCKET_LEVELS = {"first bucket": 0.0, "middle bucket": 0.5, "last bucket": 1.0}


@dataclass(frozen=True, slots=True)
class Moment:
    """The ``ordinal``-th time that something passes, counted from 0.

    Attributes:
        channel: ``sent`` and ``received`` are the coordinator's, ``called`` is a method of an engine's handle.
        what: name of the message or method.
        level: of ``Ready`` and ``Done``, how much of all buckets it must be about: 0.0 the first, 1.0 the last.
    """

    phase: str
    channel: str
    what: str
    level: float | None = None
    ordinal: int = 0

    def __str__(self) -> str:
        return f"{self.phase} ({self.what} {self.channel}{f', after {self.ordinal}' if self.ordinal else ''})"

    def is_about(self, bucket: int, num_buckets: int) -> bool:
        """Whether ``bucket``, or one before it, is the one that ``level`` stands for."""
        return self.level is None or bucket >= round(self.level * (num_buckets - 1))


# Every phase begins and ends with something that passes the coordinator or a handle.
MOMENTS: dict[str, tuple[Moment, ...]] = {
    "connect": tuple(Moment("connect", "sent", what) for what in ("Manifest", "Reports", "Assignment")),
    "pause": (Moment("pause", "called", "pause"), Moment("pause", "called", "pause", ordinal=1)),
    **{phase: (Moment(phase, "sent", "Ready", level),) for phase, level in BUCKET_LEVELS.items()},
    # The first worker has all that it takes; it verifies, and has not said so.
    "verify": (Moment("verify", "received", "Done", 1.0),),
    "commit": (
        Moment("commit", "sent", "Commit"), Moment("commit", "sent", "Commit", ordinal=1), Moment("commit", "received", "Committed"),
    ),
    "resume": (
        Moment("resume", "sent", "AllCommitted"), Moment("resume", "called", "resume"),
        Moment("resume", "called", "resume", ordinal=1), Moment("resume", "sent", "Finished"),
    ),
}  # fmt: skip
_CALLS = ("pause", "resume")


@dataclass
class Trap:
    """Fires once, at its moment. ``fired_s`` is when; ``error`` what went wrong in it."""

    moment: Moment
    act: Callable[[bytes | None], None]
    fired_s: float | None = None
    error: BaseException | None = None
    passed: int = 0


class Tap:
    """On the one coordinator at a time of this process. Set ``trap`` to arm it, None to disarm.

    Attributes:
        coordinator, server: of the connection that was made last.
    """

    def __init__(self) -> None:
        self.trap: Trap | None = None
        self.coordinator: Coordinator | None = None
        self.server: CoordinatorServer | None = None
        # Whether the workers of all engines have committed in the present sync, so that each engine may serve.
        self.all_committed = False
        self._queued: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Engines are called side by side, each in a thread.
        self._lock = threading.Lock()

    def run_in_thread(self, call: Callable[[], None]) -> None:
        """Have the coordinator's thread, which alone may send, do something at its next tick."""
        self._queued.put(call)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Until the end of the block, everything passes here."""
        start, send = CoordinatorServer.start, CoordinatorServer.send
        tap = self

        def tapped_start(server: CoordinatorServer, served: Any) -> None:
            if isinstance(served, Coordinator):
                tap._watch(server, served)
            start(server, served)

        def tapped_send(server: CoordinatorServer, identity: bytes, message: m.FromCoordinator) -> None:
            tap.all_committed = tap.all_committed or isinstance(message, m.Serve)
            tap._pass("sent", type(message).__name__, identity, getattr(message, "buckets_ready", 0) - 1)
            send(server, identity, message)

        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.object(CoordinatorServer, "start", tapped_start))
            stack.enter_context(patch.object(CoordinatorServer, "send", tapped_send))
            for name in _CALLS:
                stack.enter_context(patch.object(Engine, name, self._tapped_call(name)))
            yield

    def _tapped_call(self, name: str) -> Callable[..., Any]:
        call = getattr(Engine, name)

        def tapped(engine: Engine, *arguments: Any) -> Any:
            self._pass("called", name, None)
            return call(engine, *arguments)

        return tapped

    def _watch(self, server: CoordinatorServer, coordinator: Coordinator) -> None:
        self.server, self.coordinator = server, coordinator
        receive, expire = coordinator.receive, coordinator.expire

        def tapped_receive(identity: bytes, raw: bytes, now: float) -> None:
            with contextlib.suppress(Exception):
                message = m.decode_from_peer(raw)
                self._pass("received", type(message).__name__, identity, getattr(message, "bucket", -1))
            receive(identity, raw, now)

        def tapped_expire(now: float) -> None:
            while not self._queued.empty():
                self._queued.get()()
            expire(now)

        coordinator.receive, coordinator.expire = tapped_receive, tapped_expire  # type: ignore[method-assign]

    def _pass(self, channel: str, what: str, identity: bytes | None, bucket: int = -1) -> None:
        trap = self.trap
        if trap is None or trap.fired_s is not None or (trap.moment.channel, trap.moment.what) != (channel, what):
            return
        assert self.coordinator is not None
        if not trap.moment.is_about(bucket, self.coordinator._connecting.num_buckets):
            return
        with self._lock:
            trap.passed += 1
            if trap.passed <= trap.moment.ordinal or trap.fired_s is not None:
                return
            trap.fired_s = time.monotonic()
        try:
            trap.act(identity)
        except Exception as error:  # the campaign asks for it afterwards; the coordinator's thread must live
            trap.error = error
