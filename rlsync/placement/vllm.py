"""Placement of a vLLM worker, from what its own loaders were seen to write. Pure: knows no vLLM and no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a loader into one buffer of the worker, in the order in which they were made.

    ``offset``, ``shape`` and ``strides`` (elements) describe the region of ``buffer``. Its elements come, in the same order,
    from the HF tensor ``source`` (contiguous, row-major) at ``source_offset`` with ``source_strides``; or, where ``source`` is
    None, each is ``value``; or, where both are None, from something that a loader computed.
    """

    buffer: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source: str | None = None
    source_offset: int = 0
    source_strides: tuple[int, ...] = ()
    value: float | None = None
