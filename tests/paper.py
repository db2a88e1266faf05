"""Placements of single engine workers on paper."""

from __future__ import annotations

from dataclasses import replace

from rlsync.layout.geometry import Location, Placement
from rlsync.models.paper import Seat, paper_workers
from rlsync.models.stacks import Model


def paper_worker(model: Model, seat: Seat, *, holder: str, dtype: str | None = None, location: Location | None = None) -> Placement:
    """What the worker in this seat holds, as ``paper_workers`` has it."""
    (worker,) = paper_workers(model, (seat,), dtype=dtype)
    return replace(worker, holder=holder, location=location)
