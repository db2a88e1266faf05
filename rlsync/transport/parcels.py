"""Parcels: what one actor rank sends to one worker for one bucket, and how its regions lie in it. Owns no memory; sends nothing.

Both ends lay a parcel out from the regions alone. Where one rank gives the whole part, the parcel is the part as it lies in a
slot, and nothing is left to unpack; otherwise the regions follow one another, each dense.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from msgspec.structs import replace

from rlsync.control.shares import ActorParcel, WorkerPart
from rlsync.geometry import DTYPE_BYTES, contiguous_strides
from rlsync.staging import SEGMENT_ALIGNMENT, Region

# A parcel of so many bytes is not cut: every message costs some microseconds.
LEAST_PIECE_BYTES = 2**20


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


def cut(regions: Sequence[Region], num_pieces: int) -> tuple[tuple[Region, ...], ...]:
    """The same elements in so many pieces of about equal bytes, large regions divided; the last pieces of small parcels are empty.

    Both ends cut alike, from the regions alone.
    """
    piece_bytes = max(LEAST_PIECE_BYTES, -(-sum(r.nbytes for r in regions) // num_pieces))
    pieces: list[list[Region]] = [[] for _ in range(num_pieces)]
    at, room = 0, piece_bytes
    for region in regions:
        rest = [region]
        while rest:
            first = rest.pop(0)
            if first.nbytes > room and at < num_pieces - 1:
                here, there = divide(first, room // DTYPE_BYTES[first.dtype])
                pieces[at] += here
                rest = there + rest
                at, room = at + 1, piece_bytes
            else:
                pieces[at].append(first)
                room -= first.nbytes
    return tuple(map(tuple, pieces))


def divide(r: Region, size: int) -> tuple[list[Region], list[Region]]:
    """The first ``size`` elements of a region in row-major order, or a few less so that the rest begins aligned, and the rest."""
    if len(r.shape) == 1:
        size -= size % (SEGMENT_ALIGNMENT // DTYPE_BYTES[r.dtype])
    if size <= 0:
        return [], [r]
    if not r.shape:
        return [r], []
    row = prod(r.shape[1:])
    whole, partly = divmod(size, row)
    if whole >= r.shape[0]:
        return [r], []
    first = [_rows(r, 0, whole)] if whole else []
    if not partly:
        return first, [_rows(r, whole, r.shape[0])]
    here, there = divide(_row(r, whole), partly)
    last = [_rows(r, whole + 1, r.shape[0])] if whole + 1 < r.shape[0] else []
    return first + here, there + last


def _rows(r: Region, begin: int, end: int) -> Region:
    return _from(r, begin, (end - begin, *r.shape[1:]), 0)


def _row(r: Region, number: int) -> Region:
    """One of them, without its dim."""
    return _from(r, number, r.shape[1:], 1)


def _from(r: Region, begin: int, shape: tuple[int, ...], skipped_dims: int) -> Region:
    """From index ``begin`` of the first dim on."""
    return replace(
        r,
        source_offset=r.source_offset + begin * r.source_strides[0],
        source_strides=r.source_strides[skipped_dims:],
        shape=shape,
        buffer_offset=r.buffer_offset + begin * r.buffer_strides[0],
        buffer_strides=r.buffer_strides[skipped_dims:],
        slot_offset=r.slot_offset + begin * r.slot_strides[0] * DTYPE_BYTES[r.dtype],
        slot_strides=r.slot_strides[skipped_dims:],
    )


def placed(memory: torch.Tensor, offset: int, r: Region, strides: tuple[int, ...]) -> torch.Tensor:
    """The view of ``memory`` (1-D uint8) that holds a region from byte ``offset`` on."""
    dtype = getattr(torch, r.dtype)
    extent = (1 + sum((n - 1) * s for n, s in zip(r.shape, strides, strict=True))) * dtype.itemsize
    return memory[offset : offset + extent].view(dtype).as_strided(r.shape, strides)
