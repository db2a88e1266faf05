"""Progress of one sync: counts by peer, and the bucket counters that follow from them. Sends nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlsync.coordinator.messages import Loaded, Sum
from rlsync.coordinator.roster import Member


@dataclass(slots=True)
class Progress:
    """One attempt. Buckets are filled and taken in order; a slot is free when every worker is done with what was in it.

    Attributes:
        group: number of the group that carries messages. A failed sync may leave some in it, so the next has one of its own.
        regroups: whether that group is still to be made. Its members look for each other for less than a phase may last, so that actor
            ranks fill nothing, and do not join it, before everybody is there.
        buckets_ready: buckets that every actor rank has filled. buckets_summed: those whose checksums have come from all of them.
        num_frozen: buckets, the first ones, that ``without_frozen`` speaks of.
        sums: destination -> checksums of its regions, in the order in which actor ranks have sent them.
        answered: engines that serve.
        verifies_all: whether all regions are verified, because the sync before did not commit: what was wrong in it may be so again.
        without_frozen: whether frozen buckets are passed over; None before actor rank 0, which knows, is there.
        all_joined: whether every actor rank has started and every worker has joined.
        began_s: value of the clock at the first start. begin_s: seconds from then until all had joined.
    """

    attempt: int
    version: int
    num_buckets: int
    num_slots: int
    num_frozen: int = 0
    group: int = 0
    regroups: bool = False
    verifies_all: bool = False
    started: set[bytes] = field(default_factory=set)
    filled: dict[bytes, int] = field(default_factory=dict)
    summed: dict[bytes, int] = field(default_factory=dict)
    joined: dict[bytes, int] = field(default_factory=dict)
    done: dict[bytes, int] = field(default_factory=dict)
    loaded: dict[bytes, Loaded] = field(default_factory=dict)
    committed: set[bytes] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)
    buckets_ready: int = 0
    buckets_summed: int = 0
    sums: dict[int, list[Sum]] = field(default_factory=lambda: defaultdict(list))
    without_frozen: bool | None = None
    all_joined: bool = False
    began_s: float = 0.0
    begin_s: float = 0.0
    # By bucket, how many actor ranks have filled it and summed it up, and workers are done with it. All go in order, so buckets complete in
    # order.
    _packed: list[int] = field(init=False)
    _summed: list[int] = field(init=False)
    _taken: list[int] = field(init=False)
    _buckets_taken: int = 0

    def __post_init__(self) -> None:
        self._packed, self._summed, self._taken = ([0] * self.num_buckets for _ in range(3))

    @property
    def num_held(self) -> int:
        """Buckets, the first ones, that are not sent, and take no slot: engines have what is in them."""
        return self.num_frozen if self.without_frozen else 0

    @property
    def buckets_writable(self) -> int:
        """Buckets whose slot is free, those already filled included."""
        return min(self.num_buckets, max(self.num_held, self._buckets_taken) + self.num_slots)

    def fill(self, identity: bytes, bucket: int, sums: Sequence[Sum] | None, num_actors: int) -> str | bool:
        """Count one bucket of an actor rank, or all up to this one where none is sent; checksums follow where ``sums`` is None. Returns
        whether more buckets are ready, or summed up, now, or what is wrong."""
        count, summed = self.filled.get(identity, 0), self.summed.get(identity, 0)
        if not self._is_next(bucket, count) or bucket >= self.buckets_writable or summed != count:
            return f"filled bucket {bucket}, its turn is {count} and {self.buckets_writable} are writable, {summed} summed up"
        self.filled[identity] = bucket + 1
        completed = _completed(self._packed, range(count, bucket + 1), num_actors)
        self.buckets_ready += completed
        grown = completed > 0
        return grown if sums is None else self._count(identity, bucket, sums, num_actors) or grown

    def sum_up(self, identity: bytes, bucket: int, sums: Sequence[Sum], num_actors: int) -> str | bool:
        """Take the checksums that follow what an actor rank has filled. Returns whether more is summed up now, or what is wrong."""
        count = self.summed.get(identity, 0)
        if not self._is_next(bucket, count) or bucket >= self.filled.get(identity, 0):
            return f"summed up bucket {bucket}, its turn is {count} and {self.filled.get(identity, 0)} are filled"
        return self._count(identity, bucket, sums, num_actors)

    def _count(self, identity: bytes, bucket: int, sums: Sequence[Sum], num_actors: int) -> bool:
        count, self.summed[identity] = self.summed.get(identity, 0), bucket + 1
        for entry in sums:
            self.sums[entry.destination].append(entry)
        completed = _completed(self._summed, range(count, bucket + 1), num_actors)
        self.buckets_summed += completed
        return completed > 0

    def take(self, identity: bytes, bucket: int, num_workers: int) -> str | bool:
        """Count one bucket of a worker, or all up to this one where none is sent. Returns whether more are writable now, or what is
        wrong."""
        count = self.done.get(identity, 0)
        if not self._is_next(bucket, count) or bucket >= self.buckets_ready:
            return f"finished bucket {bucket}, its turn is {count} and {self.buckets_ready} are ready"
        self.done[identity], before = bucket + 1, self.buckets_writable
        self._buckets_taken += _completed(self._taken, range(count, bucket + 1), num_workers)
        return self.buckets_writable > before

    def _is_next(self, bucket: int, count: int) -> bool:
        """Whether ``bucket`` comes after ``count`` others, or is one up to which none is sent."""
        return bucket == count or count < bucket < self.num_held

    def unsent_sums(self, identity: bytes, destination: int) -> tuple[Sum, ...]:
        """Checksums of a worker's regions that were not sent to it yet; they count as sent now."""
        sums = self.sums[destination]
        begin, self.joined[identity] = self.joined.get(identity, 0), len(sums)
        return tuple(sums[begin:])

    def bucket_of(self, peer: Member) -> int:
        """The bucket that a peer is at."""
        at = (self.filled if peer.engine is None else self.done).get(peer.identity, 0)
        return min(at, self.num_buckets - 1)

    def stragglers(self, phase: str, actors: Sequence[Member], workers: Sequence[Member]) -> list[tuple[Member, str]]:
        """The members that a phase waits for, and what each has to do."""
        if phase == "begin":
            late = [(p, "to enter sync()") for p in actors if p.identity not in self.started]
            return late + [(p, "to begin its update") for p in workers if p.identity not in self.joined]
        if phase == "transfer":
            limit = min(self.buckets_writable, self.num_buckets)
            counts = [(p, self.filled.get(p.identity, 0), self.summed.get(p.identity, 0)) for p in actors]
            late = [(p, f"to sum up bucket {summed}") for p, filled, summed in counts if summed < filled]
            late += [(p, f"to fill bucket {filled}") for p, filled, summed in counts if summed == filled < limit]
            if late:
                return late
            slow = [p for p in workers if self.done.get(p.identity, 0) < self.buckets_ready]
            slow.sort(key=lambda p: self.done.get(p.identity, 0))
            late = [(p, f"to load bucket {self.done.get(p.identity, 0)}") for p in slow]
            return late or [(p, "to finish loading") for p in workers if p.identity not in self.loaded]
        if phase == "commit":
            return [(p, "to commit") for p in workers if p.identity not in self.committed]
        late = [(p, "to end its engine's update and resume it") for p in workers if p.place == 0 and p.engine not in self.answered]
        return late or [(p, "to say that the engines are resumed") for p in actors if p.place == 0]


def _completed(counts: list[int], buckets: range, num_peers: int) -> int:
    """Count a peer for each of these buckets; returns how many of them all peers have come to."""
    for bucket in buckets:
        counts[bucket] += 1
    return sum(counts[bucket] == num_peers for bucket in buckets)
