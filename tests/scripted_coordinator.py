"""A coordinator of two actor ranks and an engine with two workers, told message by message with a clock of the test's own."""

from __future__ import annotations

import msgspec

from rlsync.coordinator import messages as m
from rlsync.coordinator.roster import Expected
from rlsync.coordinator.state_machine import Coordinator
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.plan.packing import PackedPart

MANIFEST = m.Manifest(tuple(TensorSpec(f"w{i}", "float32", (4,)) for i in range(4)), "auto")
RECORDED = m.Recorded(whole_tensors("engine e0", MANIFEST.tensors), "direct")
ACTOR_ASSIGNMENT = m.ActorAssignment("plan", 2, "off", 4, {"shm": b"ring"})
WORKER_ASSIGNMENT = m.WorkerAssignment("plan", 2, "off", 0, (PackedPart(16, (), ()),) * 4, "shm", b"ring")
PLANNED = m.Planned((ACTOR_ASSIGNMENT,) * 2, (WORKER_ASSIGNMENT,) * 2)
TIMES = m.WorkerTimes(0.1, 0.2, 0.3, 0.4, 5)
TIMEOUT_S = 10.0


class Run:
    """A coordinator of two actor ranks and engine ``e0`` with two workers, and what it has sent to each peer."""

    def __init__(self, *, connected: bool = True, engines_answer: bool = True, num_frozen: int = 0) -> None:
        self.sent: dict[bytes, list] = {}
        expected = Expected("secret", "run", 2, {"e0": 2}, ("digest", "digest"), TIMEOUT_S, MANIFEST)
        self.coordinator = Coordinator(expected, lambda peer, message: self.sent.setdefault(peer, []).append(message), 0.0)
        if connected:
            for rank in range(2):
                self.tell(f"a{rank}", actor(rank))
                self.tell(f"w{rank}", worker(rank))
                self.tell(f"w{rank}", RECORDED)
            actors = tuple(msgspec.structs.replace(each, num_frozen=num_frozen) for each in PLANNED.actors)
            self.tell("a0", msgspec.structs.replace(PLANNED, actors=actors))
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
