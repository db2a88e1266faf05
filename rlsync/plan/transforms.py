"""Declared transforms: what may stand before a copy, computed where its source is. A table; pure.

A copy without one is bit for bit. A new transform is a row here and a function of its name in ``rlsync.copy.transforms``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlsync.layout.geometry import FLOATS


@dataclass(frozen=True, slots=True)
class Transform:
    """From elements of one dtype to as many of another.

    Attributes:
        sources, destinations: dtypes that it takes, and that it makes.
        is_fused: copies compute it while they copy, also a reader's. Any other is computed by the sender, and only what the sender packs
            can have one.
    """

    name: str
    sources: frozenset[str]
    destinations: frozenset[str]
    is_fused: bool = False


TRANSFORMS = {row.name: row for row in (Transform("cast", FLOATS, FLOATS, is_fused=True),)}


def transform_between(source: str, destination: str, allowed: Iterable[str]) -> str | None:
    """The first of the allowed transforms between two dtypes; empty where they are equal, None where none is."""
    if source == destination:
        return ""
    rows = (TRANSFORMS[name] for name in allowed)
    return next((row.name for row in rows if source in row.sources and destination in row.destinations), None)
