"""The sync service: WeightSyncer keeps engines equal to an actor, version by version."""

from __future__ import annotations

from rlsync.sync.config import SyncConfig
from rlsync.sync.report import SyncReport
from rlsync.sync.source import Source
from rlsync.sync.syncer import WeightSyncer

__all__ = ["Source", "SyncConfig", "SyncReport", "WeightSyncer"]
