"""Addresses of tensors that copy programs, checksums and other processes read. Owns the look at them, which every sync takes once.

Knows no copy and no channel.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

import torch

T = TypeVar("T")

# Address and bytes of each of several tensors, in their order.
MemoryRanges = Sequence[tuple[int, int]]
# A walk over thousands of tensors holds the interpreter's lock for milliseconds, and keeps it from the threads that pause engines: after
# so many tensors it lets others have it.
_BATCH_TENSORS = 2048
_YIELD_S = 10e-6


def in_batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """All of them, 2,048 at a time; between two batches other threads of this process may run."""
    for begin in range(0, len(things), _BATCH_TENSORS):
        if begin:
            time.sleep(_YIELD_S)
        yield things[begin : begin + _BATCH_TENSORS]


def memory_ranges(tensors: Iterable[torch.Tensor]) -> MemoryRanges:
    """Current addresses and sizes of tensors."""
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


class BufferAddresses:
    """Where the buffers of an actor rank lie in memory, as of the last ``refresh``. For one thread at a time.

    Attributes:
        buffers: by name, the tensors themselves.
        generation: grows when a ``refresh`` finds another address or size than the one before.
        ranges: address and bytes of each buffer, in their order.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self.buffers, self.generation = buffers, 0
        self._tensors = list(buffers.values())
        self._found: tuple[list[int], list[int]] = [], []
        self.ranges: MemoryRanges = ()
        self.refresh()

    def refresh(self) -> None:
        """Look at every buffer. Thousands of experts, in every sync: two lists cost a third of what their pairs do."""
        addresses, sizes = list[int](), list[int]()
        for tensors in in_batches(self._tensors):
            addresses += map(torch.Tensor.data_ptr, tensors)
            sizes += map(attrgetter("nbytes"), tensors)
        if (addresses, sizes) != self._found:
            self._found, self.ranges = (addresses, sizes), list(zip(addresses, sizes, strict=True))
            self.generation += 1

    def by_name(self) -> dict[str, tuple[int, int]]:
        """Address and bytes of each buffer."""
        return dict(zip(self.buffers, self.ranges, strict=True))
