"""What the coordinator of a sync costs by the number of those who take part: one thread's seconds, no sockets, no GPU.

``python -m benchmarks.coordinator [--ranks 32 128 512] [--buckets 30]``: so many actor ranks, and as many workers in engines of eight.
Messages are encoded and decoded as on the wire; what zmq takes comes on top. The floor is to decode what comes and to encode what leaves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from rlsync.coordinator import messages as m
from rlsync.coordinator.roster import Expected
from rlsync.coordinator.state_machine import Coordinator
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.plan.packing import PackedPart

_WORKERS = 8
_MANIFEST = m.Manifest((TensorSpec("w", "bfloat16", (4,)),), "auto")
_TIMES = m.WorkerTimes(0.1, 0.2, 0.3, 0.4, 5)
# By peer, what it says.
_Said = Iterator[tuple[bytes, m.FromPeer]]


class Course:
    """All messages of a connection and of one sync, in an order in which they may come."""

    def __init__(self, ranks: int, buckets: int) -> None:
        self.ranks, self.buckets = ranks, buckets
        self.engines = [f"e{i}" for i in range(ranks // _WORKERS)]
        self.actors = [f"actor {i}".encode() for i in range(ranks)]
        self.workers = [f"worker {i}".encode() for i in range(ranks)]

    def expected(self) -> Expected:
        return Expected("token", "run", self.ranks, dict.fromkeys(self.engines, _WORKERS), ("digest",) * self.ranks, 60.0, _MANIFEST)

    def connect(self) -> _Said:
        recorded = m.Recorded(whole_tensors("engine", _MANIFEST.tensors), "direct")
        for i in range(self.ranks):
            yield self.actors[i], m.ActorHello("token", "run", i, self.ranks, "host", "shm", "pids", i, None, "digest")
            engine, place = self.engines[i // _WORKERS], i % _WORKERS
            yield self.workers[i], m.WorkerHello("token", "run", engine, 0, place, _WORKERS, "host", "shm", "pids", i, None, "0.25.1")
        for worker in self.workers:
            yield worker, recorded
        for_actor = m.ActorAssignment("plan", 2, "off", self.buckets, {"shm": b"ring"})
        for_worker = m.WorkerAssignment("plan", 2, "off", 0, (PackedPart(16, (), ()),) * self.buckets, "shm", b"ring")
        for part in m.Planned((for_actor,) * self.ranks, (for_worker,) * self.ranks).parts():
            yield self.actors[0], part
        for peer in (*self.actors, *self.workers):
            yield peer, m.Attached()
        for engine in self.engines:
            yield self.actors[0], m.Answered(0, engine, "connect")

    def sync(self, attempt: int) -> _Said:
        for actor in self.actors:
            yield actor, m.Start(attempt, attempt)
        for worker in self.workers:
            yield worker, m.Joined(attempt, attempt)
        for bucket in range(self.buckets):
            for actor in self.actors:
                yield actor, m.Filled(attempt, bucket, 8)
            for worker in self.workers:
                yield worker, m.Done(attempt, bucket)
        for message in (m.Loaded(attempt, _TIMES), m.Committed(attempt)):
            for worker in self.workers:
                yield worker, message
        yield self.actors[0], m.Finish(attempt, b"report")


def measure(ranks: int, buckets: int) -> str:
    """A row of the table."""
    course = Course(ranks, buckets)
    sent: list[m.FromCoordinator] = []

    def send(identity: bytes, message: m.FromCoordinator) -> None:
        m.encode(message)
        sent.append(message)

    coordinator = Coordinator(course.expected(), send, 0.0)
    connecting_s, _, _ = _feed(coordinator, course.connect())
    assert coordinator.phase == "idle", coordinator.phase
    sent.clear()
    seconds, decoding_s, count = _feed(coordinator, course.sync(1))
    assert (coordinator.phase, coordinator.version) == ("idle", 1)
    begin = time.process_time()
    for message in sent:
        m.encode(message)
    floor_s = decoding_s + time.process_time() - begin
    each = seconds / (count + len(sent)) * 1e6
    return f"| {2 * ranks:,} | {connecting_s:.2f} | {count:,} | {len(sent):,} | {seconds:.3f} | {floor_s:.3f} | {each:.1f} |"


def _feed(coordinator: Coordinator, said: _Said) -> tuple[float, float, int]:
    """Seconds of the coordinator, seconds that decoding alone takes, and how many messages there were."""
    raw = [(peer, m.encode(message)) for peer, message in said]
    begin = time.process_time()
    for identity, message in raw:
        coordinator.receive(identity, message, 0.0)
    middle = time.process_time()
    for _, message in raw:
        m.decode_from_peer(message)
    return middle - begin, time.process_time() - middle, len(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--buckets", type=int, default=30)
    args = parser.parse_args()
    print("| peers | connect, s | messages in | out | sync, s | floor, s | us a message |\n|---|---|---|---|---|---|---|")
    for ranks in args.ranks:
        print(measure(ranks, args.buckets), flush=True)


if __name__ == "__main__":
    main()
