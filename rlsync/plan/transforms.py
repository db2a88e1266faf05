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
        is_declared: a source declares the tensors that it stands before, whatever their dtypes. Any other is chosen by dtypes.
    """

    name: str
    sources: frozenset[str]
    destinations: frozenset[str]
    is_fused: bool = False
    is_declared: bool = False


# merge: low-rank adapters are added to the weight, and the sum is cast where dtypes differ.
# scale: lora_B times the adapter's scaling, which engines do not apply.
TRANSFORMS = {
    row.name: row
    for row in (
        Transform("cast", FLOATS, FLOATS, is_fused=True),
        Transform("merge", FLOATS, FLOATS, is_declared=True),
        Transform("scale", FLOATS, FLOATS, is_declared=True),
    )
}


def transform_between(source: str, destination: str, allowed: Iterable[str]) -> str | None:
    """The first of the allowed transforms between two dtypes; empty where they are equal, None where none is."""
    if source == destination:
        return ""
    rows = (TRANSFORMS[name] for name in allowed if not TRANSFORMS[name].is_declared)
    return next((row.name for row in rows if takes(row.name, source, destination)), None)


def takes(name: str, source: str, destination: str) -> bool:
    """Whether a transform makes elements of one dtype of those of another."""
    return source in TRANSFORMS[name].sources and destination in TRANSFORMS[name].destinations
