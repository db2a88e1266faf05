"""The CPU copier: strided copies bound to tensors once, replayed every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from rlsync.layout.geometry import Padding, collapse, contiguous_strides
from rlsync.plan.packing import side_by_side
from rlsync.plan.planner import Copy

Buffers = Mapping[str, torch.Tensor]


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


def write_padding(padding: Iterable[Padding], destinations: Buffers) -> None:
    """Write the constants that no HF element supplies."""
    for box in padding:
        shape, (strides,) = collapse(box.shape, box.strides)
        region(destinations[box.buffer], box.offset, shape, strides).fill_(box.value)


def packed_bytes(copies: Iterable[Copy], item_bytes: Mapping[str, int]) -> int:
    """Bytes of a message that carries the sources of ``copies`` side by side; ``item_bytes`` is per HF tensor."""
    return side_by_side(c.size * item_bytes[c.tensor] for c in copies)[-1]


def bind_pack(copies: Iterable[Copy], sources: Buffers, message: torch.Tensor) -> CopyProgram:
    """Copies from source buffers into a message (uint8, 1-D), side by side in the order given."""
    copies = tuple(copies)
    views = [region(sources[c.source_buffer], c.source_offset, c.shape, c.source_strides) for c in copies]
    return CopyProgram(zip(_in_message(copies, message, [view.dtype for view in views]), views, strict=True))


def bind_unpack(copies: Iterable[Copy], message: torch.Tensor, destinations: Buffers, dtypes: Mapping[str, torch.dtype]) -> CopyProgram:
    """Copies from a message made by :func:`bind_pack` with the same copies; ``dtypes`` are the source's, per HF tensor."""
    copies = tuple(copies)
    views = [region(destinations[c.destination_buffer], c.destination_offset, c.shape, c.destination_strides) for c in copies]
    return CopyProgram(zip(views, _in_message(copies, message, [dtypes[c.tensor] for c in copies]), strict=True))


def _in_message(copies: Sequence[Copy], message: torch.Tensor, dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """The view of a message for each copy."""
    sizes = [c.size * dtype.itemsize for c, dtype in zip(copies, dtypes, strict=True)]
    flat = [message[at : at + size] for at, size in zip(side_by_side(sizes), sizes, strict=False)]
    return [view.view(dtype).as_strided(c.shape, contiguous_strides(c.shape)) for c, view, dtype in zip(copies, flat, dtypes, strict=True)]
