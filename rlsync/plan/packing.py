"""Staging: how the bytes of a plan's buckets lie in slots on their way. Pure integers; owns no memory.

A *stream* is one destination of the plan; several workers that hold the same share one. Its *part* of a bucket is cut into
*segments*, each dense and in the order of the destination's memory, so that the taker moves few and large pieces. What one
source gives to one part is a *region*: the unit of copying in, and of verification.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import msgspec
from msgspec.structs import replace

from rlsync.layout.geometry import DTYPE_BYTES, BufferSpec, contiguous_strides
from rlsync.plan.planner import Copy, Plan

# Segments start at multiples of this many bytes: a cache line, and enough for any dtype and vector load.
SEGMENT_ALIGNMENT = 64
# What one source gives to one destination at once is not cut below this: every message costs some microseconds.
LEAST_PIECE_BYTES = 2**20

# Where the buffers of a holder are: in the host; in memory of a device that other processes of the host cannot map; in such that they
# can, but which is allocated anew for every sync; in such that stays.
Memory = Literal["host", "device", "leaving", "lendable"]


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Elements of one destination buffer that lie together in a part.

    ``buffer_offset``, ``shape`` and ``strides`` count elements of the destination buffer; in the slot they lie dense and
    row-major over ``shape``, from byte ``slot_offset`` of the part on. ``dtype`` is the destination's.
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

    @property
    def nbytes(self) -> int:
        return self.size * DTYPE_BYTES[self.dtype]


class Region(msgspec.Struct, frozen=True, array_like=True):
    """Elements that one source gives to a part. Offsets and strides in elements, ``slot_offset`` in bytes of the part.

    ``number`` counts the regions of a stream over all its buckets. ``tensor`` is the HF name.
    """

    number: int
    tensor: str
    source: int
    source_buffer: str
    source_offset: int
    source_strides: tuple[int, ...]
    shape: tuple[int, ...]
    buffer: str
    buffer_offset: int
    buffer_strides: tuple[int, ...]
    dtype: str
    slot_offset: int
    slot_strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Part:
    """One stream's share of one bucket: ``nbytes`` of a slot, alignment included."""

    nbytes: int
    segments: tuple[Segment, ...]
    regions: tuple[Region, ...]


def lay_out(plan: Plan) -> tuple[tuple[Part, ...], ...]:
    """Parts by bucket and stream; stream ``s`` is destination ``s`` of the plan. Deterministic."""
    specs = [{b.name: b for b in p.buffers} for p in plan.destinations]
    numbers = [0] * len(plan.destinations)
    table = []
    for bucket in plan.buckets:
        copies: dict[int, list[Copy]] = defaultdict(list)
        for copy in bucket.copies:
            copies[copy.destination].append(copy)
        row = []
        for stream in range(len(plan.destinations)):
            row.append(_part(copies[stream], specs[stream], numbers[stream]))
            numbers[stream] += len(row[-1].regions)
        table.append(tuple(row))
    return tuple(table)


def part_offsets(parts: Sequence[Part]) -> tuple[int, ...]:
    """Byte at which each part begins when the parts of a bucket lie side by side in one slot; one more for the end."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + part.nbytes)
    return tuple(offsets)


def _part(copies: Sequence[Copy], specs: dict[str, BufferSpec], number: int) -> Part:
    by_buffer: dict[str, list[Copy]] = defaultdict(list)
    for copy in copies:
        by_buffer[copy.destination_buffer].append(copy)
    segments: list[Segment] = []
    regions: list[Region] = []
    cursor = 0
    for name, group in by_buffer.items():
        spec = specs[name]
        for run in _runs(group, spec):
            segment = _segment(run, spec, cursor)
            for copy in run:
                regions.append(_region(copy, segment, number + len(regions), len(run) > 1))
            segments.append(segment)
            cursor += -(-segment.nbytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT
    return Part(cursor, tuple(segments), tuple(regions))


def _runs(copies: list[Copy], spec: BufferSpec) -> list[list[Copy]]:
    """Copies of one buffer, grouped so that each group fills one dense range of it or is a single strided region."""
    copies = sorted(copies, key=lambda c: c.destination_offset)
    if _is_dense(copies):
        return [copies]
    runs: list[list[Copy]] = []
    for copy in copies:
        if not _is_dense([copy]):
            runs.append([copy])
        elif runs and _is_dense(runs[-1]) and _end(runs[-1][-1]) == copy.destination_offset:
            runs[-1].append(copy)
        else:
            runs.append([copy])
    return runs


def _end(copy: Copy) -> int:
    """One past the highest element that a copy writes."""
    return copy.destination_offset + sum((n - 1) * s for n, s in zip(copy.shape, copy.destination_strides, strict=True)) + 1


def _is_dense(copies: list[Copy]) -> bool:
    """Whether the copies fill a range of the buffer without gaps; the plan has proven that they do not overlap."""
    return sum(c.size for c in copies) == max(map(_end, copies)) - copies[0].destination_offset


def _segment(run: list[Copy], spec: BufferSpec, cursor: int) -> Segment:
    first = run[0]
    if _is_dense(run):
        size = max(map(_end, run)) - first.destination_offset
        return Segment(spec.name, spec.dtype, first.destination_offset, (size,), (1,), cursor)
    return Segment(spec.name, spec.dtype, first.destination_offset, first.shape, first.destination_strides, cursor)


def _region(copy: Copy, segment: Segment, number: int, in_range: bool) -> Region:
    if segment.strides == (1,):
        slot_offset = segment.slot_offset + (copy.destination_offset - segment.buffer_offset) * DTYPE_BYTES[segment.dtype]
        slot_strides = copy.destination_strides
    else:
        assert not in_range
        slot_offset, slot_strides = segment.slot_offset, contiguous_strides(copy.shape)
    return Region(
        number, copy.tensor,
        copy.source, copy.source_buffer, copy.source_offset, copy.source_strides, copy.shape,
        copy.destination_buffer, copy.destination_offset, copy.destination_strides, segment.dtype,
        slot_offset, slot_strides,
    )  # fmt: skip


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


def is_staged(memory: Memory, mode: str, *, is_near: bool) -> bool:
    """Whether a reader of a holder's device memory reads a ring in which the holder puts it first, and not where it lies.

    So where it cannot be mapped, and where it would have to be mapped anew in every sync from another GPU: the driver takes many times
    as long for that as the bytes for their way (benchmarks/RESULTS.md). A ring is mapped once.

    Args:
        mode: ``weight_sync.staging``, ``auto`` or ``always``.
        is_near: whether both are on one GPU.
    """
    return mode == "always" or memory == "device" or (memory == "leaving" and not is_near)


def fills_buckets(transports: Iterable[str], *, is_direct: bool, staged: bool) -> bool:
    """Whether what a stream takes of a holder counts for the size of buckets.

    Not what goes from parameters to parameters, of which nobody has to be told in parts: ``ipc`` reads it where it lies, and ``nccl``
    cuts it into steps.

    Args:
        transports: of all streams. Where there are several, buckets are those of the others.
        is_direct: whether all workers write into their parameters.
        staged: whether it goes through a ring of the holder's, see ``is_staged``.
    """
    used = set(transports)
    return not is_direct or not (used == {"nccl"} or (used == {"ipc"} and not staged))
