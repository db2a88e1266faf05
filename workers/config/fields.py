"""How a key of the configuration is declared, and how the keys of a section are walked: for every file with sections of the yaml.

Owns limits of numbers, ``key`` and the types that many sections have. Knows no key.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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


Precision = Literal["fp32", "bf16", "fp16"]
Task = Literal["reasoning", "sft"]


@functools.cache
def annotations_of(cls: type) -> Mapping[str, Any]:
    """Types of the keys of a configuration class by name. Reading them from the source takes longer than filling the class."""
    return get_type_hints(cls)


@functools.cache
def section_of(annotation: Any) -> type | None:
    """The dataclass of a section key (also when optional), or None for a plain key."""
    options: tuple[Any, ...] = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of every key of a configuration class, sections included."""
    for name, annotation in annotations_of(cls).items():
        yield prefix + name
        section = section_of(annotation)
        if section is not None:
            yield from dotted_keys(section, f"{prefix}{name}.")
