"""Calls to worker processes: made together, awaited together, and failing with one error that names who, in what, and why.

Knows Ray's errors; what the workers do is theirs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

import ray

from rlsync.errors import RlsyncError

# After a failure the others get this long to say more: a rank whose peer died often speaks before Ray notices the death.
_SETTLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A Ray actor with the name that errors call it by and the place it prints to."""

    name: str
    actor: Any
    log: str

    def call(self, method: str, *arguments: Any) -> Call:
        """Start a call; ``collect`` awaits it."""
        return Call(self, method, getattr(self.actor, method).remote(*arguments))


@dataclass(frozen=True, slots=True)
class Call:
    """A call under way."""

    worker: Worker
    method: str
    reference: Any


class WorkerDiedError(RlsyncError):
    """A worker process is gone."""


def collect(calls: Sequence[Call], on_result: Callable[[Call], None] = lambda call: None) -> list[Any]:
    """The results of all calls, in order; ``on_result`` hears of each as it comes.

    Raises one error as soon as a call failed and the others had a moment to say more: a process that died comes before an
    error of ours, and that before any other, because ranks fail in many ways when one of them is lost.
    """
    pending = {call.reference: call for call in calls}
    results: dict[Any, Any] = {}
    failures: list[RlsyncError] = []
    deadline = float("inf")
    while pending:
        left = deadline - time.monotonic()
        done, _ = ray.wait(list(pending), num_returns=1, timeout=None if left == float("inf") else max(0.0, left))
        if not done:
            break
        call = pending.pop(done[0])
        try:
            results[done[0]] = ray.get(done[0])
            on_result(call)
        except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
            failures.append(_translated(call, error))
            deadline = min(deadline, time.monotonic() + _SETTLE_S)
    if failures:
        raise min(failures, key=_how_far_from_the_cause)
    return [results[call.reference] for call in calls]


def _translated(call: Call, error: ray.exceptions.RayError) -> RlsyncError:
    worker = call.worker
    if isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error.cause, RlsyncError):
            return error.cause
        # The frames alone: what stands before is Ray's own, the last line repeats the error.
        frames = "\n".join(dropwhile(lambda line: not line.startswith("  File"), str(error).splitlines()[:-1]))
        return RlsyncError(
            f"{worker.name} failed in {call.method}: {type(error.cause).__name__}: {error.cause}\n{frames}\nits log: {worker.log}"
        )
    if getattr(error, "actor_init_failed", False):
        return RlsyncError(f"{worker.name} could not be created: {error}\nits log: {worker.log}")
    number = re.search(r"pid: (\d+)", str(error))
    process = "" if number is None else f" (process {number[1]})"
    return WorkerDiedError(f"{worker.name}{process} ended during {call.method}: killed, out of memory, or crashed; its log: {worker.log}")


def _how_far_from_the_cause(error: RlsyncError) -> int:
    if isinstance(error, WorkerDiedError):
        return 0
    return 2 if type(error) is RlsyncError else 1
