"""Lines of a terminal, for every command and for runs. Knows widths and spaces only."""

from __future__ import annotations

import textwrap

WIDTH = 80


def wrapped(text: str, width: int = WIDTH, *, indent: int = 4) -> str:
    """Lines broken at spaces to ``width``, the rest indented by ``indent``. Longer words, such as paths, stay whole."""
    fill = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False).fill
    return "\n".join(line if len(line) <= width or line.startswith("  File ") else fill(line) for line in text.splitlines())
