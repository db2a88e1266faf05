"""What a sync is told and what it answers: SyncConfig and SyncReport. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from rlsync.errors import ConfigError
from rlsync.verification import MODES

SINKS = ("auto", "direct", "layerwise", "loaders")
_PAUSE_MODES = ("abort", "wait", "keep")
_METRICS = (
    "version", "bytes", "num_buckets", "gb_per_s", "seconds", "pause_s", "begin_s", "fill_s", "transfer_s", "wait_s", "pull_s", "verify_s",
    "finalize_s", "commit_s", "resume_s", "extra_bytes", "max_redundancy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """Settings of a connection, the same on all actor ranks.

    Attributes:
        bucket_bytes: most bytes of a bucket, those of all streams together; a larger tensor has a bucket to itself.
        num_slots: slots of the ring. With 2, one bucket is filled while the one before it is loaded.
        timeout_s: deadline of each phase: connect, begin, transfer, commit, resume.
        sink: how workers take bytes in: ``direct`` into the live parameters, ``layerwise`` through vLLM's post-processing,
            ``loaders`` as whole HF tensors through vLLM's own loaders. ``auto`` is the first that is right for each module.
        verify: which regions are summed up where they come from and where they end: ``off``, ``full``, or ``sampled``: all in
            the first sync, and each at least once in ``rlsync.verification.SAMPLE_PERIOD`` consecutive ones.
        transport: how bytes get to the workers; ``auto`` is ``shm``.
        pause_mode: what happens to requests in flight: ``abort``, ``wait`` for them, or ``keep`` and go on with new weights.
        bind_host: address on which rank 0 listens for actor ranks and engine workers.
    """

    bucket_bytes: int = 256 * 2**20
    num_slots: int = 2
    timeout_s: float = 600.0
    sink: Literal["auto", "direct", "layerwise", "loaders"] = "auto"
    transport: Literal["auto", "shm"] = "auto"
    verify: Literal["off", "sampled", "full"] = "sampled"
    pause_mode: Literal["abort", "wait", "keep"] = "abort"
    bind_host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ConfigError(f"weight_sync.bucket_bytes is {self.bucket_bytes}; it must be positive")
        if self.num_slots < 1:
            raise ConfigError(f"weight_sync.num_slots is {self.num_slots}; it must be at least 1, and 2 to overlap filling and loading")
        if not self.timeout_s > 0:
            raise ConfigError(f"weight_sync.timeout_s is {self.timeout_s}; it must be positive")
        for key, value, known in (
            ("sink", self.sink, SINKS),
            ("verify", self.verify, MODES),
            ("transport", self.transport, ("auto", "shm")),
            ("pause_mode", self.pause_mode, _PAUSE_MODES),
        ):
            if value not in known:
                raise ConfigError(f"weight_sync.{key} is {value!r}; known are {', '.join(known)}")


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """One committed sync as rank 0 saw it; the same object's fields on all actor ranks.

    Attributes:
        sinks: what workers used: ``direct``, ``layerwise``, ``direct+layerwise`` or ``loaders``.
        bytes: bytes that streams take in, each stream once. Several workers that hold the same on one host are one stream.
        bytes_by_link, redundancy: of the plan, by link name and by stream; see ``rlsync.links.Traffic``.
        seconds: from the call of ``sync`` to the last engine that serves again.
        pause_s: until every engine stood still; runs beside ``begin_s`` and the first fills.
        begin_s: rank 0's ``Source.begin``, which makes the parameters fresh.
        fill_s: rank 0's time inside fills, checksums included; overlaps pulling.
        transfer_s: from the first engine's update to the last worker's commit.
        wait_s, pull_s, verify_s, finalize_s: of the slowest worker in each: waiting for buckets, taking them in, checksums,
            and what is left to do after the last.
        commit_s: resetting caches. resume_s: letting requests in again.
        extra_bytes: most memory that a worker took for the sync beside the ring.
        engine_s: seconds of the update, by engine id.
    """

    version: int
    sinks: tuple[str, ...]
    transport: str
    verify: str
    bytes: int
    bytes_by_link: dict[str, int]
    redundancy: dict[str, float]
    num_buckets: int
    seconds: float
    pause_s: float
    begin_s: float
    fill_s: float
    transfer_s: float
    wait_s: float
    pull_s: float
    verify_s: float
    finalize_s: float
    commit_s: float
    resume_s: float
    extra_bytes: int
    engine_s: dict[str, float]

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second of the whole sync."""
        return self.bytes / 1e9 / self.seconds

    @property
    def max_redundancy(self) -> float:
        """Bytes received over bytes held, of the worst stream; 1.0 is each byte once."""
        return max(self.redundancy.values())

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics log."""
        flat = {f"sync/{name}": getattr(self, name) for name in _METRICS}
        flat |= {f"sync/bytes_{link.replace(' ', '_')}": nbytes for link, nbytes in self.bytes_by_link.items()}
        return flat | {"time/sync_weights": self.seconds}
