"""Claims about what the coordinator makes of failures, deaths and deadlines: one error for all, and none of the next sync."""

from __future__ import annotations

import pytest

from rlsync.coordinator import messages as m
from tests.scripted_coordinator import TIMEOUT_S, TIMES, Run


def test_a_worker_that_fails_before_the_actor_is_heard_to_start_fails_the_sync() -> None:
    run = Run()
    run.tell("w1", m.Joined(1, 1))
    run.tell("w1", m.Failed(1, "begin", "older than what it has"))
    for rank in range(2):
        run.tell(f"a{rank}", m.Start(1, 1))
    run.tell("w0", m.Joined(1, 1))
    assert "older than what it has" in run.error().cause


def test_an_engine_that_does_not_go_on_after_the_commit_is_named() -> None:
    run = Run()
    run.begin()
    run.transfer()
    for message in (m.Loaded(1, TIMES), m.Committed(1)):
        for rank in range(2):
            run.tell(f"w{rank}", message)
    assert run.coordinator.phase == "resume"
    run.coordinator.expire(1.0 + TIMEOUT_S)
    assert (run.error().phase, run.error().engine) == ("resume", "e0")
    assert "engine e0 worker 0" in run.error().cause and "to end its engine's update and resume it" in run.error().cause


def test_actor_rank_0_is_named_when_every_engine_is_resumed() -> None:
    run = Run()
    run.begin()
    run.tell("a0", m.Answered(1, "e0", "sync"))
    run.transfer()
    for message in (m.Loaded(1, TIMES), m.Committed(1)):
        for rank in range(2):
            run.tell(f"w{rank}", message)
    run.coordinator.expire(1.0 + TIMEOUT_S)
    assert (run.error().phase, run.error().engine) == ("resume", None)
    assert "actor rank 0" in run.error().cause


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ("a1", m.Failed(1, "transfer", "boom", bucket=0)),
        ("w1", m.Failed(1, "transfer", "boom", bucket=0)),
        ("w1", m.Goodbye()),
        ("a0", m.Filled(1, 3, 8)),
        ("w0", m.Done(1, 2)),
        ("w0", m.Loaded(1, TIMES)),
        ("w0", m.Start(1, 1)),
        ("a0", m.Joined(1, 1)),
        ("a1", m.Start(1, 2)),
    ],
)
def test_every_failure_reaches_every_peer_as_one_error(peer: str, message: m.FromPeer) -> None:
    run = Run()
    run.begin()
    run.tell(peer, message)
    error = run.error()
    assert (error.version, error.attempt) == (1, 1)
    assert peer[1] in error.cause


def test_who_left_between_syncs_is_not_said_to_be_dead() -> None:
    """As a worker of an engine that another actor has connected to."""
    for leave, words in (
        (lambda run: run.tell("w1", m.Goodbye()), "closed its connection"),
        (lambda run: run.coordinator.lose(b"w1"), "has ended"),
    ):
        run = Run()
        leave(run)
        run.begin()
        assert words in run.error().cause and "connect() anew" in run.error().cause


def test_a_death_is_an_error_at_once_and_blames_the_dead() -> None:
    run = Run()
    run.begin()
    run.coordinator.lose(b"w1")
    assert run.error().engine == "e0"
    assert "pid 201" in run.error().cause


def test_a_death_between_syncs_fails_the_next_one() -> None:
    run = Run()
    run.begin()
    run.transfer()
    run.finish()
    run.coordinator.lose(b"w1")
    assert run.coordinator.phase == "idle"
    run.tell("a0", m.Start(2, 2))
    assert "engine e0 worker 1" in run.error().cause


@pytest.mark.parametrize(
    ("told", "phase", "words"),
    [
        ([], "begin", ("actor rank 1", "enter sync")),
        ([("a1", m.Start(1, 1)), ("w0", m.Joined(1, 1))], "begin", ("engine e0 worker 1", "begin its update")),
        ([("a1", m.Start(1, 1)), ("w0", m.Joined(1, 1)), ("w1", m.Joined(1, 1))], "transfer", ("actor rank 0", "fill bucket 0")),
        (
            [("a1", m.Start(1, 1)), ("w0", m.Joined(1, 1)), ("w1", m.Joined(1, 1)), ("a1", m.Filled(1, 0, 0, None))],
            "transfer",
            ("actor rank 1", "sum up bucket 0", "actor rank 0", "fill bucket 0"),
        ),
    ],
)
def test_a_deadline_names_whom_it_waited_for(told: list, phase: str, words: tuple[str, ...]) -> None:
    run = Run()
    run.tell("a0", m.Start(1, 1))
    for peer, message in told:
        run.tell(peer, message)
    run.coordinator.expire(1.0 + TIMEOUT_S - 0.01)
    assert run.coordinator.phase == phase
    run.coordinator.expire(1.0 + TIMEOUT_S)
    assert run.error().phase == phase
    assert all(word in run.error().cause for word in words), run.error().cause


