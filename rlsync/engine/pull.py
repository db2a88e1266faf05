"""One sync in one worker: progress of the actor's side, checksums of the engine's memory against those sent, and seconds by kind.

Imports no vLLM.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlsync.coordinator import messages as m
from rlsync.copy.addresses import memory_ranges
from rlsync.copy.checksum_programs import ChecksumPrograms, PendingChecksums, Views
from rlsync.copy.cpu import region
from rlsync.errors import RlsyncError, first_few
from rlsync.plan.packing import Region
from rlsync.plan.verification import num_rounds, round_of, rounds_in, turn_of


class MismatchError(RlsyncError):
    """The engine's memory differs from what the actor sent."""


@dataclass(frozen=True, slots=True)
class KnownChecksums:
    """Checksums that are known already."""

    sums: Sequence[int]

    def values(self) -> Sequence[int]:
        return self.sums


@dataclass(frozen=True, slots=True)
class Check:
    """Verified regions of one bucket, and the checksum of each where it landed."""

    bucket: int
    regions: Sequence[Region]
    held: PendingChecksums | KnownChecksums

    def compare(self, sent: Mapping[int, int]) -> Sequence[int]:
        """Compare with the checksums of the sender, by region number; returns them. Raises MismatchError naming the regions that differ."""
        held = self.held.values()
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
        return Check(bucket, chosen, self._sums.begin(bucket, rounds, memory_ranges(buffers.values()), self._views(bucket, buffers)))

    def _chosen(self, bucket: int, turn: int) -> tuple[list[int], list[Region]]:
        rounds = [number for number in rounds_in(self._verify, 1 if bucket < self.num_frozen else turn) if number in self._rounds[bucket]]
        return rounds, [r for number in rounds for r in self._rounds[bucket][number]]

    def held(self, bucket: int, buffers: Mapping[str, torch.Tensor] | None) -> Check:
        """The check of a frozen bucket that is not sent: of what ``buffers`` hold, or for None of what landed when it was sent, because a
        kernel keeps it in a form of its own."""
        if buffers is not None:
            return self.begin(bucket, buffers, 1)
        return Check(bucket, self._chosen(bucket, 1)[1], KnownChecksums(self._landed[bucket]))

    def keep(self, check: Check, sums: Sequence[int]) -> None:
        """Remember what a frozen bucket has brought."""
        if check.bucket < self.num_frozen:
            self._landed[check.bucket] = sums

    def _views(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> Views:
        rounds = self._rounds[bucket]
        return lambda number: [region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides) for r in rounds[number]]


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

    def verify_held(self, bucket: int, buffers: Mapping[str, torch.Tensor] | None) -> None:
        """Checksum a frozen bucket that is not sent; see ``Verifier.held``."""
        with self.timed("verify"):
            self._checks.append(self._verifier.held(bucket, buffers))

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
