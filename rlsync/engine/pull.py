"""One sync in one worker: progress of the actor's side, checksums of the engine's memory against those sent, and seconds by kind.

Imports no vLLM.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch

from rlsync.coordinator import messages as m
from rlsync.copy.addresses import MemoryRanges, memory_ranges
from rlsync.copy.checksum_programs import ChecksumPrograms, Views
from rlsync.copy.cpu import region
from rlsync.errors import RlsyncError, first_few
from rlsync.plan.packing import Region
from rlsync.plan.verification import num_rounds, round_of, rounds_in, turn_of

# By bucket, buffers that are the same in every sync.
Standing = Mapping[int, Mapping[str, torch.Tensor]]
# The key of what is frozen among checksum programs, beside numbers of buckets.
_FROZEN = "frozen"


class MismatchError(RlsyncError):
    """The engine's memory differs from what the actor sent."""


@dataclass(frozen=True, slots=True)
class Check:
    """Verified regions of one bucket, and what gives the checksum of each where it landed; it may wait for the device."""

    bucket: int
    regions: Sequence[Region]
    held: Callable[[], Sequence[int]]

    def compare(self, sent: Mapping[int, int]) -> Sequence[int]:
        """Compare with the checksums of the sender, by region number; returns them. Raises MismatchError naming the regions that differ."""
        held = self.held()
        findings = [
            f"{r.tensor} in {r.buffer} (elements from {r.buffer_offset}, shape {r.shape}, from actor rank {r.source}) "
            + (f"sums up to {value:016x}, sent were {sent[r.number]:016x}" if r.number in sent else "came without a checksum")
            for r, value in zip(self.regions, held, strict=True)
            if sent.get(r.number) != value
        ]
        if findings:
            raise MismatchError(
                f"{len(findings)} of {len(self.regions)} verified regions are not what was sent: {first_few(findings, 5, separator='; ')}"
            )
        return held


