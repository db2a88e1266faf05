"""Exceptions of rlsync, and the form of their messages.

Every public failure is one of these, and each message names both sides and what to do.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence


class RlsyncError(Exception):
    """Base of every error rlsync raises on purpose."""


class ConfigError(RlsyncError, ValueError):
    """A configuration key, model config or topology that cannot work. Raised before any work is done."""


class PlacementError(RlsyncError, ValueError):
    """Two descriptions of the same weights disagree: missing, unexpected, doubled or wrongly shaped tensors.

    All findings of one comparison are collected into a single error, whose message has the first few and a count.
    """


class CheckpointError(RlsyncError):
    """A checkpoint on disk is incomplete, truncated or not what its index says."""


class GradientError(RlsyncError):
    """Gradients of a step are not finite. The optimizer has changed no weight by them."""


class WeightSyncError(RlsyncError):
    """A sync did not commit. Raised with the same fields on every actor rank and reported by every engine.

    Attributes:
        phase: one of ``connect, pause, begin, transfer, verify, commit, resume``.
        engine: identifier of the engine the failure was seen on, or None when an actor rank failed.
        version: version that was being synced, or None during ``connect``.
        bucket: index of the bucket in flight, or None outside ``transfer``.
        cause: one paragraph; carries the remote traceback where there is one.
    """

    def __init__(self, *, phase: str, cause: str, engine: str | None = None, version: int | None = None, bucket: int | None = None):
        self.phase, self.cause, self.engine, self.version, self.bucket = phase, cause, engine, version, bucket
        where = ", ".join(
            f"{key} {value}" for key, value in (("engine", engine), ("version", version), ("bucket", bucket)) if value is not None
        )
        super().__init__(f"weight sync failed in {phase}{f' ({where})' if where else ''}: {cause}")

    def __reduce__(self) -> tuple[object, ...]:
        # Crosses processes (Ray, multiprocessing), where the default would call __init__ with the message alone.
        return _weight_sync_error, (self.phase, self.cause, self.engine, self.version, self.bucket)


def _weight_sync_error(phase: str, cause: str, engine: str | None, version: int | None, bucket: int | None) -> WeightSyncError:
    return WeightSyncError(phase=phase, cause=cause, engine=engine, version=version, bucket=bucket)


class EngineCallError(RlsyncError):
    """An engine's part of a sync failed.

    Attributes:
        call: in which an engine failed: ``pause``, ``update`` or ``resume``.
    """

    def __init__(self, call: str, cause: str) -> None:
        super().__init__(cause)
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return EngineCallError, (self.call, str(self))


class EngineDirtyError(RlsyncError):
    """The engine holds weights of no committed version and refuses to generate until a complete sync or a restart."""


def error_text(error: BaseException) -> str:
    """What another process is told of an error: the message of one of ours, or of a timeout; of any other its whole traceback."""
    return str(error) if isinstance(error, RlsyncError | TimeoutError) else "".join(traceback.format_exception(error)).strip()


def first_few(items: Sequence[str], most: int = 8, *, separator: str = ", ") -> str:
    """The first ``most`` items and the number of the others, for a message that can be read however many there are."""
    rest = len(items) - most
    return separator.join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
