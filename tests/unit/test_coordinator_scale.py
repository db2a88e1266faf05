"""What a coordinator does with hundreds of actor ranks and workers: as much for each message as with a few, and errors that can be read."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.coordinator import Course
from rlsync.coordinator import messages as m
from rlsync.coordinator.state_machine import Coordinator
from tests.counted import num_calls

BUCKETS = 3


class Counted:
    """A coordinator of so many actor ranks and workers, connected, and the calls of functions that messages to it cost."""

    def __init__(self, ranks: int) -> None:
        self.course = Course(ranks, BUCKETS)
        self.sent: list[tuple[bytes, m.FromCoordinator]] = []
        self.coordinator = Coordinator(self.course.expected(), lambda *sent: self.sent.append(sent), 0.0)

    def calls(self, said: Any) -> float:
        """For each message, those that come and those that it sends."""
        raw = [(peer, m.encode(message)) for peer, message in said]
        self.sent.clear()

        def receive() -> None:
            for identity, message in raw:
                self.coordinator.receive(identity, message, 0.0)

        return num_calls(receive) / (len(raw) + len(self.sent))


def test_a_message_costs_the_same_among_sixteen_and_among_five_hundred() -> None:
    few, many = Counted(8), Counted(256)
    for counted in (few, many):
        counted.calls(counted.course.connect())
        assert counted.coordinator.phase == "idle"
    costs = [counted.calls(counted.course.sync(1)) for counted in (few, many)]
    assert [counted.coordinator.version for counted in (few, many)] == [1, 1]
    assert costs[1] < 1.2 * costs[0], costs


def test_a_deadline_that_hundreds_missed_names_some_and_counts_the_others() -> None:
    counted = Counted(256)
    counted.calls(counted.course.connect())
    counted.calls((actor, m.Start(1, 1)) for actor in counted.course.actors[:240])
    counted.coordinator.expire(1000.0)
    assert len(counted.sent) == 512 + 240
    error = counted.sent[-1][1]
    assert isinstance(error, m.Error) and len(error.cause) < 2000
    assert error.cause.startswith("nothing within 60 s from actor rank 240 (pid 240 on host), which was to enter sync(); ")
    assert "actor rank 255 (" in error.cause and error.cause.endswith(" and 256 more")


@pytest.mark.parametrize("ranks", [8, 64])
def test_each_bucket_is_ready_and_free_once_whatever_the_number_of_ranks(ranks: int) -> None:
    counted = Counted(ranks)
    counted.calls(counted.course.connect())
    counted.calls(counted.course.sync(1))
    heard = [message for peer, message in counted.sent if peer == counted.course.workers[-1] and isinstance(message, m.Ready)]
    assert [message.buckets_ready for message in heard] == list(range(BUCKETS + 1))
    heard_of = [message for peer, message in counted.sent if peer == counted.course.actors[-1] and isinstance(message, m.Writable)]
    assert sorted({message.buckets_writable for message in heard_of}) == [2, 3]
