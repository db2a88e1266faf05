"""Engines: the plug-in inside vLLM's workers, and the handles by which an actor drives an engine. The only importer of vLLM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlsync.engine.handles import Completion, EngineHandle
    from rlsync.engine.handles.http import HttpEngine
    from rlsync.engine.handles.local import Engine
    from rlsync.engine.handles.ray import RayEngine

__all__ = ["Completion", "Engine", "EngineHandle", "HttpEngine", "RayEngine"]

# Loaded on first use: only ``Engine`` imports vLLM.
_HOMES = {"Completion": "", "EngineHandle": "", "Engine": ".local", "HttpEngine": ".http", "RayEngine": ".ray"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlsync.engine' has no attribute {name!r}")
    return getattr(import_module(f"rlsync.engine.handles{_HOMES[name]}"), name)
