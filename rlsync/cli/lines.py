"""Lines of a terminal, for every command and for runs, and amounts in words. Knows widths, spaces and units only."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 80


def wrapped(text: str, width: int = WIDTH, *, indent: int = 4) -> str:
    """Lines broken at spaces to ``width``, the rest indented by ``indent``. Longer words, such as paths, stay whole."""
    fill = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False).fill
    return "\n".join(line if len(line) <= width or line.startswith("  File ") else fill(line) for line in text.splitlines())


def amount(nbytes: int) -> str:
    """Bytes in the unit that leaves few digits."""
    if nbytes < 10 * 2**30:
        return f"{nbytes / 2**20:,.1f} MiB"
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes < 10 * 2**40 else f"{nbytes / 2**40:,.1f} TiB"


def between(amounts: Sequence[int]) -> str:
    """Least and most of some bytes."""
    low, high = min(amounts), max(amounts)
    return amount(low) if low == high else f"{amount(low)} to {amount(high)}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
