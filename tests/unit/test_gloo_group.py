"""Claims about gloo groups and packed messages themselves: real groups between threads of this process, real bytes on loopback."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import HashStore, PrefixStore, TCPStore

from rlsync.copy.cpu import CopyProgram, region
from rlsync.plan.packing import SEGMENT_ALIGNMENT, lay_out
from rlsync.transport import gloo
from rlsync.transport.ends import placed
from rlsync.transport.gloo import Group, address_towards
from rlsync.transport.p2p import steps_of, views
from rlsync.transport.rendezvous import PATIENCE, GroupError, GroupInfo, Rendezvous, barrier, enter
from tests.deadlines import ended_before, ended_by
from tests.unit.test_staging import between_layouts

HOST = "127.0.0.1"
MEMBERS = ("actor rank 0", "engine e worker 0")
TIMEOUT_S = 60.0


@pytest.fixture
def rendezvous() -> Rendezvous:
    return Rendezvous(HOST, TIMEOUT_S)


def group(rendezvous: Rendezvous, rank: int, number: int = 0, timeout_s: float = TIMEOUT_S) -> Group:
    return Group(GroupInfo(HOST, rendezvous.port, rank, MEMBERS), number, timeout_s)


def open_pair(rendezvous: Rendezvous, number: int = 0) -> list[Group]:
    pair = [group(rendezvous, rank, number) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Group.open, pair))
    return pair


def test_a_message_arrives_and_a_group_serves_many(rendezvous: Rendezvous) -> None:
    sender, receiver = open_pair(rendezvous)
    for bucket in range(5):
        message, found = torch.randint(0, 255, (100_000,), dtype=torch.uint8), torch.zeros(100_000, dtype=torch.uint8)
        sending, receiving = sender.send(message, 1, bucket), receiver.receive(found, 0, bucket)
        receiver.wait(receiving)
        sender.wait(sending)
        assert torch.equal(found, message)


def send_for_ever(sender: Group, message: torch.Tensor) -> None:
    while True:
        sender.send(message, 1, 1)


@pytest.mark.parametrize("give_up", [True, False])
def test_nothing_is_written_after_a_group_was_given_up(rendezvous: Rendezvous, give_up: bool) -> None:
    """The other case is the control: a message that is not given up goes on arriving."""
    size = 200_000_000
    for number in range(20):  # of which one is seen on its way, also by a thread that rests now and then
        sender, receiver = open_pair(rendezvous, number)
        message, found = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        sending, receiving = sender.send(message, 1, 0), receiver.receive(found, 0, 0)
        while not found[size // 100]:
            time.sleep(0.001)
        if give_up:
            receiver.abandon()
        arrived = int(found.count_nonzero())
        if arrived < size:
            break
        sender.abandon()
    else:
        pytest.fail("too fast to see")
    if give_up:
        with pytest.raises(GroupError, match="engine e worker 0, bucket 1"):
            send_for_ever(sender, message)
        time.sleep(0.3)
        assert int(found.count_nonzero()) == arrived
    else:
        receiver.wait(receiving)
        sender.wait(sending)
        assert int(found.count_nonzero()) == size
    sender.abandon()


def test_giving_up_lets_a_waiting_thread_go_and_tells_the_other_end(rendezvous: Rendezvous) -> None:
    near, far = open_pair(rendezvous)
    memory = torch.zeros(2, 8, dtype=torch.uint8)
    with ThreadPoolExecutor(2) as pool:
        here = pool.submit(near.wait, near.receive(memory[0], 1, 0))
        there = pool.submit(far.wait, far.receive(memory[1], 0, 0))
        time.sleep(0.3)
        assert not here.done() and not there.done()
        near.abandon()
        with ended_before(PATIENCE * TIMEOUT_S):
            with pytest.raises(GroupError, match="given up"):
                here.result()
            with pytest.raises(GroupError, match="actor rank 0, bucket 0: Connection closed by peer"):
                there.result()
    near.abandon()
    with pytest.raises(GroupError):
        near.receive(memory[0], 1, 1)


def test_a_wait_ends_before_the_deadline_and_says_for_whom_it_was(rendezvous: Rendezvous) -> None:
    _, far = open_pair(rendezvous)
    far._limit_s = group(rendezvous, 1, timeout_s=1.0)._limit_s
    with ended_by(1.0), pytest.raises(GroupError, match=r"with actor rank 0, bucket 7: Timed out waiting 750ms"):
        far.wait(far.receive(torch.zeros(8, dtype=torch.uint8), 0, 7))


@pytest.fixture
def patient_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who is not there is given up early."""
    monkeypatch.setattr(gloo, "enter", lambda info, number, limit_s: enter(info, number, TIMEOUT_S))


@pytest.mark.usefixtures("patient_store")
def test_who_does_not_come_is_named(rendezvous: Rendezvous) -> None:
    with ended_by(1.0), pytest.raises(GroupError, match=r"^engine e worker 0 did not come to the gloo group within 0.75 s$"):
        group(rendezvous, 0, timeout_s=1.0).open()


