"""Claims about the coordinator's state machine, told message by message with a clock of the test's own."""

from __future__ import annotations

import msgspec
import pytest

from rlsync.control import messages as m
from rlsync.control.coordinator import Coordinator
from rlsync.control.roster import Expected

TABLE = tuple((m.BucketEntry(f"w{i}", "float32", (4,), 0),) for i in range(4))
WELCOME = m.Welcome("/dev/shm/ring", "ring token", num_slots=2, slot_bytes=4096, num_buckets=4, buckets=TABLE)
TIMEOUT_S = 10.0


class Run:
    """A coordinator of two actor ranks and engine ``e0`` with two workers, and what it has sent to each peer."""

    def __init__(self, *, connected: bool = True) -> None:
        self.sent: dict[bytes, list] = {}
        expected = Expected("secret", "run", 2, {"e0": 2}, "digest", "here", "shm", TIMEOUT_S, WELCOME)
        self.coordinator = Coordinator(expected, lambda peer, message: self.sent.setdefault(peer, []).append(message), 0.0)
        if connected:
            for rank in range(2):
                self.tell(f"a{rank}", actor(rank))
                self.tell(f"w{rank}", worker(rank))
            for peer in ("a0", "a1", "w0", "w1"):
                self.tell(peer, m.Attached())

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
        for message in (m.Loaded(attempt, 0.1, 0.2), m.Committed(attempt)):
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
    hello = m.ActorHello("secret", "run", rank, 2, "here", "shm", "pids", 100 + rank, "digest")
    return msgspec.structs.replace(hello, **changes)


def worker(rank: int, **changes: object) -> m.WorkerHello:
    hello = m.WorkerHello("secret", "run", "e0", 0, rank, 2, "here", "shm", "pids", 200 + rank, None, "0.32.0")
    return msgspec.structs.replace(hello, **changes)


def test_only_workers_are_told_the_table() -> None:
    run = Run()
    welcomes = {peer: run.sent[peer.encode()][0] for peer in ("a0", "w0")}
    assert welcomes["w0"] == WELCOME
    assert welcomes["a0"].buckets == ()
    assert run.last("a0") == m.Connected()
    assert run.coordinator.phase == "idle"


@pytest.mark.parametrize(
    ("peer", "hello", "words"),
    [
        ("a1", actor(1, digest="another"), ("digest", "another", "actor rank 1")),
        ("a1", actor(1, world_size=3), ("3 actor ranks", "counts 2")),
        ("a1", actor(1, shm_domain="elsewhere", host="there"), ("one host", "there", "here")),
        ("w1", worker(1, shm_domain="elsewhere"), ("one host", "engine e0 worker 1")),
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
    assert isinstance(run.last("a0"), m.Welcome)


def test_names_are_judged_on_the_union_of_an_engines_workers() -> None:
    run = Run(connected=False)
    for rank in range(2):
        run.tell(f"a{rank}", actor(rank))
        run.tell(f"w{rank}", worker(rank))
        run.tell(f"a{rank}", m.Attached())
    run.tell("w0", m.Attached(unused_names=("w0", "w1")))
    run.tell("w1", m.Attached(unused_names=("w2",)))
    assert run.coordinator.phase == "idle"


def test_names_that_no_worker_takes_and_parameters_that_nothing_fills_are_one_error() -> None:
    run = Run(connected=False)
    for rank in range(2):
        run.tell(f"a{rank}", actor(rank))
        run.tell(f"w{rank}", worker(rank))
        run.tell(f"a{rank}", m.Attached())
    run.tell("w0", m.Attached(unused_names=("w0", "w1"), unfilled_parameters=("norm.weight",)))
    run.tell("w1", m.Attached(unused_names=("w1",)))
    assert "takes no tensor named w1" in run.error().cause
    assert "norm.weight" in run.error().cause


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
    run.tell("w0", m.Loaded(1, 0.1, 0.2))
    assert not isinstance(run.last("w0"), m.Commit)
    run.tell("w1", m.Loaded(1, 0.3, 0.1))
    assert run.last("w0") == run.last("w1") == m.Commit(1, 1)
    run.tell("w0", m.Committed(1))
    run.tell("w1", m.Committed(1))
    assert run.last("a0") == m.AllCommitted(1, 0.3, 0.2)
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
        ("w0", m.Loaded(1, 0, 0)),
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
    assert run.last("w0") == m.Ready(2, 0)


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


def test_a_bad_table_is_refused_with_all_its_faults() -> None:
    entry = m.BucketEntry("a", "float32", (4,), 0)
    table = ((entry, m.BucketEntry("b", "float32", (1,), 6)), (entry, m.BucketEntry("c", "float3", (1,), 16)))
    with pytest.raises(ValueError) as raised:
        m.check_buckets(table)
    for words in ("a is in the table twice", "b lies at byte 6", "b overlaps", "float3"):
        assert words in str(raised.value)
