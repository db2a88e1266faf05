"""Packing: how the bytes of a plan's buckets lie together, in slots and in messages. Pure integers; owns no memory.

A *part* is what one destination takes of one bucket; several workers that hold the same are one destination. It is cut into
*segments*, each dense and in the order of the destination's memory, so that the receiver moves few and large pieces. What one source
gives to one part is a *region*: the unit of copying in, of transforms, and of verification.

There is one rule for what lies side by side, ``side_by_side``: segments in a part, parts in a slot, regions in a message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import mul

import msgspec
from msgspec.structs import replace

from rlsync.layout.geometry import DTYPE_BYTES, BufferSpec, contiguous_strides
from rlsync.plan.planner import Copy, Plan

# What lies side by side begins at multiples of this many bytes: a cache line, and enough for any dtype and vector load.
SEGMENT_ALIGNMENT = 64
# Messages are not cut below this size: each costs some microseconds.
LEAST_PIECE_BYTES = 2**20


def side_by_side(sizes: Iterable[int]) -> tuple[int, ...]:
    """Byte at which each of several things begins when they lie one after another, each aligned; one more for the end."""
    offsets = [0]
    for nbytes in sizes:
        offsets.append(offsets[-1] + -(-nbytes // SEGMENT_ALIGNMENT) * SEGMENT_ALIGNMENT)
    return tuple(offsets)


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

    ``number`` counts the regions of a destination over all its buckets. ``tensor`` is the HF name.
    ``transform`` is what its source computes before it is copied.
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
    transform: str = ""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class PackedPart(msgspec.Struct, frozen=True, array_like=True):
    """What one destination takes of one bucket: ``nbytes``, alignment included, and what lies in them."""

    nbytes: int
    segments: tuple[Segment, ...]
    regions: tuple[Region, ...]


def lay_out(plan: Plan) -> tuple[tuple[PackedPart, ...], ...]:
    """Parts by bucket and destination of the plan. Deterministic."""
    specs = [{b.name: b for b in p.buffers} for p in plan.destinations]
    numbers = [0] * len(plan.destinations)
    table = []
    for bucket in plan.buckets:
        copies: dict[int, list[Copy]] = defaultdict(list)
        for copy in bucket.copies:
            copies[copy.destination].append(copy)
        row = []
        for destination in range(len(plan.destinations)):
            row.append(_part(copies[destination], specs[destination], numbers[destination]))
            numbers[destination] += len(row[-1].regions)
        table.append(tuple(row))
    return tuple(table)


@dataclass(frozen=True, slots=True)
class PackedMessage:
    """What one source gives to one part, as it travels or waits in a staging ring.

    ``peer`` is the other end, by a number that its transport gives it. ``places[i]``: byte offset and strides (elements) of ``regions[i]``.
    """

    peer: int
    nbytes: int
    regions: tuple[Region, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]


def pack_message(peer: int, regions: Sequence[Region], whole_bytes: int = 0) -> PackedMessage:
    """The layout of a message, from its regions alone, so that both ends find the same.

    ``whole_bytes``: bytes of the part where ``regions`` are all of it, and it travels as it lies in a slot: nothing is left to unpack.
    With 0 the regions follow one another, each dense.
    """
    if whole_bytes:
        return PackedMessage(peer, whole_bytes, tuple(regions), tuple((r.slot_offset, r.slot_strides) for r in regions))
    *offsets, end = side_by_side(r.nbytes for r in regions)
    places = tuple((offset, contiguous_strides(r.shape)) for offset, r in zip(offsets, regions, strict=True))
    return PackedMessage(peer, end, tuple(regions), places)


def _part(copies: Sequence[Copy], specs: dict[str, BufferSpec], number: int) -> PackedPart:
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
            cursor += side_by_side([segment.nbytes])[1]
    return PackedPart(cursor, tuple(segments), tuple(regions))


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
    return copy.destination_offset + sum(map(mul, copy.shape, copy.destination_strides)) - sum(copy.destination_strides) + 1


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
        slot_offset, slot_strides, copy.transform,
    )  # fmt: skip


def cut(regions: Sequence[Region], num_pieces: int) -> tuple[tuple[Region, ...], ...]:
    """Cut regions into ``num_pieces`` pieces of about equal bytes, dividing large regions; the last pieces of small messages are empty.

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


def cut_bytes(regions: Sequence[Region], num_pieces: int) -> list[list[int]]:
    """Bytes of the regions in each piece that :func:`cut` makes; empty ones at the end may be left out. Makes no pieces of dense regions,
    of which there are millions where thousands of GPUs are counted."""
    total = sum(r.nbytes for r in regions)
    # Pieces have at least half of this, the last one apart.
    num_pieces = min(num_pieces, 2 * total // LEAST_PIECE_BYTES + 2)
    piece_bytes = max(LEAST_PIECE_BYTES, -(-total // num_pieces))
    pieces: list[list[int]] = [[] for _ in range(num_pieces)]
    at, room = 0, piece_bytes
    for region in regions:
        item = DTYPE_BYTES[region.dtype]
        if len(region.shape) == 1:
            nbytes, step = region.nbytes, SEGMENT_ALIGNMENT // item * item
            while nbytes > room and at < num_pieces - 1:
                here = room - room % step
                if here:
                    pieces[at].append(here)
                nbytes -= here
                at, room = at + 1, piece_bytes
            pieces[at].append(nbytes)
            room -= nbytes
            continue
        rest = [region]
        while rest:
            first = rest.pop(0)
            if first.nbytes > room and at < num_pieces - 1:
                begun, there = divide(first, room // item)
                pieces[at] += [r.nbytes for r in begun]
                rest = there + rest
                at, room = at + 1, piece_bytes
            else:
                pieces[at].append(first.nbytes)
                room -= first.nbytes
    return pieces


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