class Verifier:
    """Checksums of one worker's regions, for one connection.

    Attributes:
        num_frozen: buckets, the first ones, that are verified whole in every sync, whether they are sent in it or not.
    """

    def __init__(self, assignment: m.WorkerAssignment) -> None:
        self._verify, self.num_frozen = assignment.verify, assignment.num_frozen
        # Of frozen buckets, as they landed.
        self._landed: dict[int, Sequence[int]] = {}
        self._sums = ChecksumPrograms()
        self._rounds = [
            _by_round(part.regions, assignment.verify, is_frozen=bucket < self.num_frozen) for bucket, part in enumerate(assignment.parts)
        ]

    def prepare(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Make ready to verify a bucket in these buffers."""
        self._sums.prepare(bucket, list(self._rounds[bucket]), memory_ranges(buffers.values()), self._views(bucket, buffers))

    def begin(self, bucket: int, buffers: Mapping[str, torch.Tensor], turn: int) -> Check:
        """Checksum the regions whose turn it is, in ``buffers``; on CUDA enqueued on the current stream."""
        rounds, chosen = self._chosen(bucket, turn)
        sums = self._sums.begin(bucket, rounds, memory_ranges(buffers.values()), self._views(bucket, buffers))
        return Check(bucket, chosen, sums.values)

    def _chosen(self, bucket: int, turn: int) -> tuple[list[int], list[Region]]:
        rounds = [number for number in rounds_in(self._verify, 1 if bucket < self.num_frozen else turn) if number in self._rounds[bucket]]
        return rounds, [r for number in rounds for r in self._rounds[bucket][number]]

    def prepare_frozen(self, standing: Standing) -> None:
        """Make ready to verify what is frozen in these buffers, by bucket."""
        if live := self._live(standing):
            self._sums.prepare((_FROZEN, live), [0], _ranges(standing, live), self._frozen_views(standing, live))

    def held(self, standing: Standing) -> Iterator[Check]:
        """Checks of all frozen buckets, none of which is sent: of what ``standing`` has, computed at once, and where it lacks a bucket of
        what landed when that was sent, because a kernel keeps it in a form of its own."""
        live, first = self._live(standing), 0
        sums = self._sums.begin((_FROZEN, live), [0] if live else [], _ranges(standing, live), self._frozen_views(standing, live))
        values = cache(sums.values)
        for bucket in range(self.num_frozen):
            regions = self._rounds[bucket].get(0, [])
            if bucket in standing:
                part = slice(first, first := first + len(regions))
                yield Check(bucket, regions, partial(_part, values, part))
            elif regions:
                yield Check(bucket, regions, partial(self._landed.__getitem__, bucket))

    def _live(self, standing: Standing) -> tuple[int, ...]:
        """Frozen buckets that are verified where they are."""
        return tuple(bucket for bucket in range(self.num_frozen) if bucket in standing and self._rounds[bucket])

    def _frozen_views(self, standing: Standing, live: Sequence[int]) -> Views:
        return lambda number: [view for bucket in live for view in self._views(bucket, standing[bucket])(number)]

    def keep(self, check: Check, sums: Sequence[int]) -> None:
        """Remember what a frozen bucket has brought."""
        if check.bucket < self.num_frozen:
            self._landed[check.bucket] = sums

    def _views(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> Views:
        rounds = self._rounds[bucket]
        return lambda number: [region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides) for r in rounds[number]]


def _ranges(standing: Standing, live: Sequence[int]) -> MemoryRanges:
    return memory_ranges(buffer for bucket in live for buffer in standing[bucket].values())


def _part(values: Callable[[], Sequence[int]], part: slice) -> Sequence[int]:
    return values()[part]


def _by_round(regions: Sequence[Region], mode: str, *, is_frozen: bool) -> dict[int, list[Region]]:
    """Regions that are ever verified, by the round that they are in: one where all of them are verified each time."""
    found: dict[int, list[Region]] = defaultdict(list)
    for r in regions if num_rounds(mode) else ():
        found[0 if is_frozen else round_of(mode, r.number)].append(r)
    return dict(found)


class Pull:
    """Progress of one attempt.

    Attributes:
        phase, bucket: where it stands, for the error that names them.
        buckets_ready: buckets that may be pulled. buckets_summed: those whose checksums are here.
        group: number of the group that carries messages.
        without_frozen: whether frozen buckets bring checksums alone.
        turn: of the regions that are verified; see ``rlsync.plan.verification``.
        exports: new exports of actor ranks that the receiver has not seen yet.
    """

    def __init__(self, verifier: Verifier, attempt: int) -> None:
        self.attempt = attempt
        self.phase, self.bucket = "begin", None
        self.buckets_ready, self.buckets_summed, self.group, self.without_frozen, self.turn = -1, 0, 0, False, attempt
        self._verifier = verifier
        self.exports: tuple[m.RankExport, ...] = ()
        self._sums: dict[int, int] = {}
        self._checks: list[Check] = []
        self._seconds = dict.fromkeys(("wait", "pull", "verify", "finalize"), 0.0)

    phase: str
    bucket: int | None

    def hear(self, ready: m.Ready) -> None:
        """Update the progress of the actor's side from a message of the coordinator."""
        self.buckets_ready, self.buckets_summed = ready.buckets_ready, ready.buckets_summed
        self.group, self.without_frozen = ready.group, ready.without_frozen
        self.turn = turn_of(self.attempt, verifies_all=ready.verifies_all)
        self._sums.update((s.region, s.value) for s in ready.sums)
        self.exports += ready.exports

    def verify(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Checksum the bucket in ``buffers``; on CUDA the kernels are only enqueued on the current stream."""
        with self.timed("verify"):
            self._checks.append(self._verifier.begin(bucket, buffers, self.turn))

    def verify_held(self, standing: Standing) -> None:
        """Checksum all that is frozen, none of which is sent; see ``Verifier.held``. On CUDA the kernel is only enqueued."""
        with self.timed("verify"):
            self._checks += self._verifier.held(standing)

    def conclude(self) -> None:
        """Compare all checksums with those sent. Raises MismatchError for the first bucket that differs, naming its regions."""
        with self.timed("verify"):
            for check in self._checks:
                self.bucket = check.bucket
                self._verifier.keep(check, check.compare(self._sums))

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count seconds under ``kind``. Time of an inner kind counts for that kind alone."""
        started_s, others_s = time.monotonic(), sum(self._seconds.values())
        try:
            yield
        finally:
            inner_s = sum(self._seconds.values()) - others_s
            self._seconds[kind] += time.monotonic() - started_s - inner_s

    def times(self, extra_bytes: int) -> m.WorkerTimes:
        """The worker's seconds by kind, and its peak extra memory."""
        seconds = self._seconds
        return m.WorkerTimes(seconds["wait"], seconds["pull"], seconds["verify"], seconds["finalize"], extra_bytes)
