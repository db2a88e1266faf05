"""Memory that a sync takes on paper: rings, messages, modules in progress. Integers, by the rules of those who allocate it.

``parts`` are those of an outline's plan: what its destinations take, and what sources give to all whom these stand for.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest

from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.plan import packing
from rlsync.plan.outline import Outline, outlined_holder_bytes
from rlsync.plan.packing import PackedPart, Region, cut, side_by_side
from rlsync.plan.planner import Copy, Plan, in_buckets


def ring_bytes(drawn: Outline, parts: Sequence[Sequence[PackedPart]], transports: Sequence[str], num_slots: int) -> tuple[int, int]:
    """Bytes of a slot and of the ring, which has a page of its own in front: whole pages, as ``rlsync.transport.shm`` allocates."""
    sizes = ([part.nbytes * len(drawn.members[d]) for d, part in enumerate(row) if transports[d] == "shm"] for row in parts)
    largest = max(map(sum, sizes))
    if not largest:
        return 0, 0
    slot_bytes = -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE
    return slot_bytes, mmap.PAGESIZE + num_slots * slot_bytes


def staging_bytes(
    drawn: Outline, parts: Sequence[Sequence[PackedPart]], is_staged: Callable[[int, int], bool], num_slots: int
) -> list[int]:
    """Bytes of the ring in GPU memory of each actor rank, as ``rlsync.transport.ipc`` allocates it.

    ``is_staged``: whether a destination of the outline's plan reads a ring of a source.
    """
    largest = [0] * len(drawn.plan.sources)
    for row in parts:
        given = [0] * len(largest)
        for destination, part in enumerate(row):
            amounts: dict[int, int] = defaultdict(int)
            for region in part.regions:
                amounts[region.source] += _aligned(region.nbytes)
            read = {source: nbytes for source, nbytes in amounts.items() if is_staged(destination, source)}
            for source, nbytes in drawn.spread(destination, read):
                given[source] += nbytes
        largest = list(map(max, largest, given))
    return [min(num_slots, len(parts)) * nbytes for nbytes in largest]


def message_bytes(
    drawn: Outline, parts: Sequence[Sequence[PackedPart]], transports: Sequence[str], num_slots: int
) -> tuple[list[int], list[int]]:
    """Bytes that each actor rank and each destination keeps for messages, as ``rlsync.transport.p2p`` allocates them for whole buckets."""
    num_slots = min(num_slots, len(parts))
    sent, packed, taken = [0] * len(drawn.plan.sources), [0] * len(transports), [0] * len(transports)
    for row in parts:
        given = [0] * len(sent)
        for destination, (part, transport) in enumerate(zip(row, transports, strict=True)):
            if transport != "gloo":
                continue
            messages = _message_bytes(part)
            for source, nbytes in drawn.spread(destination, messages):
                given[source] += nbytes
            if len(messages) > 1:
                packed[destination] = max(packed[destination], sum(messages.values()))
            taken[destination] = max(taken[destination], part.nbytes)
        sent = list(map(max, sent, given))
    return [num_slots * nbytes for nbytes in sent], [p + num_slots * t for p, t in zip(packed, taken, strict=True)]


def step_bytes(
    drawn: Outline, parts: Sequence[Sequence[PackedPart]], transports: Sequence[str], num_slots: int, num_steps: int
) -> tuple[list[int], list[int]]:
    """Bytes of GPU memory that each actor rank and each destination keeps for NCCL's messages, of buckets that are cut into steps."""
    num_slots = min(num_slots, len(parts) * num_steps)
    sent, taken = [0] * len(drawn.plan.sources), [0] * len(transports)
    known: dict[Hashable, list[int]] = {}
    for row in parts:
        given = [[0] * num_steps for _ in sent]
        for destination, (part, transport) in enumerate(zip(row, transports, strict=True)):
            sizes = _piece_bytes(part, num_steps, known) if transport == "nccl" else {}
            for sources in drawn.members[destination]:
                for source, pieces in sizes.items():
                    steps = given[sources[source]]
                    for step, nbytes in enumerate(pieces):
                        steps[step] += nbytes
            taken[destination] = max(taken[destination], *map(sum, zip_longest(*sizes.values(), fillvalue=0)), 0)
        sent = [max(before, *steps) for before, steps in zip(sent, given, strict=True)]
    return [num_slots * nbytes for nbytes in sent], [num_slots * nbytes for nbytes in taken]


