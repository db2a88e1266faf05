"""One sync as a worker goes through it: how far the actor's side is, what it says the bytes sum up to, where the time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from rlsync.control import messages as m
from rlsync.control.shares import WorkerPart, WorkerShare
from rlsync.copy.checksum import checksums
from rlsync.copy.cpu import region
from rlsync.errors import RlsyncError
from rlsync.verification import is_verified


class MismatchError(RlsyncError):
    """What this worker holds is not what the actor sent."""


class Pull:
    """Progress of one attempt.

    Attributes:
        phase, bucket: where it stands, for the error that names them.
        buckets_ready: buckets that may be pulled.
        group: number of the group that carries messages.
    """

    def __init__(self, share: WorkerShare, attempt: int) -> None:
        self.attempt = attempt
        self.phase, self.bucket = "begin", None
        self.buckets_ready, self.group = -1, 0
        self._share = share
        self._sums: dict[int, int] = {}
        self._seconds = dict.fromkeys(("wait", "pull", "verify", "finalize"), 0.0)

    phase: str
    bucket: int | None

    def hear(self, ready: m.Ready) -> None:
        """Take in what the coordinator says of the actor's side."""
        self.buckets_ready, self.group = ready.buckets_ready, ready.group
        self._sums.update((s.region, s.value) for s in ready.sums)

    def verify(self, part: WorkerPart, buffers: Mapping[str, torch.Tensor]) -> None:
        """Compare what lies in ``buffers`` with what was sent, region by region. Raises MismatchError naming all that differ."""
        chosen = [r for r in part.regions if is_verified(self._share.verify, r.number, self.attempt)]
        if not chosen:
            return
        with self.timed("verify"):
            held = checksums([region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides) for r in chosen])
        findings = [
            f"{r.tensor} in {r.buffer} (elements from {r.buffer_offset}, shape {r.shape}, from actor rank {r.source}) "
            + (f"sums up to {value:016x}, sent were {self._sums[r.number]:016x}" if r.number in self._sums else "came without a checksum")
            for r, value in zip(chosen, held, strict=True)
            if self._sums.get(r.number) != value
        ]
        if findings:
            more = f" and {len(findings) - 5} more" if len(findings) > 5 else ""
            raise MismatchError(f"{len(findings)} of {len(chosen)} verified regions are not what was sent: {'; '.join(findings[:5])}{more}")

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
        """What the worker tells of its time and memory."""
        seconds = self._seconds
        return m.WorkerTimes(seconds["wait"], seconds["pull"], seconds["verify"], seconds["finalize"], extra_bytes)
