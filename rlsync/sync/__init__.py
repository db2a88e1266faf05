"""The sync service: WeightSyncer keeps engines equal to an actor, version by version."""

from __future__ import annotations

from rlsync.sync.config import SyncConfig, SyncReport
from rlsync.sync.syncer import BucketSource, WeightSyncer

__all__ = ["BucketSource", "SyncConfig", "SyncReport", "WeightSyncer"]
