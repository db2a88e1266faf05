"""Claims about how the coordinator connects peers: who is admitted, what is planned, who is told what."""

from __future__ import annotations

import msgspec
import pytest

from rlsync.coordinator import messages as m
from tests.scripted_coordinator import ACTOR_ASSIGNMENT, MANIFEST, PLANNED, RECORDED, TIMEOUT_S, WORKER_ASSIGNMENT, Run, actor, worker


def test_workers_are_told_the_tensors_and_everybody_its_share() -> None:
    run = Run()
    assert run.sent[b"w0"] == [MANIFEST, m.Assignment(worker=WORKER_ASSIGNMENT), m.Connected()]
    assert run.sent[b"a1"] == [m.Assignment(actor=ACTOR_ASSIGNMENT), m.Connected()]
    parts = [message for message in run.sent[b"a0"] if isinstance(message, m.Reports)]
    assert [len(part.records) for part in parts] == [0, 1, 1]
    reports = parts[0].joined(parts[1]).joined(parts[2])
    assert [h.actor_rank for h in reports.actors] == [h.worker_rank for h in reports.workers] == [0, 1]
    assert reports.records == (RECORDED, RECORDED)
    assert run.coordinator.phase == "idle"


def test_actor_ranks_are_connected_when_the_engines_have_answered_and_not_before() -> None:
    """A core that is stuck does not keep its workers from attaching."""
    run = Run(engines_answer=False)
    assert (run.coordinator.phase, run.last("w1")) == ("connect", m.Connected())
    assert run.last("a1") == m.Assignment(actor=ACTOR_ASSIGNMENT)
    run.coordinator.expire(TIMEOUT_S)
    assert (run.error().phase, run.error().engine) == ("connect", "e0")
    assert "engine e0, whose workers are connected, but whose init_weight_transfer has not returned" in run.error().cause


def test_only_actor_rank_0_plans_and_only_once() -> None:
    for peer in ("a1", "a0"):
        run = Run()
        run.tell(peer, PLANNED)
        assert "sent assignments for 2 actor ranks and 2 workers in phase idle, when none are due from it" in run.error().cause


def test_shares_are_as_many_as_there_are_members_and_come_after_them() -> None:
    run = Run(connected=False)
    run.tell("a0", actor(0))
    run.tell("a0", PLANNED)
    assert "sent assignments for 2 actor ranks and 2 workers before everybody is here" in run.last("a0").cause
    run = Run(connected=False)
    recorded(run, RECORDED, RECORDED)
    for part in PLANNED.parts():
        run.tell("a0", part)
    assert run.last("a1") == m.Assignment(actor=ACTOR_ASSIGNMENT) and run.last("w1") == m.Assignment(worker=WORKER_ASSIGNMENT)
    run.tell("a0", m.Planned((), (WORKER_ASSIGNMENT,)))
    assert "sent assignments for 0 actor ranks and 1 workers while 0 and 0 have none" in run.error().cause


@pytest.mark.parametrize(
    ("peer", "hello", "words"),
    [
        ("a1", actor(1, digest="another"), ("digest", "another", "actor rank 1")),
        ("a1", actor(1, world_size=3), ("3 actor ranks", "counts 2")),
        ("w1", worker(1, engine_id="e7"), ("nobody expects", "e0")),
        ("w1", worker(1, world_size=3), ("world size 3", "announced 2 workers")),
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


def test_who_comes_when_the_connection_has_failed_hears_why_and_is_awaited_until_then() -> None:
    run = Run(connected=False)
    run.tell("a0", actor(0))
    assert not run.coordinator.is_awaited(), "as long as nothing has failed"
    run.tell("a0", m.Failed(0, "connect", "engine e0: it has no memory", engine="e0"))
    assert run.coordinator.is_awaited()
    run.tell("stranger", actor(1, token="guess"))
    assert run.coordinator.is_awaited(), "who has no token is not awaited"
    run.tell("a1", actor(1))
    assert run.last("a1") == run.last("a0") and run.last("a1").engine == "e0"
    assert not run.coordinator.is_awaited(), "workers of the engine that failed do not come"


def test_workers_of_another_engine_than_the_one_that_failed_are_awaited_until_the_time_is_over() -> None:
    for failed, awaited in ((None, True), ("e1", True), ("e0", False)):
        run = Run(connected=False)
        run.tell("a0", actor(0))
        run.tell("a1", actor(1))
        run.tell("a0", m.Failed(0, "connect", "why", engine=failed))
        assert run.coordinator.is_awaited() == awaited
    run = Run(connected=False)
    run.tell("a0", actor(0))
    run.coordinator.expire(TIMEOUT_S)
    assert isinstance(run.last("a0"), m.Error) and not run.coordinator.is_awaited(), "they had their time"
    run = Run()
    run.begin()
    run.tell("w1", m.Failed(1, "transfer", "why"))
    assert run.error() and not run.coordinator.is_awaited(), "everybody is here"


def recorded(run: Run, first: m.Recorded, second: m.Recorded) -> None:
    for rank, record in enumerate((first, second)):
        run.tell(f"a{rank}", actor(rank))
        run.tell(f"w{rank}", worker(rank))
        run.tell(f"w{rank}", record)


def test_names_are_judged_on_the_union_of_an_engines_workers() -> None:
    run = Run(connected=False)
    replace = msgspec.structs.replace
    recorded(run, replace(RECORDED, unused_names=("w0", "w1")), replace(RECORDED, unused_names=("w2",)))
    assert isinstance(run.last("a0"), m.Reports)


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


def test_a_rank_that_trains_two_of_three_tensors_of_every_expert_is_let_in() -> None:
    """Ranges as many as experts: Qwen3-30B-A3B on one rank, with adapters of the first layer of each expert alone."""
    run, frozen = Run(connected=False), tuple((3 * number + 2, 3 * number + 3) for number in range(48 * 128))
    run.tell("a0", actor(0, frozen=frozen))
    assert run.coordinator.process_of(b"a0") == (100, "pids")
