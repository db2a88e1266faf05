"""Claims about the coordinator's state machine, told message by message with a clock of the test's own."""

from __future__ import annotations

import msgspec
import pytest

from rlsync.control import messages as m
from rlsync.control.coordinator import Coordinator
from rlsync.control.roster import Expected
from rlsync.control.shares import ActorShare, RingInfo, WorkerPart, WorkerShare
from rlsync.geometry import TensorSpec
from rlsync.placement.huggingface import whole_tensors

CATALOGUE = m.Catalogue(tuple(TensorSpec(f"w{i}", "float32", (4,)) for i in range(4)), "auto")
RECORDED = m.Recorded(whole_tensors("engine e0", CATALOGUE.tensors), "direct")
RING = RingInfo("/dev/shm/ring", "ring token", num_slots=2, slot_bytes=4096)
ACTOR_SHARE = ActorShare("plan", 2, "off", ((),) * 4, ((),) * 4, ring=RING)
WORKER_SHARE = WorkerShare("plan", 2, 0, "off", (WorkerPart(0, 16, (), ()),) * 4, ring=RING)
PLANNED = m.Planned((ACTOR_SHARE,) * 2, (WORKER_SHARE,) * 2)
TIMES = m.WorkerTimes(0.1, 0.2, 0.3, 0.4, 5)
TIMEOUT_S = 10.0


class Run:
    """A coordinator of two actor ranks and engine ``e0`` with two workers, and what it has sent to each peer."""

    def __init__(self, *, connected: bool = True, engines_answer: bool = True) -> None:
        self.sent: dict[bytes, list] = {}
        expected = Expected("secret", "run", 2, {"e0": 2}, ("digest", "digest"), TIMEOUT_S, CATALOGUE)
        self.coordinator = Coordinator(expected, lambda peer, message: self.sent.setdefault(peer, []).append(message), 0.0)
        if connected:
            for rank in range(2):
                self.tell(f"a{rank}", actor(rank))
                self.tell(f"w{rank}", worker(rank))
                self.tell(f"w{rank}", RECORDED)
            self.tell("a0", PLANNED)
            for peer in ("a0", "a1", "w0", "w1"):
                self.tell(peer, m.Attached())
            if engines_answer:
                self.tell("a0", m.Answered(0, "e0", "connect"))

    def tell(self, peer: str, message: m.FromPeer, now: float = 1.0) -> None:
        self.coordinator.receive(peer.encode(), m.encode(message), now)

    def last(self, peer: str) -> m.FromCoordinator:
        return self.sent[peer.encode()][-1]

    def begin(self, version: int = 1, attempt: int = 1, now: float = 1.0) -> None:
        for rank in range(2):
            self.tell(f"a{rank}", m.Start(attempt, version), now)
        for rank in range(2):
            self.tell(f"w{rank}", m.Joined(attempt, version), now)

    def transfer(self, attempt: int = 1) -> None:
        for bucket in range(4):
            for actor_rank in range(2):
                self.tell(f"a{actor_rank}", m.Filled(attempt, bucket, 8))
            for worker_rank in range(2):
                self.tell(f"w{worker_rank}", m.Done(attempt, bucket))

    def finish(self, attempt: int = 1) -> None:
        for message in (m.Loaded(attempt, TIMES), m.Committed(attempt)):
            for rank in range(2):
                self.tell(f"w{rank}", message)
        self.tell("a0", m.Finish(attempt, b"report"))

    def error(self) -> m.Error:
        """The error that every peer has, which must be one and the same."""
        last = [self.last(peer) for peer in ("a0", "a1", "w0", "w1")]
        assert all(message == last[0] for message in last), last
        assert isinstance(last[0], m.Error)
        return last[0]


def actor(rank: int, **changes: object) -> m.ActorHello:
    hello = m.ActorHello("secret", "run", rank, 2, "here", "shm", "pids", 100 + rank, None, "digest")
    return msgspec.structs.replace(hello, **changes)


def worker(rank: int, **changes: object) -> m.WorkerHello:
    hello = m.WorkerHello("secret", "run", "e0", 0, rank, 2, "here", "shm", "pids", 200 + rank, None, "0.32.0")
    return msgspec.structs.replace(hello, **changes)


def test_workers_are_told_the_tensors_and_everybody_its_share() -> None:
    run = Run()
    assert run.sent[b"w0"] == [CATALOGUE, m.Share(worker=WORKER_SHARE), m.Connected()]
    assert run.sent[b"a1"] == [m.Share(actor=ACTOR_SHARE), m.Connected()]
    survey = run.sent[b"a0"][0]
    assert isinstance(survey, m.Surveyed)
    assert [h.actor_rank for h in survey.actors] == [h.worker_rank for h in survey.workers] == [0, 1]
    assert survey.records == (RECORDED, RECORDED)
    assert run.coordinator.phase == "idle"


