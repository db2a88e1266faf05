"""Calls that run beside a thread which waits on sockets. Owns daemon threads and the descriptor that wakes the waiter.

``concurrent.futures`` does not serve here: its threads are joined when the interpreter exits, so that one engine call
which never returns would keep a failed run from ending.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a call that was submitted under ``key``: a result or an error."""

    key: Any
    result: Any
    error: BaseException | None
    seconds: float


def forget_frames(error: BaseException) -> None:
    """Clear the frames of a traceback, so that they do not keep tensors alive as long as somebody keeps the error."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


class Tasks:
    """Runs calls in daemon threads and collects their outcomes.

    Attributes:
        fd: readable while an outcome waits in ``finished``.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._ended = False

    def __del__(self) -> None:
        # Not before the last thread that may write to it is gone: the number could be another file's by then.
        os.close(self.fd)

    def spawn(self, key: Any, call: Callable[[], Any], *then: tuple[Any, Callable[[], Any]]) -> threading.Thread:
        """Run a call in a thread of its own, and ``then`` others, each as soon as the one before has returned."""
        thread = threading.Thread(target=self._run_all, args=([(key, call), *then],), name=f"rlsync-{key}", daemon=True)
        thread.start()
        return thread

    def end(self) -> None:
        """Begin none of the calls that wait for another one to return."""
        self._ended = True

    def _run_all(self, steps: list[tuple[Any, Callable[[], Any]]]) -> None:
        while self.run(*steps.pop(0)) and steps and not self._ended:
            pass

    def run(self, key: Any, call: Callable[[], Any]) -> bool:
        """Run a call in this thread; its outcome is put with the others. Whether it has returned."""
        started_s, result, error = time.monotonic(), None, None
        try:
            result = call()
        except BaseException as caught:
            forget_frames(caught)
            error = caught
        self._outcomes.put(Outcome(key, result, error, time.monotonic() - started_s))
        os.eventfd_write(self.fd, 1)
        returned = error is None
        # The traceback refers to this frame: its locals would live until the next collection of cycles.
        del self, key, call, result, error
        return returned

    def finished(self) -> list[Outcome]:
        """Outcomes since the last call, oldest first; never blocks."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        outcomes = []
        while not self._outcomes.empty():
            outcomes.append(self._outcomes.get())
        return outcomes


class Threads:
    """Daemon threads that run calls side by side, each reported to its Tasks. One that is at rest takes the next call: to start a thread
    takes as long as several messages, and a call that never returns keeps its own."""

    def __init__(self, name: str) -> None:
        self._name, self._lock, self._has_stopped = name, threading.Lock(), False
        # Of the threads at rest.
        self._idle: list[queue.SimpleQueue[tuple[Tasks, Any, Callable[[], Any]] | None]] = []

    def submit(self, tasks: Tasks, key: Any, call: Callable[[], Any]) -> None:
        with self._lock:
            calls = self._idle.pop() if self._idle else None
        if calls is None:
            calls = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(calls,), name=self._name, daemon=True).start()
        calls.put((tasks, key, call))

    def stop(self) -> None:
        """End the threads at rest, and each other one after its call."""
        with self._lock:
            self._has_stopped, idle, self._idle = True, self._idle, []
        for calls in idle:
            calls.put(None)

    def _run(self, calls: queue.SimpleQueue[tuple[Tasks, Any, Callable[[], Any]] | None]) -> None:
        while (item := calls.get()) is not None:
            tasks, key, call = item
            tasks.run(key, call)
            del tasks, key, item, call
            with self._lock:
                if self._has_stopped:
                    return
                self._idle.append(calls)


class Lane:
    """One daemon thread that runs calls one after another, each reported to its Tasks.

    Always the same thread, because OpenMP keeps a team of threads for each thread that calls it, and CUDA a device.
    """

    def __init__(self, prepare: Callable[[], None], name: str = "rlsync-packer") -> None:
        self._prepare = prepare
        self._calls: queue.SimpleQueue[tuple[Tasks, Any, Callable[[], Any]] | None] = queue.SimpleQueue()
        # Calls that were submitted and have not ended. With ``_idle``, which says whether there are none, it changes under the lock: a
        # queue that was empty a moment ago may have a call by now.
        self._num_pending = 0
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()
        self._forgotten: weakref.ref[Tasks] | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, tasks: Tasks, key: Any, call: Callable[[], Any]) -> None:
        with self._lock:
            self._num_pending += 1
            self._idle.clear()
        self._calls.put((tasks, key, call))

    def forget(self, tasks: Tasks, patience_s: float) -> None:
        """Drop the calls of ``tasks`` that have not begun; wait at most ``patience_s`` for one that has."""
        with self._lock:
            self._forgotten = weakref.ref(tasks)
        self._idle.wait(patience_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether the last call has ended, within ``timeout_s``."""
        return self._idle.wait(timeout_s)

    def stop(self) -> None:
        """End the thread after the call in hand."""
        self._calls.put(None)

    def _run(self) -> None:
        self._prepare()
        while (item := self._calls.get()) is not None:
            tasks, key, call = item
            with self._lock:
                is_forgotten = self._forgotten is not None and self._forgotten() is tasks
            if not is_forgotten:
                tasks.run(key, call)
            with self._lock:
                self._num_pending -= 1
                if self._num_pending == 0:
                    self._idle.set()
            del tasks, item, call
