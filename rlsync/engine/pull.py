"""One sync as a worker goes through it: how far the actor's side is, what it says the bytes sum up to, where the time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from rlsync.coordinator import messages as m
from rlsync.engine.verifier import Check, Verifier


class Pull:
    """Progress of one attempt.

    Attributes:
        phase, bucket: where it stands, for the error that names them.
        buckets_ready: buckets that may be pulled.
        group: number of the group that carries messages.
        exports: what actor ranks export anew and nobody has taken note of.
    """

    def __init__(self, verifier: Verifier, attempt: int) -> None:
        self.attempt = attempt
        self.phase, self.bucket = "begin", None
        self.buckets_ready, self.group = -1, 0
        self._verifier = verifier
        self.exports: tuple[m.RankExport, ...] = ()
        self._sums: dict[int, int] = {}
        self._checks: list[Check] = []
        self._seconds = dict.fromkeys(("wait", "pull", "verify", "finalize"), 0.0)

    phase: str
    bucket: int | None

    def hear(self, ready: m.Ready) -> None:
        """Take in what the coordinator says of the actor's side."""
        self.buckets_ready, self.group = ready.buckets_ready, ready.group
        self._sums.update((s.region, s.value) for s in ready.sums)
        self.exports += ready.exports

    def verify(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Sum up what lies in ``buffers``; on CUDA that is only begun, behind what the current stream has to do."""
        with self.timed("verify"):
            self._checks.append(self._verifier.begin(bucket, buffers, self.attempt))

    def conclude(self) -> None:
        """Compare everything with what was sent, region by region. Raises MismatchError naming what differs in the first such bucket."""
        with self.timed("verify"):
            for check in self._checks:
                self.bucket = check.bucket
                check.compare(self._sums)

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
