"""Memory that a sync takes on paper: rings, messages, modules in progress. Integers, by the rules of those who allocate it.

``parts`` are those of an outline: by kind and bucket what each destination of the kind takes. The source of a region is a way.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.plan.links import LINK_NAMES
from rlsync.plan.outline import Integers, Kind, Outline
from rlsync.plan.packing import PackedPart, Region, cut_bytes, side_by_side

Parts = Sequence[Sequence[PackedPart]]


def ring_bytes(drawn: Outline, parts: Parts, transports: Sequence[str], num_slots: int) -> tuple[int, int]:
    """Bytes of a slot and of the ring, which has a page of its own in front: whole pages, as ``rlsync.transport.shm`` allocates.

    ``transports``: by kind.
    """
    sizes = np.zeros(len(drawn.buckets), np.int64)
    for kind, row, transport in zip(drawn.kinds, parts, transports, strict=True):
        if transport == "shm":
            sizes += [part.nbytes * len(kind.members) for part in row]
    largest = int(sizes.max())
    if not largest:
        return 0, 0
    slot_bytes = -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE
    return slot_bytes, mmap.PAGESIZE + num_slots * slot_bytes


def staging_bytes(drawn: Outline, parts: Parts, is_staged: Callable[[int, int], bool], num_slots: int) -> list[int]:
    """Bytes of the ring in GPU memory of each actor rank, as ``rlsync.transport.ipc`` allocates it.

    ``is_staged``: whether destinations of a kind read a ring of sources, by kind and class of the link.
    """
    largest = np.zeros(len(drawn.sources), np.int64)
    staged = [np.array([is_staged(number, link) for link in range(len(LINK_NAMES))], np.int64) for number in range(len(drawn.kinds))]
    for bucket in range(len(drawn.buckets)):
        given = np.zeros_like(largest)
        for kind, row, by_link in zip(drawn.kinds, parts, staged, strict=True):
            if by_link.any():
                ways, nbytes = _regions(row[bucket])
                given += kind.given(ways, nbytes * by_link[kind.links[:, ways]], len(given))
        largest = np.maximum(largest, given)
    return _times(min(num_slots, len(drawn.buckets)), largest)


def message_bytes(drawn: Outline, parts: Parts, transports: Sequence[str], num_slots: int) -> tuple[list[int], list[int]]:
    """Bytes that each actor rank and each destination keeps for messages, as ``rlsync.transport.p2p`` allocates them for whole buckets.

    Destinations come kind by kind.
    """
    num_slots = min(num_slots, len(drawn.buckets))
    sent = np.zeros(len(drawn.sources), np.int64)
    packed, taken = ([np.zeros(len(kind.members), np.int64) for kind in drawn.kinds] for _ in range(2))
    chosen = [number for number, transport in enumerate(transports) if transport == "gloo"]
    for bucket in range(len(drawn.buckets)):
        given = np.zeros_like(sent)
        for number in chosen:
            kind, part = drawn.kinds[number], parts[number][bucket]
            ways, nbytes = _regions(part)
            if not len(ways):
                continue
            # A message that is all of a part travels as it lies in a slot.
            whole = _have_one_source(kind, ways)
            first = np.arange(len(ways)) == 0
            given += kind.given(ways, np.where(whole[:, None], part.nbytes * first, nbytes), len(given))
            packed[number] = np.maximum(packed[number], int(nbytes.sum()) * ~whole)
            taken[number] = np.maximum(taken[number], part.nbytes)
        sent = np.maximum(sent, given)
    return _times(num_slots, sent), (np.concatenate(packed) + num_slots * np.concatenate(taken)).tolist()


def step_bytes(drawn: Outline, parts: Parts, transports: Sequence[str], num_slots: int, num_steps: int) -> tuple[list[int], list[int]]:
    """Bytes of GPU memory that each actor rank and each destination keeps for NCCL's messages, of buckets that are cut into steps.

    Destinations come kind by kind.
    """
    num_slots = min(num_slots, len(drawn.buckets) * num_steps)
    sent = np.zeros(len(drawn.sources), np.int64)
    taken = [np.zeros(len(kind.members), np.int64) for kind in drawn.kinds]
    known: dict[Hashable, Integers] = {}
    forms: dict[Hashable, int] = {}
    for bucket in range(len(drawn.buckets)):
        given = np.zeros((len(sent), num_steps), np.int64)
        for number, (kind, row) in enumerate(zip(drawn.kinds, parts, strict=True)):
            if transports[number] == "nccl" and row[bucket].regions:
                taken[number] = np.maximum(taken[number], _add_steps(given, kind, row[bucket], known, forms))
        sent = np.maximum(sent, given.max(axis=1))
    return _times(num_slots, sent), _times(num_slots, np.concatenate(taken))


def _add_steps(given: Integers, kind: Kind, part: PackedPart, known: dict[Hashable, Integers], numbers: dict[Hashable, int]) -> Integers:
    """Add to ``given``, by source and step, what the members of a kind take; the most that each takes in a step.

    ``known``: bytes by step of messages found before, of the same number of steps. ``numbers``: of the forms of regions found before.
    """
    num_steps, regions = given.shape[1], part.regions
    ways, _ = _regions(part)
    forms = np.array([numbers.setdefault((r.shape, r.dtype), len(numbers)) for r in regions], np.int32)
    most = np.zeros(len(kind.members), np.int64)
    for member, (sources, is_whole) in enumerate(zip(kind.sources[:, ways], _have_one_source(kind, ways), strict=True)):
        whole_bytes = part.nbytes if is_whole and num_steps == 1 else 0
        # A message has the regions of one source, in their order.
        order = np.argsort(sources, kind="stable")
        of_message, own = sources[order], forms[order]
        taken = np.zeros(num_steps, np.int64)
        for begin, end in pairwise([0, *(np.flatnonzero(np.diff(of_message)) + 1).tolist(), len(order)]):
            # How a message is cut depends on the shapes in it alone, which are those of other sources and destinations too.
            key = whole_bytes, own[begin:end].tobytes()
            sizes = known.get(key)
            if sizes is None:
                sizes = known[key] = np.array(_message_steps([regions[i] for i in order[begin:end]], num_steps, whole_bytes), np.int64)
            given[of_message[begin], : len(sizes)] += sizes
            taken[: len(sizes)] += sizes
        most[member] = taken.max()
    return most


def _message_steps(regions: Sequence[Region], num_steps: int, whole_bytes: int) -> list[int]:
    """Bytes of a message by step; the last ones, which are empty, may be left out. ``whole_bytes``: of the part that it is all of, or 0."""
    if whole_bytes:
        return [whole_bytes]
    if num_steps == 1:
        return [sum(_aligned(r.nbytes) for r in regions)]
    return [sum(map(_aligned, piece)) for piece in cut_bytes(regions, num_steps)]


def _regions(part: PackedPart) -> tuple[Integers, Integers]:
    """Ways of the regions of a part, and the bytes that each takes in a message of several."""
    ways = np.array([region.source for region in part.regions], np.int64)
    return ways, np.array([_aligned(region.nbytes) for region in part.regions], np.int64)


def _have_one_source(kind: Kind, ways: Integers) -> np.ndarray:
    """For each member, whether one source gives all of these ways."""
    sources = kind.sources[:, ways]
    return np.asarray((sources == sources[:, :1]).all(axis=1))


def _times(count: int, amounts: Integers) -> list[int]:
    return [count * nbytes for nbytes in amounts.tolist()]


def _aligned(nbytes: int) -> int:
    return side_by_side([nbytes])[1]


def layerwise_bytes(drawn: Outline, bucket_bytes: int) -> int:
    """Most bytes of modules in progress at once, of all workers: a module takes memory from its first bucket to its last.

    ``bucket_bytes``: of the buckets in which the layerwise sink gets what the direct one may read in one.
    """
    buckets = drawn.buckets if len(drawn.buckets) > 1 else drawn.cut(bucket_bytes)
    number_of = {t.name: number for number, group in enumerate(buckets) for t in group}
    most = 0
    # Those who hold the same take the same.
    for placement, copies in {(id(k.placement.buffers), id(k.placement.pieces)): (k.placement, k.copies) for k in drawn.kinds}.values():
        spans: dict[str, tuple[int, int]] = {}
        for copy in copies:
            module, number = _module(copy.destination_buffer), number_of[copy.tensor]
            begin, end = spans.get(module, (number, number))
            spans[module] = min(begin, number), max(end, number)
        # What each bucket adds to the bytes in progress, and what the one before has freed.
        change: dict[int, int] = defaultdict(int)
        for buffer in placement.buffers:
            begin, end = spans.get(_module(buffer.name), (0, -1))
            change[begin] += buffer.size * DTYPE_BYTES[buffer.dtype]
            change[end + 1] -= buffer.size * DTYPE_BYTES[buffer.dtype]
        most = max(most, *accumulate(change[number] for number in sorted(change)))
    return most


def _module(buffer: str) -> str:
    return buffer.rpartition(".")[0]
