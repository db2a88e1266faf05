"""What the steps of one case took. Plain data that crosses processes as JSON."""

from __future__ import annotations

from typing import Any

import msgspec


class Measured(msgspec.Struct, kw_only=True):
    """One case.

    Attributes:
        kind: ``rlsync`` or ``peer``.
        connect_s: until the first step could begin.
        first: the first step, which allocates what later ones use again.
        steps: seconds by phase of the measured steps, in order.
        begin_s, end_s: from before the connection to after the last measured step, by the monotonic clock that all processes share.
        extra_torch_bytes: most that torch allocated in that time beyond what it had before, of an actor rank and of a worker.
        fingerprints: of all workers after each of two more steps, whose weights differ.
        report: SyncReport of the last step, of rlsync alone.
        error: why there are no steps.
    """

    name: str
    kind: str
    remark: str = ""
    settings: dict[str, Any] = {}
    connect_s: float = 0.0
    first: dict[str, float] = {}
    steps: list[dict[str, float]] = []
    begin_s: float = 0.0
    end_s: float = 0.0
    extra_torch_bytes: dict[str, int] = {}
    fingerprints: list[str] = []
    report: dict[str, Any] = {}
    error: str = ""