def test_actor_ranks_are_connected_when_the_engines_have_answered_and_not_before() -> None:
    """A core that is stuck does not keep its workers from attaching."""
    run = Run(engines_answer=False)
    assert (run.coordinator.phase, run.last("w1")) == ("connect", m.Connected())
    assert run.last("a1") == m.Share(actor=ACTOR_SHARE)
    run.coordinator.expire(TIMEOUT_S)
    assert (run.error().phase, run.error().engine) == ("connect", "e0")
    assert "engine e0, whose workers are connected and whose core does not say so" in run.error().cause


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


def test_a_worker_that_fails_before_the_actor_is_heard_to_start_fails_the_sync() -> None:
    run = Run()
    run.tell("w1", m.Joined(1, 1))
    run.tell("w1", m.Failed(1, "begin", "older than what it has"))
    for rank in range(2):
        run.tell(f"a{rank}", m.Start(1, 1))
    run.tell("w0", m.Joined(1, 1))
    assert "older than what it has" in run.error().cause


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


@pytest.mark.parametrize("call", ["pause", "update"])
def test_an_engine_that_does_not_go_on_after_the_commit_is_named(call: str) -> None:
    run = Run()
    run.begin()
    run.tell("a0", m.Answered(1, "e0", call))
    run.transfer()
    for message in (m.Loaded(1, TIMES), m.Committed(1)):
        for rank in range(2):
            run.tell(f"w{rank}", message)
    assert run.coordinator.phase == "resume"
    run.coordinator.expire(1.0 + TIMEOUT_S)
    assert (run.error().phase, run.error().engine) == ("resume", "e0")
    assert f"whose last answer was to {call}" in run.error().cause


def test_actor_rank_0_is_named_when_every_engine_is_resumed() -> None:
    run = Run()
    run.begin()
    run.tell("a0", m.Answered(1, "e0", "resume"))
    run.transfer()
    for message in (m.Loaded(1, TIMES), m.Committed(1)):
        for rank in range(2):
            run.tell(f"w{rank}", message)
    run.coordinator.expire(1.0 + TIMEOUT_S)
    assert (run.error().phase, run.error().engine) == ("resume", None)
    assert "actor rank 0" in run.error().cause


def test_only_actor_rank_0_plans_and_only_once() -> None:
    for peer in ("a1", "a0"):
        run = Run()
        run.tell(peer, PLANNED)
        assert "sent shares" in run.error().cause


@pytest.mark.parametrize(
    ("peer", "hello", "words"),
    [
        ("a1", actor(1, digest="another"), ("digest", "another", "actor rank 1")),
        ("a1", actor(1, world_size=3), ("3 actor ranks", "counts 2")),
        ("w1", worker(1, engine_id="e7"), ("nobody expects", "e0")),
        ("w1", worker(0, world_size=4, worker_rank=3), ("world size 4", "2 workers")),
    ],
)
def test_a_peer_that_does_not_fit_fails_the_connection_for_all(peer: str, hello: m.FromPeer, words: tuple[str, ...]) -> None:
    run = Run(connected=False)
    run.tell("a0", actor(0))
    run.tell(peer, hello)
    error = run.last("a0")
    assert isinstance(error, m.Error)
    assert error.phase == "connect"
    assert all(word in error.cause for word in words), error.cause
    assert run.last(peer) == error


@pytest.mark.parametrize("hello", [worker(0, token="guess"), worker(0, run_id="older"), actor(0)])
def test_a_stranger_is_turned_away_and_disturbs_nobody(hello: m.FromPeer) -> None:
    run = Run(connected=False)
    run.tell("a0", actor(0))
    run.tell("stranger", hello)
    assert isinstance(run.last("stranger"), m.Error)
    run.tell("stranger", m.Attached())
    run.coordinator.receive(b"nobody", b"\x00garbage", 1.0)
    assert run.coordinator.phase == "connect"
    assert b"a0" not in run.sent


def recorded(run: Run, first: m.Recorded, second: m.Recorded) -> None:
    for rank, record in enumerate((first, second)):
        run.tell(f"a{rank}", actor(rank))
        run.tell(f"w{rank}", worker(rank))
        run.tell(f"w{rank}", record)


