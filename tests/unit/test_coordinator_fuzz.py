"""What arrives from the network cannot break the channel: bytes of any kind, and messages in any order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.coordinator import messages as m
from tests.scripted_coordinator import ACTOR_ASSIGNMENT, MANIFEST, PLANNED, RECORDED, TIMES, WORKER_ASSIGNMENT, Run, actor, worker

FROM_PEER = (
    actor(0), worker(0), RECORDED, PLANNED, m.Attached(), m.Answered(1, "e0", "sync"), m.Start(1, 1),
    m.Filled(1, 0, 8, (m.Sum(0, 1, 2**64 - 1),)), m.Filled(1, 0, 0, None),
    m.Summed(1, 0, ()), m.Joined(1, 1), m.Done(1, 0), m.Loaded(1, TIMES), m.Committed(1), m.Finish(1, b"report"),
    m.Failed(1, "transfer", "boom"), m.Goodbye(), m.State({"w": "0"}),
)  # fmt: skip
FROM_COORDINATOR = (
    MANIFEST, m.Assignment(actor=ACTOR_ASSIGNMENT), m.Assignment(worker=WORKER_ASSIGNMENT), m.Connected(), m.Writable(1, 2),
    m.Ready(1, 2, (m.Sum(0, 1, 2),)),
    m.Commit(1, 1), m.Serve(1), m.AllCommitted(1, (TIMES,)), m.Finished(1, b"report"), m.Error(attempt=1, phase="transfer", cause="boom"),
)  # fmt: skip


def decode(raw: bytes) -> list[object]:
    """What both ends make of some bytes; only msgspec's own errors are allowed."""
    made: list[object] = []
    for decoder in (m.decode_from_peer, m.decode_from_coordinator):
        try:
            made.append(decoder(raw))
        except msgspec.MsgspecError:
            made.append(None)
    return made


@pytest.mark.parametrize("message", FROM_PEER + FROM_COORDINATOR, ids=lambda x: type(x).__name__)
def test_every_message_survives_the_wire_and_only_in_its_direction(message: m.Message) -> None:
    expected = [message, None] if message in FROM_PEER else [None, message]
    assert decode(m.encode(message)) == expected


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_a_message_or_an_error(raw: bytes) -> None:
    decode(raw)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FROM_PEER + FROM_COORDINATOR), st.data())
def test_a_damaged_message_is_a_message_or_an_error(message: m.Message, data: st.DataObject) -> None:
    raw = bytearray(m.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decode(bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw))


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from([type(x).__name__ for x in FROM_PEER]),
)
def test_well_formed_values_of_other_types_are_no_messages(value: object, tag: str) -> None:
    if isinstance(value, dict):
        value = {**value, "type": tag}
    for made in decode(msgspec.msgpack.encode(value)):
        assert made is None or isinstance(made, m.Message)


@pytest.mark.parametrize(
    "message",
    [
        m.Filled(1, -1, 8), m.Done(1, 2**60), m.Start(-1, 1), m.Failed(1, "transfer", "x" * 2**17), worker(0, engine_id="e" * 2000),
        actor(0, actor_rank=-3), m.Filled(1, 0, 8, (m.Sum(-1, 0, 0),)),
    ],
    ids=repr,
)  # fmt: skip
def test_sizes_are_bounded(message: m.Message) -> None:
    assert decode(m.encode(message)) == [None, None]


def test_a_stranger_is_not_read_beyond_the_size_of_a_hello() -> None:
    run = Run(connected=False)
    # It would be let in: its token is the right one.
    run.coordinator.receive(b"stranger", m.encode(worker(0, gpu_uuid="x" * m.MAX_HELLO_BYTES)), 1.0)
    assert run.coordinator.process_of(b"stranger") is None and run.sent == {}
    run.coordinator.receive(b"stranger", m.encode(worker(0, vllm_version="x" * 900)), 1.0)
    assert run.coordinator.process_of(b"stranger") == (200, "pids")


peers = st.sampled_from(["a0", "a1", "w0", "w1"])
numbers = st.integers(0, 3)
told = st.one_of(
    st.builds(m.Start, numbers, numbers),
    st.builds(m.Joined, numbers, numbers),
    st.builds(m.Filled, numbers, numbers, numbers, st.none() | st.tuples(st.builds(m.Sum, numbers, numbers, numbers))),
    st.builds(m.Summed, numbers, numbers, st.tuples(st.builds(m.Sum, numbers, numbers, numbers))),
    st.builds(m.Done, numbers, numbers),
    st.builds(m.Loaded, numbers, st.just(TIMES)),
    st.builds(m.Committed, numbers),
    st.builds(m.Answered, numbers, st.sampled_from(["e0", "e1"]), st.sampled_from(["connect", "sync"])),
    st.builds(m.Finish, numbers, st.just(b"report")),
    st.builds(m.Failed, numbers, st.sampled_from(["begin", "transfer"]), st.just("boom")),
    st.sampled_from([m.Attached(), m.Goodbye(), RECORDED, PLANNED]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(peers, told), max_size=40), st.booleans())
def test_no_order_of_messages_breaks_the_coordinator_or_commits_what_is_not_complete(told: list, connected: bool) -> None:
    run = Run(connected=connected)
    for peer, message in told:
        before = {p: list(sent) for p, sent in run.sent.items()}
        run.tell(peer, message)
        commits = [x for p, sent in run.sent.items() for x in sent[len(before.get(p, ())) :] if isinstance(x, m.Commit)]
        if commits:
            progress = run.coordinator._sync
            assert progress is not None
            assert len(progress.loaded) == 2 and set(progress.done.values()) == {4} and set(progress.filled.values()) == {4}
    run.coordinator.expire(1e9)
    assert run.coordinator.phase in ("idle", "failed")
