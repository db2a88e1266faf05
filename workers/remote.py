"""Calls to worker processes, awaited together and failing with one error that names worker, call and cause.

Knows Ray's errors, not the methods of the workers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from typing import Any

import ray

from rlsync.errors import RlsyncError
from workers.worker_logs import last_lines

# After a failure the others get this long to say more: a rank whose peer died often speaks before Ray notices the death.
_SETTLE_S = 5.0
# How often it is looked whether processes have ended of which Ray would not say so.
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A Ray actor with its name for errors and the path of its log.

    Attributes:
        ended: how its process ended, where that can be known without Ray; None while it runs, and where it cannot.
    """

    name: str
    actor: Any
    log: str
    ended: Callable[[], str | None] = lambda: None

    def call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Call:
        """Start a call; ``collect`` awaits it, at most ``timeout_s`` from now."""
        return Call(self, method, getattr(self.actor, method).remote(*arguments), timeout_s)

    def stream(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Call:
        """Start a call of a generator; ``collect_streamed`` takes what it yields, until it has ended, at most ``timeout_s`` from now."""
        return Call(self, method, getattr(self.actor, method).options(num_returns="streaming").remote(*arguments), timeout_s)


@dataclass(frozen=True, slots=True)
class Call:
    """A pending call.

    Attributes:
        timeout_s: seconds after ``begun_s``, an instant of ``time.monotonic``, at which it counts as unanswered; None for a call without
            a deadline.
    """

    worker: Worker
    method: str
    reference: Any
    timeout_s: float | None = None
    begun_s: float = field(default_factory=time.monotonic)


class WorkerDiedError(RlsyncError):
    """A worker process is gone."""


class WorkerSilentError(RlsyncError):
    """A worker process did not answer a call in time: it is stopped or stuck, as calls with a deadline end by themselves before.

    Attributes:
        worker: its name.
    """

    def __init__(self, message: str, worker: str) -> None:
        super().__init__(message)
        self.worker = worker

    def __reduce__(self) -> tuple[object, ...]:
        return WorkerSilentError, (str(self), self.worker)


def collect(calls: Sequence[Call], on_result: Callable[[Call], None] = lambda call: None) -> list[Any]:
    """The results of all calls, in order; ``on_result`` is called for each result as it arrives. Raises as ``_follow``."""
    results: dict[Any, Any] = {}

    def take(call: Call) -> bool:
        results[call.reference] = ray.get(call.reference)
        on_result(call)
        return True

    _follow(calls, take)
    return [results[call.reference] for call in calls]


def collect_streamed(calls: Sequence[Call], on_items: Callable[[int, list[Any]], None]) -> None:
    """Hand over what the calls of ``Worker.stream`` yield, as it arrives: the number of the call, and what has come of it since.
    Raises as ``_follow``."""
    numbers = {call.reference: number for number, call in enumerate(calls)}

    def take(call: Call) -> bool:
        items: list[Any] = []
        has_ended = False
        while not has_ended and (not items or ray.wait([call.reference], timeout=0)[0]):
            try:
                items.append(ray.get(next(call.reference)))
            except StopIteration:
                has_ended = True
        if items:
            on_items(numbers[call.reference], items)
        return has_ended

    _follow(calls, take)


def _follow(calls: Sequence[Call], take: Callable[[Call], bool]) -> None:
    """Call ``take`` for a call that has something to give, until it says of each that it has ended.

    Raises one error as soon as a call failed and the others had a moment to say more: a process that died comes before an
    error of ours, and that before any other, because ranks fail in many ways when one of them is lost. A call whose deadline has passed
    has failed too.
    """
    pending = {call.reference: call for call in calls}
    failures: list[RlsyncError] = []
    deadline = float("inf")
    ended_s: dict[Any, float] = {}
    while pending:
        left = deadline - time.monotonic()
        done, _ = ray.wait(list(pending), num_returns=1, timeout=min(max(0.0, left), _LOOK_S))
        if not done and left <= _LOOK_S:
            break
        silent = _unanswered(pending)
        if silent:
            failures += silent
            deadline = min(deadline, time.monotonic() + _SETTLE_S)
        if not done:
            unnoticed = _unnoticed_ends(pending, ended_s)
            if unnoticed:
                failures += unnoticed
                deadline = min(deadline, time.monotonic())
            continue
        call = pending[done[0]]
        try:
            if take(call):
                del pending[done[0]]
        except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
            del pending[done[0]]
            failures.append(_translated(call, error))
            deadline = min(deadline, time.monotonic() + _SETTLE_S)
    if failures:
        raise min(failures, key=_how_far_from_the_cause)


def _unanswered(pending: dict[Any, Call]) -> list[RlsyncError]:
    """What to raise of calls whose deadlines have passed, taken from ``pending``; not of one whose answer waits to be taken."""
    found: list[RlsyncError] = []
    for reference, call in tuple(pending.items()):
        late = call.timeout_s is not None and time.monotonic() - call.begun_s >= call.timeout_s
        if late and not ray.wait([reference], timeout=0)[0]:
            del pending[reference]
            found.append(
                WorkerSilentError(
                    f"{call.worker.name} did not answer {call.method} within {call.timeout_s:g} s: its process is stopped or stuck\n"
                    f"its log: {call.worker.log}",
                    call.worker.name,
                )
            )
    return found


def _unnoticed_ends(pending: dict[Any, Call], ended_s: dict[Any, float]) -> list[RlsyncError]:
    """What to raise of calls whose processes ended ``_SETTLE_S`` ago, taken from ``pending``: Ray, which knows more, has not said so.
    ``ended_s`` keeps when each was seen to have ended."""
    found: list[RlsyncError] = []
    for reference, call in tuple(pending.items()):
        how, now = call.worker.ended(), time.monotonic()
        if how is not None and now - ended_s.setdefault(reference, now) >= _SETTLE_S:
            del pending[reference]
            found.append(WorkerDiedError(f"{call.worker.name} did not come up for {call.method}: its {how}\nits log: {call.worker.log}"))
    return found


def collect_answered(calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """The results of the calls that succeed within ``timeout_s``; others are left out. For optional information; raises nothing."""
    done, _ = ray.wait([call.reference for call in calls], num_returns=len(calls), timeout=timeout_s)
    results = []
    for reference in done:
        try:
            results.append(ray.get(reference))
        except ray.exceptions.RayError:  # whoever needs the worker finds out, and says more
            continue
    return results


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
    log = Path(worker.log)
    if number is not None and log.is_dir():
        log = next(log.glob(f"worker-*-{number[1]}.err"), log)  # as Ray names it
    return WorkerDiedError(
        f"{worker.name}{process} ended during {call.method}: killed, out of memory, or crashed; its log: {log}{last_lines(log)}"
    )


def _how_far_from_the_cause(error: RlsyncError) -> int:
    if isinstance(error, WorkerDiedError):
        return 0
    return 2 if type(error) is RlsyncError else 1
