"""One configuration key as a dataclass field that carries its meaning, and for a number the values it may have."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Bounds:
    """Values that a number may have: from ``min`` or above ``above``, to ``max`` or below ``below``."""

    min: float | None = None
    above: float | None = None
    max: float | None = None
    below: float | None = None

    def finding(self, value: float) -> str | None:
        """What the value must be and is not, or None. A nan or an infinity is never right."""
        if not math.isfinite(value):
            return "must be a finite number"
        is_within = (
            (self.min is None or value >= self.min)
            and (self.above is None or value > self.above)
            and (self.max is None or value <= self.max)
            and (self.below is None or value < self.below)
        )
        return None if is_within else f"must be {self}"

    def __str__(self) -> str:
        limits = (("at least", self.min), ("greater than", self.above), ("at most", self.max), ("less than", self.below))
        return " and ".join(f"{words} {limit}" for words, limit in limits if limit is not None)


ANY_NUMBER = Bounds()


def bounds_of(declared: Field[Any]) -> Bounds | None:
    """Values that the number of a field may have; None where the field is no number. Fields of the library state plain limits."""
    if "limits" in declared.metadata:
        return Bounds(**declared.metadata["limits"]) if declared.metadata["limits"] else None
    bounds: Bounds | None = declared.metadata["bounds"]
    return bounds


# What numpy, torch and vLLM all take.
SEED = Bounds(min=0, max=2**32 - 1)


def key(
    default: Any = MISSING,
    doc: str = "",
    *,
    min: float | None = None,
    above: float | None = None,
    max: float | None = None,
    below: float | None = None,
    bounds: Bounds | None = None,
) -> Any:
    """A dataclass field with its meaning in ``metadata["doc"]``; without a default the key is required.

    A number names its ``bounds``, as such or by their parts; ``ANY_NUMBER`` where it may be any.
    """
    given = Bounds(min, above, max, below)
    return field(default=default, metadata={"doc": doc, "bounds": bounds if bounds is not None else given if given != ANY_NUMBER else None})
