"""The interpreter's collection of cycles, kept out of plans and records of layouts. Knows neither."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Plans and records are millions of tuples, and none of them are in cycles: to look for some takes as long as to make them.

    For the whole process: what other threads leave in cycles is collected afterwards. So is what was made here and stays, which would
    otherwise be looked at in the middle of a sync.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
            gc.collect(1)
