"""Claims about the course of a sync as the coordinator leads it, from the first start to the commit."""

from __future__ import annotations

import msgspec
import pytest

from rlsync.coordinator import messages as m
from tests.scripted_coordinator import TIMES, Run


def test_a_worker_may_join_before_the_actor_is_heard_to_start_but_no_other_attempt_than_the_next() -> None:
    """What two peers send comes in any order, and rank 0 calls its engines when it has sent its Start."""
    run = Run()
    for attempt in (1, 2):
        run.tell("w0", m.Joined(attempt, attempt))
        run.tell("w1", m.Joined(attempt, attempt))
        run.tell("a0", m.Start(attempt, attempt))
        run.tell("a1", m.Start(attempt, attempt))
        assert run.coordinator.phase == "transfer"
        run.transfer(attempt)
        run.finish(attempt)
    for attempt in (1, 4):
        run.tell("w0", m.Joined(attempt, 3))
        refusal = run.last("w0")
        assert isinstance(refusal, m.Error) and f"joined attempt {attempt}, which the actor has not started" in refusal.cause


def test_no_worker_hears_of_a_bucket_before_all_have_joined_from_engines_that_are_paused() -> None:
    run = Run()
    for rank in range(2):
        run.tell(f"a{rank}", m.Start(1, 1))
    run.tell("w0", m.Joined(1, 1))
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(1, 0, 8, (m.Sum(0, 0, 7),)))
    assert (run.last("w0"), run.coordinator.phase) == (m.Connected(), "begin")
    run.tell("w1", m.Joined(1, 1))
    heard = run.last("w0")
    assert isinstance(heard, m.Ready)
    assert (heard.buckets_ready, len(heard.sums), run.coordinator.phase) == (1, 2, "transfer")


def test_checksums_reach_the_workers_of_their_stream_once() -> None:
    run = Run()
    run.begin()
    mine, other = m.Sum(0, 7, 123), m.Sum(1, 7, 456)
    run.tell("a0", m.Filled(1, 0, 8, (mine,)))
    run.tell("a1", m.Filled(1, 0, 8, (other,)))
    assert run.last("w0") == run.last("w1") == m.Ready(1, 1, (mine,), buckets_summed=1)
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(1, 1, 8))
    assert run.last("w0") == m.Ready(1, 2, buckets_summed=2)


def test_a_bucket_is_readable_before_its_checksums_are_there() -> None:
    run = Run()
    run.begin()
    mine = m.Sum(0, 7, 123)
    run.tell("a0", m.Filled(1, 0, 0, None))
    run.tell("a1", m.Filled(1, 0, 8))
    assert run.last("w0") == m.Ready(1, 1)
    run.tell("a0", m.Summed(1, 0, (mine,)))
    assert run.last("w0") == m.Ready(1, 1, (mine,), buckets_summed=1)


@pytest.mark.parametrize("wrong", [m.Summed(1, 0, ()), m.Summed(1, 1, ()), m.Filled(1, 1, 0)])
def test_checksums_that_do_not_follow_their_bucket_fail_the_sync(wrong: m.FromPeer) -> None:
    run = Run()
    run.begin()
    if wrong.bucket:
        run.tell("a0", m.Filled(1, 0, 0, None))
    run.tell("a0", wrong)
    assert ("summed up" in run.error().cause, run.error().phase) == (True, "transfer")


def test_a_bucket_is_ready_when_every_filler_has_filled_it() -> None:
    run = Run()
    run.begin()
    run.tell("a0", m.Filled(1, 0, 8))
    assert run.last("w0") == m.Ready(1, 0)
    run.tell("a1", m.Filled(1, 0, 8))
    assert run.last("w0") == run.last("w1") == m.Ready(1, 1, buckets_summed=1)


def test_a_slot_is_writable_again_when_every_worker_is_done_with_it() -> None:
    run = Run()
    run.begin()
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(1, 0, 8))
    run.tell("w0", m.Done(1, 0))
    assert run.last("a0") == m.Writable(1, 2, all_joined=True)
    run.tell("w1", m.Done(1, 0))
    assert run.last("a0") == run.last("a1") == m.Writable(1, 3, all_joined=True)


