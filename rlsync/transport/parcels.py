"""Parcels: what one actor rank sends to one worker for one bucket, and how its regions lie in it. Owns no memory; sends nothing.

Both ends lay a parcel out from the regions alone. Where one rank gives the whole part, the parcel is the part as it lies in a
slot, and nothing is left to unpack; otherwise the regions follow one another, each dense.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rlsync.control.shares import WorkerPart
from rlsync.copy.cpu import CopyProgram
from rlsync.geometry import contiguous_strides
from rlsync.staging import SEGMENT_ALIGNMENT, Region


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


def parcels_of(part: WorkerPart) -> tuple[Parcel, ...]:
    """What a worker receives of a bucket, by actor rank; an actor rank has the same number in the group."""
    groups: dict[int, list[Region]] = defaultdict(list)
    for region in part.regions:
        groups[region.source].append(region)
    whole_bytes = part.nbytes if len(groups) == 1 else 0
    return tuple(make_parcel(source, regions, whole_bytes) for source, regions in sorted(groups.items()))


def bind_unpack(parcels: Iterable[tuple[Parcel, torch.Tensor]], slot: torch.Tensor) -> CopyProgram:
    """Copies from parcels, each with its memory, to where their regions lie in the part (1-D uint8)."""
    return CopyProgram(
        (placed(slot, r.slot_offset, r, r.slot_strides), view)
        for parcel, memory in parcels
        for r, view in zip(parcel.regions, parcel.views(memory), strict=True)
    )


def placed(memory: torch.Tensor, offset: int, r: Region, strides: tuple[int, ...]) -> torch.Tensor:
    """The view of ``memory`` (1-D uint8) that holds a region from byte ``offset`` on."""
    dtype = getattr(torch, r.dtype)
    extent = (1 + sum((n - 1) * s for n, s in zip(r.shape, strides, strict=True))) * dtype.itemsize
    return memory[offset : offset + extent].view(dtype).as_strided(r.shape, strides)
