"""How the syncs of one WeightSyncer have gone: what failed, in which phase, and which engines are dirty. Counts; judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rlsync.errors import WeightSyncError
from rlsync.sync.report import failure_metrics


class SyncHealth:
    """Kept from the first ``connect`` on, also through failures, so that its numbers can be shown at any time.

    Attributes:
        failures: phase -> attempts to connect or to sync that failed in it.
        dirty: ids of engines that hold weights of no committed version.
    """

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self.dirty: frozenset[str] = frozenset()

    def failed(self, error: BaseException, engine_ids: Iterable[str]) -> None:
        """A connect or a sync of these engines failed; an error without a phase counts as one of the transfer."""
        self.failures[error.phase if isinstance(error, WeightSyncError) else "transfer"] += 1
        self.dirty |= frozenset(engine_ids)

    def committed(self, engine_ids: Iterable[str]) -> None:
        """A sync of these engines committed."""
        self.dirty -= frozenset(engine_ids)

    def metrics(self) -> dict[str, float]:
        """The numbers that a failed sync leaves behind, as in ``SyncReport.metrics``."""
        return {"sync/engines_dirty": len(self.dirty), **failure_metrics(dict(self.failures))}
