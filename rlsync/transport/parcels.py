"""Parcels: what one actor rank sends to one worker for one bucket, and how its regions lie in it. Owns no memory; sends nothing.

Both ends lay a parcel out from the regions alone. Where one rank gives the whole part, the parcel is the part as it lies in a
slot, and nothing is left to unpack; otherwise the regions follow one another, each dense.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rlsync.coordinator.assignments import ActorParcel, WorkerPart
from rlsync.layout.geometry import contiguous_strides
from rlsync.plan.packing import SEGMENT_ALIGNMENT, Region, cut


@dataclass(frozen=True, slots=True)
class Parcel:
    """``peer`` is the rank of the other end in the group. ``places[i]``: byte offset and strides (elements) of ``regions[i]``."""

    peer: int
    nbytes: int
    regions: tuple[Region, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The regions where they lie in ``memory`` (1-D uint8 of ``nbytes``), in their shapes and dtypes."""
        return [placed(memory, offset, r, strides) for r, (offset, strides) in zip(self.regions, self.places, strict=True)]


def make_parcel(peer: int, regions: Sequence[Region], whole_bytes: int) -> Parcel:
    """``whole_bytes``: bytes of the part where ``regions`` are all of it, or 0."""
    if whole_bytes:
        return Parcel(peer, whole_bytes, tuple(regions), tuple((r.slot_offset, r.slot_strides) for r in regions))
    places, cursor = [], 0
    for r in regions:
        places.append((cursor, contiguous_strides(r.shape)))
        cursor += -(-r.nbytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
    return Parcel(peer, cursor, tuple(regions), tuple(places))


def steps_to(parcels: Iterable[ActorParcel], num_steps: int) -> tuple[tuple[Parcel, ...], ...]:
    """What an actor rank sends of a bucket, by step."""
    return _by_step([(p.taker, p.regions, p.whole_bytes) for p in parcels], num_steps)


def steps_of(part: WorkerPart, num_steps: int = 1) -> tuple[tuple[Parcel, ...], ...]:
    """What a worker receives of a bucket, by step and actor rank; an actor rank has the same number in the group."""
    groups: dict[int, list[Region]] = defaultdict(list)
    for region in part.regions:
        groups[region.source].append(region)
    whole_bytes = part.nbytes if len(groups) == 1 else 0
    return _by_step([(source, regions, whole_bytes) for source, regions in sorted(groups.items())], num_steps)


def _by_step(given: Iterable[tuple[int, Sequence[Region], int]], num_steps: int) -> tuple[tuple[Parcel, ...], ...]:
    """``given``: peer, regions, and bytes of the part where they are all of it."""
    if num_steps == 1:
        return (tuple(make_parcel(*each) for each in given),)
    cuts = [(peer, cut(regions, num_steps)) for peer, regions, _ in given]
    return tuple(tuple(make_parcel(peer, pieces[step], 0) for peer, pieces in cuts if pieces[step]) for step in range(num_steps))


def placed(memory: torch.Tensor, offset: int, r: Region, strides: tuple[int, ...]) -> torch.Tensor:
    """The view of ``memory`` (1-D uint8) that holds a region from byte ``offset`` on."""
    dtype = getattr(torch, r.dtype)
    extent = (1 + sum((n - 1) * s for n, s in zip(r.shape, strides, strict=True))) * dtype.itemsize
    return memory[offset : offset + extent].view(dtype).as_strided(r.shape, strides)
