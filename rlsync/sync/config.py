"""What a sync is told and what it answers: SyncConfig and SyncReport. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from rlsync.errors import ConfigError

_PAUSE_MODES = ("abort", "wait", "keep")
_METRICS = (
    "version", "bytes", "num_buckets", "gb_per_s", "seconds", "pause_s", "begin_s", "fill_s", "transfer_s", "load_s", "finalize_s",
    "commit_s", "resume_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SyncConfig:
    """Settings of a connection, the same on all actor ranks.

    Attributes:
        bucket_bytes: most bytes of HF tensors in a bucket; a larger tensor has a bucket to itself. Read by the source.
        num_slots: slots of the ring. With 2, one bucket is filled while the one before it is loaded.
        timeout_s: deadline of each phase: connect, begin, transfer, commit, resume.
        sink: how workers take tensors in; ``auto`` is ``loaders``.
        transport: how bytes get to the workers; ``auto`` is ``shm``.
        pause_mode: what happens to requests in flight: ``abort``, ``wait`` for them, or ``keep`` and go on with new weights.
        bind_host: address on which rank 0 listens for actor ranks and engine workers.
    """

    bucket_bytes: int = 256 * 2**20
    num_slots: int = 2
    timeout_s: float = 600.0
    sink: Literal["auto", "loaders"] = "auto"
    transport: Literal["auto", "shm"] = "auto"
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
            ("sink", self.sink, ("auto", "loaders")),
            ("transport", self.transport, ("auto", "shm")),
            ("pause_mode", self.pause_mode, _PAUSE_MODES),
        ):
            if value not in known:
                raise ConfigError(f"weight_sync.{key} is {value!r}; known are {', '.join(known)}")


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """One committed sync as rank 0 saw it; the same object's fields on all actor ranks.

    Attributes:
        bytes: bytes of all HF tensors, once.
        seconds: from the call of ``sync`` to the last engine that serves again.
        pause_s: until every engine stood still; runs beside ``begin_s`` and the first fills.
        begin_s: rank 0's ``BucketSource.begin``, which makes the parameters fresh.
        fill_s: rank 0's time inside ``BucketSource.fill``; overlaps loading.
        transfer_s: from the first engine's update to the last worker's commit.
        load_s, finalize_s: of the slowest worker: taking buckets in (waits included), and post-processing after the last.
        commit_s: resetting caches. resume_s: letting requests in again.
        engine_s: seconds of the update, by engine id.
    """

    version: int
    sink: str
    transport: str
    bytes: int
    num_buckets: int
    seconds: float
    pause_s: float
    begin_s: float
    fill_s: float
    transfer_s: float
    load_s: float
    finalize_s: float
    commit_s: float
    resume_s: float
    engine_s: dict[str, float]

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes of weights per second of the whole sync."""
        return self.bytes / 1e9 / self.seconds

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics log."""
        return {f"sync/{name}": getattr(self, name) for name in _METRICS} | {"time/sync_weights": self.seconds}
