"""Claims about calls beside a waiting thread: what they leave alive."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from functools import partial

import pytest

from rlsync.transport.tasks import Lane, Outcome, Tasks, Threads


class Large:
    """Stands for a group, a ring, buckets."""


def use(large: Large, fails: bool) -> None:
    if fails:
        raise RuntimeError("in use")


@pytest.fixture
def no_collections():
    gc.disable()
    yield
    gc.enable()


def in_lane(tasks: Tasks, call: Callable[[], None]) -> Lane:
    lane = Lane(lambda: None)
    lane.submit(tasks, "key", call)
    assert lane.wait_idle(5)
    return lane


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("run", [lambda tasks, call: tasks.run("key", call), in_lane], ids=["run", "lane"])
def test_a_call_that_has_ended_keeps_nothing_alive(no_collections: None, run: Callable[..., object], fails: bool) -> None:
    """Not even one that failed, with its traceback; a worker at rest runs no collection."""
    large, tasks = Large(), Tasks()
    alive = weakref.ref(large)

    def call(large: Large = large) -> None:
        use(large, fails)

    kept = run(tasks, call)
    del large, call
    (outcome,) = tasks.finished()
    assert (outcome.error is not None) is fails
    del outcome
    assert alive() is None
    del kept


def test_an_error_that_somebody_keeps_keeps_nothing_else(no_collections: None) -> None:
    """As vLLM does with the error of a call until the next one comes."""
    large, tasks = Large(), Tasks()
    alive = weakref.ref(large)

    def call(large: Large) -> None:
        try:
            use(large, True)
        except RuntimeError as error:
            raise ConnectionError("it broke") from error

    tasks.run("key", partial(call, large))
    del large
    (outcome,) = tasks.finished()
    kept = outcome.error
    assert kept is not None and alive() is None
    said = "".join(traceback.format_exception(kept))
    assert "it broke" in said and "in use" in said and "in call" in said


def test_an_outcome_that_nobody_takes_goes_with_its_tasks(no_collections: None) -> None:
    tasks, large = Tasks(), Large()
    gone = [weakref.ref(tasks), weakref.ref(large)]
    tasks.run(large, partial(use, large, True))
    del large, tasks
    assert [ref() for ref in gone] == [None, None]


def test_a_lane_begins_nothing_that_was_forgotten_and_goes_on_with_the_next() -> None:
    lane, former, tasks, ran = Lane(lambda: None), Tasks(), Tasks(), []
    begun, gate = threading.Event(), threading.Event()

    def running() -> None:
        begun.set()
        gate.wait()

    lane.submit(former, "running", running)
    lane.submit(former, "waiting", lambda: ran.append("waiting"))
    assert begun.wait(60)
    lane.forget(former, 0.01)
    lane.submit(tasks, "next", lambda: ran.append("next"))
    gate.set()
    assert lane.wait_idle(60.0)
    assert ran == ["next"]
    assert [outcome.key for outcome in former.finished()] == ["running"]
    lane.stop()


class SetLate(threading.Event):
    """Calls ``before_set`` once before it is set."""

    before_set: Callable[[], None] | None = None

    def set(self) -> None:
        if self.before_set is not None:
            before, self.before_set = self.before_set, None
            before()
        super().set()


def test_a_lane_is_not_idle_with_a_call_that_was_submitted_as_the_last_one_ended() -> None:
    """Slots of a call that may still run would be handed to the next sync."""
    lane, tasks, gate = Lane(lambda: None), Tasks(), threading.Event()
    submits = threading.Thread(target=lambda: lane.submit(tasks, "next", gate.wait), daemon=True)
    lane._idle = idle = SetLate()
    idle.set()

    def submit_meanwhile() -> None:
        submits.start()
        submits.join(0.5)

    idle.before_set = submit_meanwhile
    lane.submit(tasks, "last", lambda: None)
    while submits.ident is None:
        time.sleep(0.01)
    submits.join(60)
    assert not lane.wait_idle(0.5)
    gate.set()
    assert lane.wait_idle(60)
    lane.stop()


def test_calls_that_follow_each_other_end_with_the_first_that_fails_and_with_their_tasks() -> None:
    for failing, ended, wanted in ((None, False, [0, 1, 2]), (1, False, [0, 1]), (None, True, [0])):
        tasks, seen = Tasks(), list[int]()

        def call(number: int, tasks: Tasks = tasks, seen: list[int] = seen, failing: int | None = failing, ended: bool = ended) -> None:
            seen.append(number)
            if ended:
                tasks.end()
            if number == failing:
                raise RuntimeError

        steps = [(number, partial(call, number)) for number in range(3)]
        tasks.spawn(*steps[0], *steps[1:]).join(60)
        outcomes = tasks.finished()
        assert seen == [outcome.key for outcome in outcomes] == wanted
        assert [outcome.error is None for outcome in outcomes] == [number != failing for number in wanted]


def test_a_thread_at_rest_takes_the_next_call_and_one_that_is_stuck_keeps_its_own() -> None:
    threads, stuck = Threads("rlsync-some-calls"), threading.Event()

    def made() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "rlsync-some-calls"]

    def outcome(key: str, call: Callable[[], object]) -> Outcome:
        tasks = Tasks()
        threads.submit(tasks, key, call)
        return ended(tasks)

    first = outcome("first", threading.get_ident)
    while not threads._idle:
        time.sleep(0.01)
    second = outcome("second", threading.get_ident)
    assert (first.key, second.key) == ("first", "second") and first.result == second.result
    while not threads._idle:
        time.sleep(0.01)
    threads.submit(Tasks(), "stuck", lambda: stuck.wait(60))
    beside = outcome("beside", lambda: 1 // 0)
    assert isinstance(beside.error, ZeroDivisionError) and len(made()) == 2
    threads.stop()
    stuck.set()
    while made():
        time.sleep(0.01)


def ended(tasks: Tasks) -> Outcome:
    """Its one outcome, when it is there."""
    while not (found := tasks.finished()):
        time.sleep(0.01)
    return found[0]
