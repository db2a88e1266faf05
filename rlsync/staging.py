"""Staging: how the bytes of a plan's buckets lie in slots on their way. Pure integers; owns no memory.

A slot holds one bucket for all streams side by side. Each *stream* is one destination of the plan; its part of the bucket is
cut into *segments*, each of them dense and in the order of the destination's memory, so that the taker moves as few and as
large pieces as the destination allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements of one destination buffer that lie together in a slot.

    ``buffer_offset``, ``shape`` and ``strides`` count elements of the destination buffer; in the slot they lie dense and
    row-major over ``shape``, from byte ``slot_offset`` on. ``dtype`` is the destination's.
    """

    buffer: str
    dtype: str
    buffer_offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slot_offset: int

    @property
    def size(self) -> int:
        return prod(self.shape)
