"""rlsync: keeps the weights of vLLM rollout engines equal to those of a Megatron-Core actor."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsync.bridge.auto_bridge import AutoBridge
    from rlsync.bridge.source import MegatronSource
    from rlsync.layout.topology import Topology
    from rlsync.sync import SyncConfig, SyncReport, WeightSyncer

__version__ = "0.1.0"
__all__ = ["AutoBridge", "MegatronSource", "SyncConfig", "SyncReport", "Topology", "WeightSyncer"]

# Loaded on first use: a vLLM worker that imports the plug-in must not import Megatron, nor a trainer vLLM.
_HOMES = {
    "AutoBridge": "rlsync.bridge.auto_bridge",
    "MegatronSource": "rlsync.bridge.source",
    "SyncConfig": "rlsync.sync",
    "SyncReport": "rlsync.sync",
    "Topology": "rlsync.layout.topology",
    "WeightSyncer": "rlsync.sync",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlsync' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
