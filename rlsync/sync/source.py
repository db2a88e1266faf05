"""The seam of the actor's side: whose weights a sync sends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

from rlsync.coordinator.messages import AdapterFactors
from rlsync.layout.geometry import Placement, TensorSpec


@dataclass(frozen=True, slots=True)
class Declared:
    """Transforms that a source declares, of what is more than a cast of one of its buffers.

    Attributes:
        transforms: rows of ``rlsync.plan.transforms`` by HF tensor; the same on all ranks.
        compute: gives for buffers of this rank, by name, new contiguous tensors of their shapes, out of which such tensors are taken.
            Called once for each bucket that has some of them; not collective.
        adapter: which of the tensors are low-rank adapters that engines hold beside the others, for ``weight_sync.lora=adapter``; the
            same on all ranks. None: engines know of none.
    """

    transforms: Mapping[str, str] = field(default_factory=dict)
    compute: Callable[[Sequence[str]], Sequence[torch.Tensor]] | None = None
    adapter: AdapterFactors | None = None


class Source(Protocol):
    """Weights of the actor; one on each actor rank."""

    @property
    def tensors(self) -> Sequence[TensorSpec]:
        """Every HF tensor, in the order in which buckets carry them; the same on all ranks."""
        ...

    @property
    def placements(self) -> Sequence[Placement]:
        """What each actor rank holds, by rank; the same on all ranks."""
        ...

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Memory of this rank's placement, by buffer name: contiguous tensors, the same objects for good, of constant shape and dtype."""
        ...

    @property
    def stable_memory(self) -> bool:
        """Whether the buffers stay allocated between syncs. If not, engines unmap them at the end of each sync."""
        ...

    @property
    def frozen(self) -> frozenset[str]:
        """HF tensors of which this rank holds a part, and trains none of it: they stay what they are from the first sync on.

        Engines that hold them are not sent them again; checksums of both sides are compared in every sync nevertheless.
        """
        ...

    @property
    def declared(self) -> Declared:
        """What the sender computes of the buffers before it is copied; ``Declared()`` where all is sent as it lies."""
        ...

    def begin(self, version: int) -> None:
        """Make the weights those of ``version``. May be collective over the actor ranks."""
        ...


def ranges_of(names: Collection[str], tensors: Sequence[TensorSpec]) -> tuple[tuple[int, int], ...]:
    """The numbers of the named tensors as half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for number in (number for number, tensor in enumerate(tensors) if tensor.name in names):
        if ranges and ranges[-1][1] == number:
            ranges[-1] = ranges[-1][0], number + 1
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)


def source_digest(tensors: Sequence[TensorSpec], placement: Placement) -> str:
    """SHA-256 of the tensors and of one rank's placement."""
    return hashlib.sha256(msgspec.msgpack.encode((tuple(tensors), placement))).hexdigest()
