"""The sync service: WeightSyncer keeps engines equal to an actor, version by version."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsync.sync.config import SyncConfig
    from rlsync.sync.report import SyncReport
    from rlsync.sync.source import Source
    from rlsync.sync.syncer import WeightSyncer

__all__ = ["Source", "SyncConfig", "SyncReport", "WeightSyncer"]

# Loaded on first use: SyncConfig is plain data, which a configuration is checked against before torch is imported.
_HOMES = {
    "Source": "rlsync.sync.source",
    "SyncConfig": "rlsync.sync.config",
    "SyncReport": "rlsync.sync.report",
    "WeightSyncer": "rlsync.sync.syncer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlsync.sync' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
