"""Coroutines of an engine handle on an event loop of their own, for callers that block. Knows no vLLM and no HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from rlsync.engine.gate import Gate

T = TypeVar("T")
_PROBE_S = 5.0
_END_S = 1.0


class Calls:
    """One event loop in a daemon thread, and the requests under way on it, which end when the engine becomes dirty."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._requests: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

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
        """Cancel what is left, such as a call that a stopped engine never answered, and stop the loop."""
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
            return future.result(timeout_s)
        except TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise TimeoutError(f"engine {self._gate.engine_id} did not answer within {timeout_s:g} s") from None
        except CancelledError:
            raise self._gate.refusal() from None

    def run_in_turn(self, call: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None) -> T:
        """As ``run``, behind the calls before it, which may go on after their callers have left: a sync that has failed leaves at once."""

        async def in_turn() -> T:
            async with self._turn:
                return await call()

        return self.run(in_turn(), timeout_s)

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine that nobody has to wait for."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run_requests(
        self, requests: Iterable[Coroutine[Any, Any, T]], timeout_s: float | None, probe: Callable[[], Coroutine[Any, Any, Any]]
    ) -> list[T]:
        """The results of all requests, made side by side.

        After ``timeout_s`` they are cancelled, and ``probe`` asks the engine for a sign of life: one that gives none has a
        stopped or stuck process, and becomes dirty, unless it is in a sync. Raises TimeoutError, or EngineDirtyError where the engine
        is dirty.
        """
        try:
            return self.run(self._gather(requests), timeout_s)
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

    async def _gather(self, requests: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        tasks = [asyncio.ensure_future(request) for request in requests]
        self._requests.update(tasks)
        try:
            return list(await asyncio.gather(*tasks))
        except asyncio.CancelledError:
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
