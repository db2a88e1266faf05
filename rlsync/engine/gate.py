"""Whether an engine may serve, and which version. Owns the three states and those who wait for them to change.

``clean`` serves the weights of one committed version; ``syncing`` makes new requests wait; ``dirty`` refuses them until a
complete sync or a restart. Knows no vLLM and no transport, so that every kind of engine refuses in the same way.
"""

from __future__ import annotations

import math
import threading
import time

from rlsync.errors import EngineDirtyError


class Gate:
    """State of one engine as its handle knows it. Starts ``dirty``, for ``reason``. Methods may be called from any thread."""

    def __init__(self, engine_id: str, reason: str) -> None:
        self.engine_id = engine_id
        self._changed = threading.Condition()
        self._state, self._reason, self._until_s = "dirty", reason, 0.0
        self._epoch = 0  # grows with each call of shut
        self._over = ""  # the last sync that has failed
        self._version: int | None = None
        self._closed = False

    @property
    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``."""
        return self._state

    @property
    def version(self) -> int | None:
        """Version that is served, or None for the weights that the engine had before its first sync."""
        return self._version

    def open(self) -> None:
        """Serve what the engine holds."""
        self._set("clean")

    def shut(self, reason: str, sync: str = "") -> None:
        """Become ``dirty``; those who wait are refused. ``sync`` is over, also where it begins only now."""
        with self._changed:
            self._epoch += 1
            self._over = sync or self._over
            if not self._closed:
                self._set("dirty", reason)

    def close(self, reason: str) -> None:
        """Become ``dirty`` for good and for this reason: no sync opens it again."""
        with self._changed:
            self.shut(reason)
            self._closed = True

    def begin_sync(self, sync: str, limit_s: float) -> None:
        """Become ``syncing``. A sync of which nothing is heard for ``limit_s`` counts as failed.

        Raises EngineDirtyError when closed, and for a sync that is over: of two threads' calls the second may come first.
        """
        with self._changed:
            if self._closed or (sync and sync == self._over):
                raise self.refusal()
            self._set("syncing", until_s=time.monotonic() + limit_s)

    def ticket(self) -> int:
        """What ``commit`` asks for, taken before the engine is let go. Raises EngineDirtyError unless it is ``syncing``."""
        with self._changed:
            if self._state != "syncing":
                raise self.refusal()
            return self._epoch

    def commit(self, ticket: int, version: int | None) -> None:
        """Become ``clean`` at ``version``. A call that outlived its sync raises EngineDirtyError and undoes no ``shut``."""
        with self._changed:
            if self._epoch != ticket:
                raise self.refusal()
            self._version = version
            self._set("clean")

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the engine is ``clean``.

        Raises EngineDirtyError where it is ``dirty`` or becomes so, and TimeoutError when a sync lasts longer than ``timeout_s``.
        """
        with self._changed:
            deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
            while self._state == "syncing" and (now_s := time.monotonic()) < min(self._until_s, deadline_s):
                self._changed.wait(min(self._until_s, deadline_s) - now_s)
            if self._state == "syncing" and time.monotonic() < self._until_s:
                raise TimeoutError(f"engine {self.engine_id} was still in a sync after {timeout_s:g} s")
            if self._state == "syncing":
                self._state, self._reason = "dirty", "a sync neither committed nor failed in time"
            if self._state == "dirty":
                raise self.refusal()

    def refusal(self) -> EngineDirtyError:
        """The error that says why nothing is generated."""
        remedy = "restart it" if self._closed else "sync it completely or restart it"
        return EngineDirtyError(f"engine {self.engine_id} refuses to generate: {self._reason}; {remedy}")

    def _set(self, state: str, reason: str = "", until_s: float = 0.0) -> None:
        with self._changed:
            self._state, self._reason, self._until_s = state, reason, until_s
            self._changed.notify_all()
