"""The CPU copier: strided copies bound to tensors once, replayed every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from rlsync.layout.geometry import Fill, collapse, contiguous_strides
from rlsync.plan.planner import Copy

Buffers = Mapping[str, torch.Tensor]
# Segments of a packed message start at multiples of this many bytes, so that any dtype can view them.
SEGMENT_ALIGNMENT = 16


def region(buffer: torch.Tensor, offset: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """The view of ``buffer`` (contiguous, any shape) that a copy reads or writes; ``offset`` and ``strides`` in elements."""
    assert buffer.is_contiguous(), "plans address contiguous buffers"
    return buffer.detach().as_strided(tuple(shape), tuple(strides), buffer.storage_offset() + offset)


class CopyProgram:
    """Pairs of views, copied in one call. The views keep their storages alive."""

    __slots__ = ("_destinations", "_sources", "nbytes")

    def __init__(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """``pairs`` are (destination view, source view) of equal shape; floating dtypes may differ and are cast."""
        pairs = tuple(pairs)
        self._destinations = [d for d, _ in pairs]
        self._sources = [s for _, s in pairs]
        self.nbytes = sum(d.numel() * d.element_size() for d in self._destinations)

    def run(self) -> int:
        """Execute every copy; returns the bytes written."""
        if self._destinations:
            torch._foreach_copy_(self._destinations, self._sources)
        return self.nbytes


def bind(copies: Iterable[Copy], sources: Buffers, destinations: Buffers) -> CopyProgram:
    """Bind copies to the buffers of their one source and one destination holder."""
    return CopyProgram(
        (
            region(destinations[c.destination_buffer], c.destination_offset, c.shape, c.destination_strides),
            region(sources[c.source_buffer], c.source_offset, c.shape, c.source_strides),
        )
        for c in copies
    )


def write_fills(fills: Iterable[Fill], destinations: Buffers) -> None:
    """Write the constants that no HF element supplies."""
    for fill in fills:
        shape, (strides,) = collapse(fill.shape, fill.strides)
        region(destinations[fill.buffer], fill.offset, shape, strides).fill_(fill.value)


def packed_bytes(copies: Iterable[Copy], item_bytes: Mapping[str, int]) -> int:
    """Bytes of a message that carries the sources of ``copies`` back to back; ``item_bytes`` is per HF tensor."""
    return sum(_aligned(c.size * item_bytes[c.tensor]) for c in copies)


def bind_pack(copies: Iterable[Copy], sources: Buffers, message: torch.Tensor) -> CopyProgram:
    """Copies from source buffers into a message (uint8, 1-D), one segment per copy in the order given."""
    pairs, cursor = [], 0
    for c in copies:
        source = region(sources[c.source_buffer], c.source_offset, c.shape, c.source_strides)
        segment, cursor = _segment(message, cursor, source.dtype, c)
        pairs.append((segment, source))
    return CopyProgram(pairs)


def bind_unpack(copies: Iterable[Copy], message: torch.Tensor, destinations: Buffers, dtypes: Mapping[str, torch.dtype]) -> CopyProgram:
    """Copies from a message made by :func:`bind_pack` with the same copies; ``dtypes`` are the source's, per HF tensor."""
    pairs, cursor = [], 0
    for c in copies:
        segment, cursor = _segment(message, cursor, dtypes[c.tensor], c)
        pairs.append((region(destinations[c.destination_buffer], c.destination_offset, c.shape, c.destination_strides), segment))
    return CopyProgram(pairs)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT


def _segment(message: torch.Tensor, cursor: int, dtype: torch.dtype, copy: Copy) -> tuple[torch.Tensor, int]:
    nbytes = copy.size * dtype.itemsize
    flat = message[cursor : cursor + nbytes].view(dtype)
    return flat.as_strided(copy.shape, contiguous_strides(copy.shape)), cursor + _aligned(nbytes)
