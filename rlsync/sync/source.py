"""The seam of the actor's side: what WeightSyncer needs of whoever holds weights, and what is computed before they are copied."""

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
    """What the sender computes before it copies, other than a cast: merged adapters, scaled factors.

    Attributes:
        transforms: HF name -> name of a row of ``rlsync.plan.transforms.TRANSFORMS``; the same on all ranks. Other tensors are copied as
            they lie.
        compute: takes names of buffers of this rank, and returns for each a new contiguous tensor of as many elements, in their order,
            from which these tensors are copied. Called once for each bucket that has such tensors; not collective. None where nothing is
            declared.
        adapter: which tensors are LoRA factors that engines hold beside the base (``weight_sync.lora=adapter``); the same on all ranks.
            None where engines get weights alone.
    """

    transforms: Mapping[str, str] = field(default_factory=dict)
    compute: Callable[[Sequence[str]], Sequence[torch.Tensor]] | None = None
    adapter: AdapterFactors | None = None


class Source(Protocol):
    """The weights of an actor as one actor rank sees them. ``rlsync.MegatronSource`` is one."""

    @property
    def tensors(self) -> Sequence[TensorSpec]:
        """Every HF tensor, in the order in which buckets carry them; the same on all ranks."""
        ...

    @property
    def placements(self) -> Sequence[Placement]:
        """Which boxes of which tensors each actor rank holds, and where in its buffers; index is the rank. The same on all ranks."""
        ...

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """The memory of this rank's placement by buffer name: contiguous tensors in host memory or on one GPU.

        The tensor objects, their shapes and dtypes stay the same from ``connect`` to ``close``; addresses may change between syncs.
        """
        ...

    @property
    def stable_memory(self) -> bool:
        """Whether the buffers stay allocated between syncs. False where they are offloaded: engines then unmap them after each sync."""
        ...

    @property
    def frozen(self) -> frozenset[str]:
        """HF tensors of which this rank holds a part that does not change after the first sync.

        A tensor that is frozen on every rank that holds it is sent to an engine once; its checksums are compared in every sync.
        """
        ...

    @property
    def declared(self) -> Declared:
        """What is computed from the buffers before it is copied; ``Declared()`` where nothing is."""
        ...

    def begin(self, version: int) -> None:
        """Bring the buffers up to date for ``version``, as by gathering parameters after an optimizer step.

        Called in each sync before anything is read. May be collective over the actor ranks.
        """
        ...


def ranges_of(names: Collection[str], tensors: Sequence[TensorSpec]) -> tuple[tuple[int, int], ...]:
    """The positions of the named tensors in ``tensors``, as half-open ranges."""
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
