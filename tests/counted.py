"""Work counted in calls of functions, Python's and C's: the same number on a fast machine, a slow one and a busy one."""

from __future__ import annotations

import sys
from collections.abc import Callable


def num_calls(work: Callable[[], object]) -> int:
    """Of functions, that ``work`` makes in this thread."""
    count = 0

    def on_event(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