def _piece_bytes(part: PackedPart, num_steps: int, known: dict[Hashable, list[int]]) -> dict[int, list[int]]:
    """Bytes of the message of each source, by step; the last ones of small messages, which are empty, may be left out.

    ``known``: what was found before, of the same number of steps.
    """
    if num_steps == 1:
        return {source: [nbytes] for source, nbytes in _message_bytes(part).items()}
    by_source: dict[int, list[Region]] = defaultdict(list)
    for region in part.regions:
        by_source[region.source].append(region)
    sizes = {}
    for source, regions in by_source.items():
        # How regions are cut depends on their shapes alone, which are those of other sources and destinations too.
        key = tuple([(r.shape, r.dtype) for r in regions])
        if key not in known:
            # Pieces have at least half of this, the last one apart.
            filled = min(num_steps, 2 * sum(r.nbytes for r in regions) // packing.LEAST_PIECE_BYTES + 2)
            known[key] = [sum(_aligned(r.nbytes) for r in piece) for piece in cut(regions, filled)]
        sizes[source] = known[key]
    return sizes


def _message_bytes(part: PackedPart) -> dict[int, int]:
    """Bytes of the message of each source: the part as it is where one gives all of it, else its regions one after the other."""
    messages: dict[int, int] = defaultdict(int)
    for region in part.regions:
        messages[region.source] += _aligned(region.nbytes)
    return dict.fromkeys(messages, part.nbytes) if len(messages) == 1 else messages


def _aligned(nbytes: int) -> int:
    return side_by_side([nbytes])[1]


def layerwise_bytes(drawn: Outline, bucket_bytes: int) -> int:
    """Most bytes of modules in progress at once, of all workers: a module takes memory from its first bucket to its last.

    ``bucket_bytes``: of the buckets in which the layerwise sink gets what the direct one may read in one.
    """
    plan = _as_cut(drawn, bucket_bytes)
    spans: list[dict[str, tuple[int, int]]] = [{} for _ in plan.destinations]
    for number, bucket in enumerate(plan.buckets):
        for copy in bucket.copies:
            module = _module(copy.destination_buffer)
            begin, _ = spans[copy.destination].get(module, (number, number))
            spans[copy.destination][module] = (begin, number)
    most = 0
    for placement, modules in zip(plan.destinations, spans, strict=True):
        # What each bucket adds to the bytes in progress, and what the one before has freed.
        change = [0] * (len(plan.buckets) + 1)
        for buffer in placement.buffers:
            begin, end = modules.get(_module(buffer.name), (0, -1))
            change[begin] += buffer.size * DTYPE_BYTES[buffer.dtype]
            change[end + 1] -= buffer.size * DTYPE_BYTES[buffer.dtype]
        most = max(most, *accumulate(change))
    return most


def _module(buffer: str) -> str:
    return buffer.rpartition(".")[0]


def _as_cut(drawn: Outline, bucket_bytes: int) -> Plan:
    """The same copies, in buckets also where there is one that holds everything."""
    plan = drawn.plan
    if len(plan.buckets) > 1:
        return plan
    copies: dict[str, list[Copy]] = defaultdict(list)
    for copy in plan.buckets[0].copies:
        copies[copy.tensor].append(copy)
    dtypes = [{b.name: b.dtype for b in p.buffers} for p in plan.destinations]
    sizes = outlined_holder_bytes(copies, dtypes, drawn.members)
    return replace(plan, buckets=in_buckets(plan.buckets[0].tensors, copies, sizes, bucket_bytes))
