"""Where tensors lie that others read by address. Owns the look at them, which every sync takes once; knows no copy and no channel."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

import torch

T = TypeVar("T")

# Address and bytes of each of several pieces of memory.
Place = Sequence[tuple[int, int]]
# A walk over thousands of tensors keeps the interpreter from other threads for milliseconds, among them those that pause engines: after
# so many it lets them go first.
_AT_ONCE = 2048
_LET_OTHERS_GO_S = 10e-6


def in_turns(things: Sequence[T]) -> Iterator[Sequence[T]]:
    """All of them, by the thousand; other threads of this process are let go between."""
    for begin in range(0, len(things), _AT_ONCE):
        if begin:
            time.sleep(_LET_OTHERS_GO_S)
        yield things[begin : begin + _AT_ONCE]


def place_of(tensors: Iterable[torch.Tensor]) -> Place:
    """Current addresses and sizes of tensors."""
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


class Places:
    """Addresses and sizes of the buffers of an actor rank, as the last look has found them. For one thread at a time.

    Attributes:
        buffers: by name, the tensors themselves.
        generation: a number for what the last look has found; another look that finds the same has the same one.
        place: of all buffers, in their order.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self.buffers, self.generation = buffers, 0
        self._tensors = list(buffers.values())
        self._found: tuple[list[int], list[int]] = [], []
        self.place: Place = ()
        self.look()

    def look(self) -> None:
        """Look at every buffer. Thousands of experts, in every sync: two lists cost a third of what their pairs do."""
        addresses, sizes = list[int](), list[int]()
        for tensors in in_turns(self._tensors):
            addresses += map(torch.Tensor.data_ptr, tensors)
            sizes += map(attrgetter("nbytes"), tensors)
        if (addresses, sizes) != self._found:
            self._found, self.place = (addresses, sizes), list(zip(addresses, sizes, strict=True))
            self.generation += 1

    def by_name(self) -> dict[str, tuple[int, int]]:
        """Address and bytes of each buffer."""
        return dict(zip(self.buffers, self.place, strict=True))
