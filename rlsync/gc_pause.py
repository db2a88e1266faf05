"""Python's garbage collector, off while millions of objects are made that are no garbage: plans, recorded layouts, imported frameworks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused(*, collect_after: bool = True) -> Iterator[None]:
    """No collection of cycles in this process, in all of its threads, until the block ends. Nests.

    Plans and records are millions of tuples without cycles, and a collector that is on takes as long to look at them as they take to be
    made; importing vLLM or Megatron takes a sixth longer with it.

    Args:
        collect_after: collect at the end of the block, so that the collector does not come to what was made there in the middle of a sync.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
            if collect_after:
                gc.collect(1)