def test_a_worker_that_does_not_load_is_named_with_its_bucket() -> None:
    run = Run()
    run.begin()
    for bucket in range(2):
        for rank in range(2):
            run.tell(f"a{rank}", m.Filled(1, bucket, 8))
    run.tell("w0", m.Done(1, 0))
    run.tell("w0", m.Done(1, 1))
    run.tell("w1", m.Done(1, 0))
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(1, 2, 8))
    run.coordinator.expire(100.0)
    assert (run.error().engine, run.error().bucket) == ("e0", 1)
    assert "worker 1" in run.error().cause
    assert "load bucket 1" in run.error().cause


def test_late_answers_to_a_failed_sync_are_no_answers_to_the_next() -> None:
    run = Run()
    run.begin()
    run.tell("a1", m.Failed(1, "transfer", "boom"))
    run.begin(attempt=2)
    run.tell("a0", m.Filled(1, 0, 8))
    run.tell("a1", m.Filled(2, 0, 8))
    assert run.last("w0") == m.Ready(2, 0, group=1, verifies_all=True)


def test_a_failed_sync_takes_its_group_along_and_a_complete_one_keeps_it() -> None:
    run = Run()
    for attempt, outcome, group in ((1, "complete", 0), (2, "failed", 0), (3, "failed", 1), (4, "complete", 2), (5, "complete", 2)):
        run.begin(version=attempt, attempt=attempt)
        for peer in ("a0", "a1", "w0", "w1"):
            assert run.last(peer).group == group
        if outcome == "failed":
            run.tell("w1", m.Failed(attempt, "transfer", "boom"))
        else:
            run.transfer(attempt)
            run.finish(attempt)


def test_whoever_sums_up_is_told_to_look_at_everything_in_syncs_that_follow_one_that_did_not_commit() -> None:
    run = Run()
    for attempt, outcome, verifies_all in ((1, "failed", False), (2, "failed", True), (3, "complete", True), (4, "complete", False)):
        run.begin(version=attempt, attempt=attempt)
        assert [run.last(peer).verifies_all for peer in ("a0", "a1", "w0", "w1")] == [verifies_all] * 4
        if outcome == "failed":
            run.tell("w1", m.Failed(attempt, "verify", "boom"))
        else:
            run.transfer(attempt)
            run.finish(attempt)


def test_an_actor_rank_that_enters_late_learns_of_the_failure() -> None:
    run = Run()
    run.tell("a0", m.Start(1, 1))
    run.tell("a0", m.Failed(1, "begin", "boom"))
    run.tell("a1", m.Start(1, 1))
    assert run.error().cause.endswith("boom")


def test_a_rank_that_is_late_for_a_sync_that_failed_does_not_fail_the_next_one() -> None:
    """It has been told how the first one ended, and comes to the next one."""
    run = Run()
    run.tell("a0", m.Start(1, 1))
    run.tell("a0", m.Failed(1, "begin", "boom"))
    assert "boom" in run.error().cause
    run.tell("a0", m.Start(2, 1))
    run.tell("a1", m.Start(1, 1))
    assert run.coordinator.phase == "begin"
    run.begin(attempt=2)
    run.transfer(attempt=2)
    run.finish(attempt=2)
    assert (run.coordinator.phase, run.coordinator.version) == ("idle", 1)


def test_a_failed_version_may_be_tried_again() -> None:
    run = Run()
    run.begin()
    run.tell("a1", m.Failed(1, "transfer", "boom"))
    run.begin(attempt=2)
    run.transfer(attempt=2)
    run.finish(attempt=2)
    assert (run.coordinator.phase, run.coordinator.version) == ("idle", 1)
