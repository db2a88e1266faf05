"""SyncReport, the result of a sync, and SyncHealth, which counts failures; both as numbers for a metrics log. Measures nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from rlsync.errors import WeightSyncError

# Phases in which a sync can fail, as in ``WeightSyncError.phase``.
PHASES = ("connect", "pause", "begin", "transfer", "verify", "commit", "resume")
_NUMBERS = (
    "version", "bytes", "num_buckets", "gb_per_s", "seconds", "pause_s", "begin_s", "fill_s", "transfer_s", "wait_s", "pull_s", "verify_s",
    "finalize_s", "commit_s", "resume_s", "extra_bytes", "held_bytes", "staged_bytes", "max_redundancy", "engines_dirty",
)  # fmt: skip


class SyncReport(msgspec.Struct, frozen=True, kw_only=True):
    """One committed sync as rank 0 saw it; the same object's fields on all actor ranks.

    Attributes:
        sinks: what workers used: ``direct``, ``layerwise``, ``direct+layerwise`` or ``loaders``.
        transport: what the bytes went through; several are joined by ``+``.
        bytes: bytes that destinations take in, each once. Several workers of one host that read the same ones are one destination.
        held_bytes: beside these, bytes that destinations hold from an earlier sync, because the actor does not train them.
        staged_bytes: of ``bytes``, those that ``ipc`` read from a staging ring in GPU memory and not from the parameters.
        bytes_by_link, redundancy: of the plan, by link name and by destination; see ``rlsync.plan.links.Traffic``.
        seconds: from the call of ``sync`` to the last engine that serves again.
        pause_s: until every worker was inside its update, so that no engine could go on; runs beside ``begin_s`` and the first fills.
        begin_s: rank 0's ``Source.begin``, which makes the parameters fresh.
        fill_s: rank 0's time inside fills, checksums included; overlaps pulling.
        transfer_s: from all engines paused to the last commit.
        wait_s, pull_s, verify_s, finalize_s: of the slowest worker in each: waiting for buckets, copying them, checksums,
            and the work after the last bucket.
        commit_s: from the last commit until every engine has ended its update, reset its caches and said so. resume_s: beside that, what
            an engine took that does not go on by itself.
        extra_bytes: most memory that a worker took for the sync beside the ring.
        engine_s: seconds of each engine's part, by engine id.
        link_gb_per_s: 10^9 bytes per second that the link was measured to carry at connect, or None where nobody measured it.
        engines_dirty: engines of this connection that are dirty now. failures: syncs that did not commit, by phase, since the
            syncer was made. See ``SyncHealth``.
        differences: of a comparison, by worker; see ``rlsync.sync.comparison``. Empty in a sync.
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
    staged_bytes: int = 0
    held_bytes: int = 0
    link_gb_per_s: float | None = None
    engines_dirty: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    differences: tuple[tuple[str, ...], ...] = ()

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second of the whole sync."""
        return self.bytes / 1e9 / self.seconds

    @property
    def max_redundancy(self) -> float:
        """Bytes received over bytes held, of the worst destination; 1.0 is each byte once."""
        return max(self.redundancy.values())

    @property
    def floor_s(self) -> float | None:
        """Seconds that the link alone needs for the bytes, or None where its speed is not known."""
        return None if self.link_gb_per_s is None else self.bytes / 1e9 / self.link_gb_per_s

    @property
    def floor_ratio(self) -> float | None:
        """The whole sync over its floor: 1.0 would be a sync that costs nothing but the link."""
        return None if self.floor_s is None else self.seconds / self.floor_s

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics log; every name is explained in docs/metrics.md.

        A name is 1.0 for each sink and transport in use. The link's numbers are there where its speed is known.
        """
        flat: dict[str, float] = {f"sync/{name}": getattr(self, name) for name in _NUMBERS}
        flat |= {f"sync/bytes_{link.replace(' ', '_')}": nbytes for link, nbytes in self.bytes_by_link.items()}
        flat |= {f"sync/sink_{sink}": 1.0 for used in self.sinks for sink in used.split("+")}
        flat |= {f"sync/transport_{name}": 1.0 for name in self.transport.split("+")}
        floor = {"link_gb_per_s": self.link_gb_per_s, "floor_s": self.floor_s, "floor_ratio": self.floor_ratio}
        flat |= {f"sync/{name}": value for name, value in floor.items() if value is not None}
        flat |= failure_metrics(self.failures)
        return flat | {"time/sync_weights": self.seconds}


def failure_metrics(failures: dict[str, int]) -> dict[str, float]:
    """Counts of syncs that did not commit, in all and by phase; phases without one are there as zero."""
    by_phase = {f"sync/failures_{phase}": failures.get(phase, 0) for phase in PHASES}
    return {"sync/failures": sum(failures.values()), **by_phase}


class SyncHealth:
    """Kept from the first ``connect`` on, also through failures, so that its numbers can be shown at any time.

    Attributes:
        failures: phase -> attempts to connect or to sync that failed in it.
        dirty: ids of engines that hold weights of no committed version.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self.dirty: frozenset[str] = frozenset()

    def failed(self, error: BaseException, engine_ids: Iterable[str], phase: str = "transfer") -> None:
        """A connect or a sync of these engines failed; ``phase`` counts where the error has none."""
        self.failures[error.phase if isinstance(error, WeightSyncError) else phase] += 1
        self.dirty |= frozenset(engine_ids)

    def committed(self, engine_ids: Iterable[str]) -> None:
        """A sync of these engines committed."""
        self.dirty -= frozenset(engine_ids)

    def metrics(self) -> dict[str, float]:
        """The numbers that a failed sync leaves behind, as in ``SyncReport.metrics``."""
        return {"sync/engines_dirty": len(self.dirty), **failure_metrics(dict(self.failures))}