def test_the_commit_comes_after_every_worker_has_loaded_everything() -> None:
    run = Run()
    run.begin()
    run.transfer()
    other = msgspec.structs.replace(TIMES, pull_s=9.0)
    run.tell("w0", m.Loaded(1, TIMES))
    assert not isinstance(run.last("w0"), m.Commit)
    run.tell("w1", m.Loaded(1, other))
    assert run.last("w0") == run.last("w1") == m.Commit(1, 1)
    run.tell("w0", m.Committed(1))
    assert run.last("w0") == m.Commit(1, 1), "an engine may not serve before the workers of all have committed"
    run.tell("w1", m.Committed(1))
    assert run.last("w0") == run.last("w1") == m.Serve(1)
    assert run.last("a0") == m.AllCommitted(1, (TIMES, other), ((), ()))
    run.tell("a0", m.Finish(1, b"report"))
    assert run.last("a1") == m.Finished(1, b"report")
    assert (run.coordinator.phase, run.coordinator.version, run.coordinator.deadline_s) == ("idle", 1, None)


def test_versions_only_grow() -> None:
    run = Run()
    run.begin(version=5)
    run.transfer()
    run.finish()
    run.tell("a0", m.Start(2, 5))
    assert "not newer than 5" in run.error().cause


def test_buckets_that_are_not_sent_are_told_of_at_once() -> None:
    """Thousands of experts lie in hundreds of them. They take no slots, so that those behind them may be filled at once."""
    run = Run(num_frozen=3)
    run.begin(1)
    assert run.last("a0") == m.Writable(1, 2, all_joined=True)
    run.transfer(1)
    run.finish(1)
    for rank in range(2):
        run.tell(f"a{rank}", m.Start(2, 2, without_frozen=True))
        run.tell(f"w{rank}", m.Joined(2, 2))
    assert run.last("a1") == m.Writable(2, 4, without_frozen=True, all_joined=True)
    sums = tuple(m.Sum(0, region, region) for region in range(3))
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(2, 2, 0, None))
        run.tell(f"a{rank}", m.Summed(2, 2, sums if rank else ()))
    assert run.last("w0") == m.Ready(2, 3, sums, without_frozen=True, buckets_summed=3)
    for bucket, nbytes in ((2, 0), (3, 8)):
        for rank in range(2 if nbytes else 0):
            run.tell(f"a{rank}", m.Filled(2, bucket, nbytes))
        for rank in range(2):
            run.tell(f"w{rank}", m.Done(2, bucket))
    run.finish(2)
    assert (run.coordinator.phase, run.coordinator.version) == ("idle", 2)


@pytest.mark.parametrize(
    ("without", "message", "said"),
    [
        (False, m.Filled(2, 1, 0), "filled bucket 1, its turn is 0 and 2 are writable"),
        (True, m.Filled(2, 3, 0), "filled bucket 3, its turn is 0 and 4 are writable"),
        (True, m.Done(2, 2), "finished bucket 2, its turn is 0 and 0 are ready"),
    ],
)
def test_no_message_speaks_for_buckets_that_are_sent(without: bool, message: m.FromPeer, said: str) -> None:
    run = Run(num_frozen=3)
    run.begin(1)
    run.transfer(1)
    run.finish(1)
    for rank in range(2):
        run.tell(f"a{rank}", m.Start(2, 2, without_frozen=without))
        run.tell(f"w{rank}", m.Joined(2, 2))
    run.tell("w0" if isinstance(message, m.Done) else "a0", message)
    assert said in run.error().cause


def test_nobody_fills_before_rank_0_has_said_whether_what_is_frozen_is_sent() -> None:
    """Its word counts, whatever the other ranks believe."""
    run = Run()
    for attempt, without in ((1, False), (2, True)):
        before = len(run.sent[b"a1"])
        run.tell("a1", m.Start(attempt, attempt, not without))
        assert run.sent[b"a1"][before:] == []
        run.tell("a0", m.Start(attempt, attempt, without))
        assert run.last("a0") == run.last("a1") == m.Writable(attempt, 2, without_frozen=without)
        for rank in range(2):
            run.tell(f"w{rank}", m.Joined(attempt, attempt))
        assert run.last("w0") == m.Ready(attempt, 0, without_frozen=without)
        run.transfer(attempt)
        run.finish(attempt)