def test_a_group_that_nobody_came_to_can_be_given_up(rendezvous: Rendezvous) -> None:
    alone = group(rendezvous, 0)
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(alone.open)
        time.sleep(0.3)
        alone.abandon()
        with ended_before(PATIENCE * TIMEOUT_S), pytest.raises(GroupError, match="given up"):
            opening.result()


def test_who_came_while_the_one_who_waits_was_stopped_beyond_the_limit_is_there() -> None:
    store = HashStore()

    class Stopped(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            time.sleep(0.02)
            store.set("version-1", "of rank 1")
            return False

    assert barrier(store, GroupInfo(HOST, 0, 0, MEMBERS), "of rank 0", 0.01, Stopped()) == ("of rank 0", "of rank 1")


@pytest.mark.usefixtures("patient_store")
def test_groups_of_other_numbers_do_not_meet(rendezvous: Rendezvous) -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(group(rendezvous, rank, number=rank, timeout_s=1.0).open) for rank in range(2)]
        for outcome in outcomes:
            with pytest.raises(GroupError, match="did not come"):
                outcome.result()
    open_pair(rendezvous, number=2)


def test_another_version_of_torch_is_refused(rendezvous: Rendezvous) -> None:
    stranger = PrefixStore("group-0", TCPStore(HOST, rendezvous.port, None, False, timedelta(seconds=5), wait_for_workers=False))
    stranger.set("version-1", "1.13.1")
    with pytest.raises(GroupError, match=r"engine e worker 0 runs torch 1\.13\.1, actor rank 0 runs torch"):
        group(rendezvous, 0).open()


def test_nobody_at_the_meeting_place_is_an_error_in_time() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        port = unused.getsockname()[1]
    with ended_by(1.0), pytest.raises(GroupError, match="while the group was made"):
        Group(GroupInfo(HOST, port, 1, MEMBERS), 0, 1.0).open()


def test_the_store_and_the_group_listen_where_they_are_told_and_stop(rendezvous: Rendezvous) -> None:
    def listening() -> set[tuple[str, int]]:
        return {tuple(c.laddr) for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}

    assert (HOST, rendezvous.port) in listening()
    before = listening()
    elsewhere = Rendezvous("127.0.0.2", TIMEOUT_S)
    assert listening() - before == {("127.0.0.2", elsewhere.port)}
    pair = [Group(GroupInfo("127.0.0.2", elsewhere.port, rank, MEMBERS), 0, TIMEOUT_S) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Group.open, pair))
    ours = {address_towards("127.0.0.2", elsewhere.port)}
    assert {address for address, _ in listening() - before} == {"127.0.0.2"} | ours
    assert not {"0.0.0.0", "::"} & {address for address, _ in listening() - before}
    for member in pair:
        member.abandon()
    del pair, member, elsewhere
    # What tests before this one have left may end meanwhile, and threads of gloo and of the store close theirs behind the call.
    with ended_before(TIMEOUT_S):
        while not listening() <= before:
            time.sleep(0.01)


@settings(max_examples=40, deadline=None)
@given(
    tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2]), dp=st.sampled_from([1, 2]), other_tp=st.sampled_from([1, 2]),
    other_dtype=st.sampled_from(["float32", "bfloat16"]), bucket_bytes=st.sampled_from([1, 3000, 10**9]),
)  # fmt: skip
def test_what_is_unpacked_from_messages_is_what_a_ring_would_hold(tp, pp, dp, other_tp, other_dtype, bucket_bytes):
    _, sources, plan = between_layouts(tp, pp, dp, other_tp, other_dtype, bucket_bytes)
    for row in lay_out(plan):
        for part in row:
            given_views = [region(sources[r.source][r.source_buffer], r.source_offset, r.shape, r.source_strides) for r in part.regions]
            ring = torch.zeros(part.nbytes, dtype=torch.uint8)
            CopyProgram((placed(ring, r.slot_offset, r, r.slot_strides), v) for r, v in zip(part.regions, given_views, strict=True)).run()
            (messages,) = steps_of(part)
            assert sum(p.nbytes for p in messages) <= sum(r.nbytes for r in part.regions) + SEGMENT_ALIGNMENT * len(part.regions)
            memories = [torch.zeros(p.nbytes, dtype=torch.uint8) for p in messages]
            for message, memory in zip(messages, memories, strict=True):
                mine = [v for r, v in zip(part.regions, given_views, strict=True) if r.source == message.peer]
                CopyProgram(zip(views(message, memory), mine, strict=True)).run()
            if len(messages) == 1:
                assert torch.equal(memories[0], ring), "the part as it lies in a slot"
            slot = torch.zeros_like(ring)
            for message, memory in zip(messages, memories, strict=True):
                targets = [placed(slot, r.slot_offset, r, r.slot_strides) for r in message.regions]
                CopyProgram(zip(targets, views(message, memory), strict=True)).run()
            assert torch.equal(slot, ring)