def test_names_are_judged_on_the_union_of_an_engines_workers() -> None:
    run = Run(connected=False)
    replace = msgspec.structs.replace
    recorded(run, replace(RECORDED, unused_names=("w0", "w1")), replace(RECORDED, unused_names=("w2",)))
    assert isinstance(run.last("a0"), m.Surveyed)


def test_names_that_no_worker_takes_and_findings_are_one_error() -> None:
    run = Run(connected=False)
    replace = msgspec.structs.replace
    recorded(
        run, replace(RECORDED, unused_names=("w0", "w1"), findings=("nothing fills norm.weight",)), replace(RECORDED, unused_names=("w1",))
    )
    assert "takes no tensor named w1" in run.error().cause
    assert "norm.weight" in run.error().cause


def test_a_plan_that_cannot_be_made_is_everybodys_error() -> None:
    run = Run(connected=False)
    recorded(run, RECORDED, RECORDED)
    run.tell("a0", m.Failed(0, "connect", "no source for norm.weight"))
    assert "no source for norm.weight" in run.error().cause


def test_checksums_reach_the_workers_of_their_stream_once() -> None:
    run = Run()
    run.begin()
    mine, other = m.Sum(0, 7, 123), m.Sum(1, 7, 456)
    run.tell("a0", m.Filled(1, 0, 8, (mine,)))
    run.tell("a1", m.Filled(1, 0, 8, (other,)))
    assert run.last("w0") == run.last("w1") == m.Ready(1, 1, (mine,))
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(1, 1, 8))
    assert run.last("w0") == m.Ready(1, 2)


def test_a_bucket_is_ready_when_every_filler_has_filled_it() -> None:
    run = Run()
    run.begin()
    run.tell("a0", m.Filled(1, 0, 8))
    assert run.last("w0") == m.Ready(1, 0)
    run.tell("a1", m.Filled(1, 0, 8))
    assert run.last("w0") == run.last("w1") == m.Ready(1, 1)


def test_a_slot_is_writable_again_when_every_worker_is_done_with_it() -> None:
    run = Run()
    run.begin()
    for rank in range(2):
        run.tell(f"a{rank}", m.Filled(1, 0, 8))
    run.tell("w0", m.Done(1, 0))
    assert run.last("a0") == m.Writable(1, 2)
    run.tell("w1", m.Done(1, 0))
    assert run.last("a0") == run.last("a1") == m.Writable(1, 3)


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
    run.tell("w1", m.Committed(1))
    assert run.last("a0") == m.AllCommitted(1, (TIMES, other), ((), ()))
    run.tell("a0", m.Finish(1, b"report"))
    assert run.last("a1") == m.Finished(1, b"report")
    assert (run.coordinator.phase, run.coordinator.version, run.coordinator.deadline) == ("idle", 1, None)


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


def test_versions_only_grow() -> None:
    run = Run()
    run.begin(version=5)
    run.transfer()
    run.finish()
    run.tell("a0", m.Start(2, 5))
    assert "not newer than 5" in run.error().cause


def test_a_failed_version_may_be_tried_again() -> None:
    run = Run()
    run.begin()
    run.tell("a1", m.Failed(1, "transfer", "boom"))
    run.begin(attempt=2)
    run.transfer(attempt=2)
    run.finish(attempt=2)
    assert (run.coordinator.phase, run.coordinator.version) == ("idle", 1)


def test_late_answers_to_a_failed_sync_are_no_answers_to_the_next() -> None:
    run = Run()
    run.begin()
    run.tell("a1", m.Failed(1, "transfer", "boom"))
    run.begin(attempt=2)
    run.tell("a0", m.Filled(1, 0, 8))
    run.tell("a1", m.Filled(2, 0, 8))
    assert run.last("w0") == m.Ready(2, 0, group=1)


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


def test_an_actor_rank_that_enters_late_learns_of_the_failure() -> None:
    run = Run()
    run.tell("a0", m.Start(1, 1))
    run.tell("a0", m.Failed(1, "begin", "boom"))
    run.tell("a1", m.Start(1, 1))
    assert run.error().cause.endswith("boom")


def test_decoding_is_strict() -> None:
    good = m.encode(m.Done(1, 2))
    assert m.decode_from_peer(good) == m.Done(1, 2)
    for bad in (
        msgspec.msgpack.encode({"type": "Done", "attempt": "1", "bucket": 2}),
        msgspec.msgpack.encode({"type": "Done", "attempt": 1, "bucket": 2, "more": 3}),
        msgspec.msgpack.encode({"type": "Commit", "attempt": 1, "version": 2}),
        b"",
    ):
        with pytest.raises(msgspec.MsgspecError):
            m.decode_from_peer(bad)


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
