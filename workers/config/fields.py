"""One configuration key as a dataclass field that carries its meaning."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def key(default: Any = MISSING, doc: str = "") -> Any:
    """A dataclass field with its meaning in ``metadata["doc"]``; without a default the key is required."""
    return field(default=default, metadata={"doc": doc})
