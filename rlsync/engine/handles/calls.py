"""What every handle that owns an event loop needs: whether its engine may serve, and coroutines for callers that block.

A ``Gate`` is ``clean`` and serves the weights of one committed version, ``syncing`` and makes new requests wait, or ``dirty`` and
refuses them until a complete sync or a restart. Knows no vLLM and no HTTP, so that every kind of engine refuses in the same way.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any, Protocol, TypeVar

from rlsync.engine.handles import SyncOrder, call_in_turn
from rlsync.errors import EngineDirtyError

T = TypeVar("T")
_PROBE_S = 5.0
_END_S = 1.0


class Gate:
    """State of one engine as its handle knows it. Starts ``dirty``, for ``reason``. Methods may be called from any thread."""

    def __init__(self, engine_id: str, reason: str) -> None:
        self.engine_id = engine_id
        self._changed = threading.Condition()
        self._state, self._reason, self._until_s = "dirty", reason, 0.0
        self._epoch = 0  # grows with each call of shut
        self._sync, self._over = "", ""  # the present sync, and the last one that has failed
        self._version: int | None = None
        self._closed = False

    @property
    def state(self) -> str:
        """``clean``, ``syncing`` or ``dirty``."""
        return self._state

    @property
    def version(self) -> int | None:
        """Version that is served, or None for the weights before the first sync."""
        return self._version

    def open(self) -> None:
        """Become ``clean`` with the present weights."""
        self._set("clean")

    def shut(self, reason: str, sync: str = "") -> None:
        """Become ``dirty`` and refuse waiting requests. A later ``begin_sync(sync)`` is refused too."""
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
            self._sync = sync
            self._set("syncing", until_s=time.monotonic() + limit_s)

    def ticket(self, sync: str = "") -> int:
        """Ticket for ``commit``, taken before the engine is resumed.

        Raises EngineDirtyError unless it is ``syncing``, and for any other sync than the one that has a name: it has failed.
        """
        with self._changed:
            if self._state != "syncing":
                raise EngineDirtyError(f"engine {self.engine_id} is in no sync") if self._state == "clean" else self.refusal()
            if sync and sync != self._sync:
                raise EngineDirtyError(f"engine {self.engine_id} is in another sync by now: the one that asks for it has failed")
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


class GatedHandle(Protocol):
    """A handle whose ``resume`` is refused while another sync than ``sync`` is going on."""

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None: ...

    def resume(self, version: int | None, timeout_s: float, sync: str = "") -> None: ...


def sync_gated(gate: Gate, engine: GatedHandle, order: SyncOrder, pause: Callable[[], None]) -> float:
    """``EngineHandle.sync``: ``pause``, update and resume; none is begun where the sync has failed elsewhere after the one before it."""

    def update() -> None:
        gate.ticket(order.sync)
        engine.update_weights(dict(order.update_info), order.update_s)

    return call_in_turn({"pause": pause, "update": update, "resume": lambda: engine.resume(order.version, order.phase_s, order.sync)})


class Calls:
    """An event loop in a daemon thread, and its requests in flight, which are cancelled when the engine becomes dirty."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._requests: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    @property
    def started(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"rlsync-engine-{self._gate.engine_id}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, once and for all. Idempotent."""
        if self.closed:
            return
        if self._thread is not None:
            self.spawn(self._end())
            self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        """Cancel pending tasks, such as a call that a stopped engine never answered, and stop the loop."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_END_S)
        self._loop.stop()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
        """The coroutine's result. Raises TimeoutError after ``timeout_s``, EngineDirtyError where requests were ended."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            wait([future], timeout_s)
            if not future.done():
                future.cancel()
                raise TimeoutError(f"engine {self._gate.engine_id} did not answer within {timeout_s:g} s")
            return future.result()
        except CancelledError:
            raise self._gate.refusal() from None

    def run_in_turn(self, call: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None) -> T:
        """``run`` after the calls before it, which may go on after their callers have left: a sync that has failed leaves at once."""

        async def in_turn() -> T:
            async with self._turn:
                return await call()

        return self.run(in_turn(), timeout_s)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine without waiting for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run_requests(
        self,
        requests: Iterable[Coroutine[Any, Any, T]],
        timeout_s: float | None,
        probe: Callable[[], Coroutine[Any, Any, Any]],
        on_result: Callable[[int, T], None] | None = None,
    ) -> list[T]:
        """The results of all requests, made side by side. ``on_result`` is called with the number of a request and its result when it
        ends, in the thread of the loop; where it raises, the call does.

        After ``timeout_s`` they are cancelled, and ``probe`` asks the engine for a sign of life: one that gives none has a
        stopped or stuck process, and becomes dirty, unless it is in a sync. Raises TimeoutError, or EngineDirtyError where the engine
        is dirty.
        """
        try:
            return self.run(self._gather(requests, on_result), timeout_s)
        except TimeoutError as late:
            try:
                self.run(probe(), _PROBE_S)
            except TimeoutError:
                if self._gate.state == "syncing":
                    # A core inside an update answers nobody, and what is stuck there is found by the deadlines of the sync.
                    raise late from None
                reason = (
                    f"its requests did not end within {timeout_s:g} s, and it gives no sign of life: a process of it is stopped or stuck"
                )
                self._gate.shut(reason)
                raise self._gate.refusal() from None
            raise

    async def _gather(self, requests: Iterable[Coroutine[Any, Any, T]], on_result: Callable[[int, T], None] | None) -> list[T]:
        failed: list[Exception] = []

        def ended(number: int, task: asyncio.Task[T]) -> None:
            if on_result is None or task.cancelled() or task.exception() is not None or failed:
                return
            try:
                on_result(number, task.result())
            except Exception as error:
                failed.append(error)
                for other in tasks:
                    other.cancel()

        tasks = [asyncio.ensure_future(request) for request in requests]
        for number, task in enumerate(tasks):
            task.add_done_callback(partial(ended, number))
        self._requests.update(tasks)
        try:
            # It may have become dirty since the caller was let in, and what ends requests then has found none of these.
            if self._gate.state == "dirty":
                raise self._gate.refusal()
            results = list(await asyncio.gather(*tasks))
            if failed:
                raise failed[0]
            return results
        except asyncio.CancelledError:
            if failed:
                raise failed[0] from None
            if self._gate.state == "dirty":
                raise self._gate.refusal() from None
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._requests.difference_update(tasks)

    def end_requests(self) -> None:
        """Cancel the requests under way; says nothing when the loop is closed. From any thread."""
        if not self.closed:
            self._loop.call_soon_threadsafe(self.cancel_requests)

    def cancel_requests(self) -> None:
        """Cancel the requests under way, on the loop."""
        for task in self._requests:
            task.cancel()
