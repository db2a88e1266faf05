"""Requests that stand still in the midst of their answers until a pause is on its way to them, however little the machine has for tests.

An engine that is to hold has ``worker_extension_cls=EXTENSION`` and one worker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from rlsync.engine.compat.engine import UPDATE
from rlsync.engine.handles.local import Engine
from tests.deadlines import HANG_S
from tests.integration.tiny_engines import is_stopped, worker_of

EXTENSION = f"{__name__}.StopsItself"
# Steps that requests have made when they are held, one token each.
NUM_STEPS = 3


class StopsItself:
    """What a worker has beside vLLM's methods."""

    def stop_with(self, num_requests: int) -> None:
        """Stop this process, once, before the step in which so many requests get one more than their first ``NUM_STEPS`` tokens."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        execute, left = runner.execute_model, NUM_STEPS

        def counted(scheduled: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= len(scheduled.num_scheduled_tokens) == num_requests
            if left < 0:
                del runner.execute_model
                os.kill(os.getpid(), signal.SIGSTOP)
            return execute(scheduled, *arguments, **options)

        runner.execute_model = counted


def hold(engine: Engine, num_running: int, num_requests: int, ask: Callable[[], Any], *, pause_s: float = 0.0) -> Any:
    """Have ``ask`` send so many requests; returns what it does when ``num_running`` of them have ``NUM_STEPS`` tokens and the worker of
    the engine is stopped. It goes on ``pause_s`` after a pause has been sent to the engine, alone or with an update, or when it is resumed.
    """
    from vllm.v1.engine import EngineCoreRequestType

    # vLLM asks its workers something before the first request of all.
    engine.generate(((1,),), {"max_tokens": 1})
    client, worker, sent = engine._llm.engine_core, worker_of(engine), 0
    engine.call_workers("stop_with", (num_running,), 60)
    send = client._send_input_message

    async def watch(message: Any, core: Any) -> Any:
        nonlocal sent
        await send(message, core)
        kind, *parts = message
        sent += kind == EngineCoreRequestType.ADD.value
        if any(name in part for part in parts for name in (b"pause_scheduler", UPDATE.encode())):
            del client._send_input_message
            asyncio.get_running_loop().call_later(pause_s, worker.resume)

    # So that the first request is not at its end before the last one comes.
    worker.suspend()
    client._send_input_message = watch
    asked = ask()
    _await(lambda: sent == num_requests)
    worker.resume()
    _await(lambda: is_stopped(worker))
    return asked


def _await(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
