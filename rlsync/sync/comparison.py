"""Does an engine hold these weights? The data path of a sync with sinks that compare; nothing in the engine changes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlsync.engine.handles import EngineHandle, PauseMode, SyncOrder, sync_in_turn
from rlsync.errors import ConfigError, RlsyncError, WeightSyncError
from rlsync.sync.config import SyncConfig
from rlsync.sync.source import Source
from rlsync.sync.syncer import WeightSyncer


class _Compared:
    """A handle whose engine compares instead of syncing. It is paused meanwhile, and resumed unchanged."""

    def __init__(self, engine: EngineHandle) -> None:
        self._engine, self._info = engine, dict[str, Any]()
        self.engine_id, self.num_workers = engine.engine_id, engine.num_workers
        # Whether the engine has paused, and the comparison that has failed.
        self._turn, self._is_paused, self._over = threading.Lock(), False, ""

    @property
    def state(self) -> str:
        return self._engine.state

    @property
    def version(self) -> int | None:
        return self._engine.version

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        self._info = {**init_info, "purpose": "compare"}
        self._engine.init_weight_transfer(self._info, timeout_s)

    def sync(self, order: SyncOrder) -> float:
        return sync_in_turn(self, order)

    def pause(self, mode: PauseMode, sync: str, timeout_s: float) -> None:
        self._refuse_what_is_over(sync)
        try:
            self._engine.pause(mode, sync, timeout_s)
        except BaseException:
            # It may have paused all the same; one that has become dirty says so here, too.
            with contextlib.suppress(RlsyncError, TimeoutError):
                self._engine.resume(self._engine.version, timeout_s)
            raise
        with self._turn:
            self._is_paused = not sync or sync != self._over
        if not self._is_paused:
            self._engine.resume(self._engine.version, timeout_s)
            self._refuse_what_is_over(sync)

    def _refuse_what_is_over(self, sync: str) -> None:
        if sync and sync == self._over:
            raise RlsyncError(f"the comparison with engine {self.engine_id} has failed already")

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        # No cache is reset: the engine keeps its weights.
        self._engine.init_weight_transfer({**self._info, "attempt": update_info["attempt"]}, timeout_s)

    def resume(self, version: int | None, timeout_s: float) -> None:
        self._engine.resume(self._engine.version, timeout_s)
        self._is_paused = False

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        """Nothing is dirty: after a failed comparison the engine serves as before. One that is being paused is resumed behind its pause."""
        with self._turn:
            self._over, is_paused, self._is_paused = sync, self._is_paused, False
        if is_paused:
            self._engine.resume(self._engine.version, 60.0)


def compare_engines(source: Source, engines: Sequence[EngineHandle], config: SyncConfig | None = None) -> tuple[tuple[str, ...], ...]:
    """Paths of the tensors of each worker that differ from ``source``; empty where all are equal.

    Engines are paused for as long as a sync would take and keep requests, caches, version and any connection. Workers come in
    the order of ``engines``. ``source`` is the only actor rank. Raises
    ConfigError for an engine that is not clean, WeightSyncError where names or shapes do not fit.
    """
    unfit = [f"{engine.engine_id} ({engine.state})" for engine in engines if engine.state != "clean"]
    if unfit:
        # Resuming a dirty engine would make it serve.
        raise ConfigError(f"engines that cannot be compared: {', '.join(unfit)}; only a clean one holds a version")
    config = SyncConfig(pause_mode="keep") if config is None else replace(config, pause_mode="keep")
    if len(source.placements) != 1:
        raise WeightSyncError(phase="connect", cause=f"a comparison has one source, this one counts {len(source.placements)} ranks")
    with WeightSyncer(source, [_Compared(engine) for engine in engines], replace(config, verify="full")) as syncer:
        syncer.connect()
        return syncer.sync(0).differences
