"""Outlines: plans in which one destination stands for all that are alike, so that thousands of GPUs are counted on paper in seconds.

Two destinations are alike when they take the same boxes, cut alike: from whom is a table with a row for each of them, and bytes are
summed over it. Sources are chosen for each destination, as in any plan; only copies are made for one alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsync.layout.geometry import DTYPE_BYTES, Location, Placement, TensorSpec
from rlsync.plan.links import LINK_NAMES, Traffic, link_class
from rlsync.plan.matching import Matching, match
from rlsync.plan.planner import Bucket, Copy, Plan, copies_of

Integers = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Destinations that are alike. What each takes comes in the same *ways*, numbered from 0.

    Attributes:
        members: the destinations, by their indices.
        placement: of the first.
        copies: to any of them, in the order of the tensors; the source of a copy is a way, whose source is meant, its destination 0.
        sources: the source of each way of each member; (members, ways).
        links: how far it is, as ``link_class`` says; (members, ways).
        tensors: the tensor of each way, by its place in the list; (ways).
        nbytes: of each way in the destination's dtype; (ways).
    """

    members: tuple[int, ...]
    placement: Placement
    copies: tuple[Copy, ...]
    sources: Integers
    links: Integers
    tensors: Integers
    nbytes: Integers

    def plan(self, buckets: Sequence[Sequence[TensorSpec]]) -> Plan:
        """The copies in these buckets, to the first member."""
        by_tensor: dict[str, list[Copy]] = defaultdict(list)
        for copy in self.copies:
            by_tensor[copy.tensor].append(copy)
        rows = tuple(Bucket(tuple(group), tuple(copy for t in group for copy in by_tensor.get(t.name, ()))) for group in buckets)
        return Plan((), (self.placement,), rows, "")

    def given(self, ways: Integers, amounts: Integers, num_sources: int) -> Integers:
        """Bytes that each source gives to all members.

        ``amounts``: of the sources of these ways; of each way, or of each member and way.
        """
        sources = self.sources[:, ways]
        # Sums below 2**53, which doubles hold exactly.
        return np.bincount(sources.ravel(), weights=np.broadcast_to(amounts, sources.shape).ravel(), minlength=num_sources).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """A plan of all destinations, counted by kind.

    Attributes:
        tensors: all, in order.
        sources: all holders that give.
        kinds: whose members are all destinations.
        buckets: the tensors of each bucket that holds any copy.
    """

    tensors: tuple[TensorSpec, ...]
    sources: tuple[Placement, ...]
    kinds: tuple[Kind, ...]
    buckets: tuple[tuple[TensorSpec, ...], ...]

    @property
    def num_copies(self) -> int:
        return sum(len(kind.copies) * len(kind.members) for kind in self.kinds)

    def traffic(self) -> Traffic:
        """What all destinations move. Bytes by destination and redundancy are those of the first member of each kind."""
        given, taken = self.by_link()
        received: dict[str, int] = {}
        redundancy: dict[str, float] = {}
        for kind in self.kinds:
            placement = kind.placement
            items = {b.name: DTYPE_BYTES[b.dtype] for b in placement.buffers}
            held = sum(piece.box.size * items[piece.buffer] for piece in placement.pieces)
            received[placement.holder] = int(kind.nbytes.sum())
            if held:
                redundancy[placement.holder] = received[placement.holder] / held
        by_source = {p.holder: int(nbytes) for p, nbytes in zip(self.sources, given.sum(axis=1), strict=True)}
        return Traffic(dict(zip(LINK_NAMES, taken.sum(axis=0).tolist(), strict=True)), by_source, received, redundancy)

    def by_link(self) -> tuple[Integers, Integers]:
        """Bytes that each source gives and each destination takes, by class of link; (sources, links), (destinations, links)."""
        given = np.zeros((len(self.sources), len(LINK_NAMES)), np.int64)
        taken = np.zeros((sum(len(kind.members) for kind in self.kinds), len(LINK_NAMES)), np.int64)
        for kind in self.kinds:
            every = np.arange(len(kind.nbytes))
            for link in np.unique(kind.links):
                amounts = kind.nbytes * (kind.links == link)
                given[:, link] += kind.given(every, amounts, len(given))
                taken[list(kind.members), link] = amounts.sum(axis=1)
        return given, taken

    def between(self, source_groups: Sequence[int], destination_groups: Sequence[int]) -> Integers:
        """Bytes between groups of sources and of destinations, which are numbered from 0; (groups, groups)."""
        of = np.array(source_groups)
        moved = np.zeros((max(source_groups) + 1, max(destination_groups) + 1), np.int64)
        for kind in self.kinds:
            for destination, sources in zip(kind.members, kind.sources, strict=True):
                # Sums below 2**53, which doubles hold exactly.
                given = np.bincount(of[sources], weights=kind.nbytes, minlength=len(moved))
                moved[:, destination_groups[destination]] += given.astype(np.int64)
        return moved

    def cut(self, bucket_bytes: int) -> tuple[tuple[TensorSpec, ...], ...]:
        """Buckets for readers that have to be told in parts, where these are one that holds everything."""
        return _in_buckets(self.tensors, len(self.sources), [(kind, kind.nbytes) for kind in self.kinds], bucket_bytes)


def outlined(plan: Plan) -> Outline:
    """A plan in which every destination stands for itself, without its digest."""
    tensors = tuple(t for bucket in plan.buckets for t in bucket.tensors)
    ordinals = {t.name: ordinal for ordinal, t in enumerate(tensors)}
    taken: dict[int, list[Copy]] = defaultdict(list)
    for bucket in plan.buckets:
        for copy in bucket.copies:
            taken[copy.destination].append(copy)
    kinds = []
    for destination, placement in enumerate(plan.destinations):
        copies, items = taken[destination], {b.name: DTYPE_BYTES[b.dtype] for b in placement.buffers}
        kinds.append(
            Kind(
                (destination,),
                placement,
                tuple(_of_way(copy, way) for way, copy in enumerate(copies)),
                np.array([[copy.source for copy in copies]], np.int64),
                np.array([[link_class(plan.sources[copy.source].location, placement.location) for copy in copies]], np.int64),
                np.array([ordinals[copy.tensor] for copy in copies], np.int64),
                np.array([copy.size * items[copy.destination_buffer] for copy in copies], np.int64),
            )
        )
    return Outline(tensors, plan.sources, tuple(kinds), tuple(b.tensors for b in plan.buckets if b.copies))


def outline(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Placement],
    destinations: Sequence[Placement],
    *,
    bucket_bytes: int | None = None,
    takes_room: Callable[[int, int], bool] = lambda destination, link: True,
    transforms: Collection[str] = (),
    kind_of: Callable[[int], Hashable] = lambda destination: None,
) -> Outline:
    """What :func:`rlsync.plan.planner.build_plan` plans, counted by kind.

    ``kind_of``: what else the members of a kind must have in common. ``takes_room``: whether copies to a destination over a link, by its
    class, count for the size of buckets; alike for all of a kind.
    Raises PlacementError as it does; what is wrong with destinations that are alike may be said of one.
    """
    tensors = tuple(tensors)
    matching = match(tensors, sources, destinations)

    def room(destination: int) -> Integers:
        return np.array([takes_room(destination, link) for link in range(len(LINK_NAMES))], np.int64)

    kinds = tuple(_kinds(tensors, matching, transforms, kind_of, room))
    counted = [(kind, kind.nbytes * room(kind.members[0])[kind.links[0]]) for kind in kinds]
    present = {copy.tensor for kind in kinds for copy in kind.copies}
    buckets = _in_buckets(tensors, len(sources), counted, bucket_bytes)
    return Outline(tensors, tuple(sources), kinds, tuple(group for group in buckets if any(t.name in present for t in group)))


def _kinds(
    tensors: Sequence[TensorSpec],
    matching: Matching,
    transforms: Collection[str],
    kind_of: Callable[[int], Hashable],
    room: Callable[[int], Integers],
) -> Iterator[Kind]:
    placements = matching.destinations.placements
    ordinals = {t.name: ordinal for ordinal, t in enumerate(tensors)}
    distances = _Distances(matching.sources.placements)
    origins = _origin_numbers(matching)
    crowds: dict[Hashable, list[int]] = defaultdict(list)
    for destination, ways in enumerate(matching.ways):
        crowds[kind_of(destination), matching.destinations.kinds[destination], len(ways)].append(destination)
    alike = sorted(found for crowd in crowds.values() for found in _alike(crowd, matching, origins))
    rows: list[tuple[list[int], Integers, Integers]] = []
    for members, table in alike:
        ways = matching.ways[members[0]]
        links = distances.of([placements[d].location for d in members], table)
        patterns = [_coalescing(table, np.array([ordinals[piece.tensor] for piece, _, _ in ways], np.int64))]
        if len(set(room(members[0]).tolist())) > 1:
            patterns.append(links)
        rows += [([members[i] for i in same], table[same], links[same]) for same in _equal_rows(np.concatenate(patterns, axis=1))]
    firsts = [members[0] for members, _, _ in rows]
    copies: list[list[Copy]] = [[] for _ in firsts]
    for row in copies_of(matching.only(firsts), transforms, {}).values():
        for copy in row:
            copies[copy.destination].append(copy)
    for (members, table, links), found in zip(rows, copies, strict=True):
        ways = matching.ways[members[0]]
        items = matching.destinations.dtypes[members[0]]
        # A copy joins ways of one tensor and source, of which the first is as good as any.
        way_of: dict[tuple[str, int], int] = {}
        for way, (piece, _, origin) in enumerate(ways):
            way_of.setdefault((piece.tensor, origin[0]), way)
        yield Kind(
            tuple(members),
            placements[members[0]],
            tuple(_of_way(copy, way_of[copy.tensor, copy.source]) for copy in found),
            table,
            links,
            np.array([ordinals[piece.tensor] for piece, _, _ in ways], np.int64),
            np.array([box.size * DTYPE_BYTES[items[piece.buffer]] for piece, box, _ in ways], np.int64),
        )


def _alike(crowd: Sequence[int], matching: Matching, origins: dict[int, int]) -> Iterator[tuple[list[int], Integers]]:
    """Those of some destinations with equally many ways who take the same boxes, cut alike; and the source of each way of each of them."""
    width = len(matching.ways[crowd[0]])
    # Objects that all share who take the same; see `match`. What is asked of a way is asked once for all who have it.
    identities = np.empty((len(crowd), width), np.int64)
    for row, destination in enumerate(crowd):
        identities[row] = np.fromiter(map(id, matching.ways[destination]), np.int64, width)
    numbers: dict[Hashable, int] = {}
    forms, sources = np.empty(identities.shape, np.int32), np.empty(identities.shape, np.int32)
    columns, pending = np.arange(width), np.ones(identities.shape, bool)
    while len(columns):
        # Replicas are few, so that a few rounds find them all: in each the first that is left in every column, and all who have the same.
        left, own = pending[:, columns], identities[:, columns]
        firsts = left.argmax(axis=0)
        ways = [matching.ways[crowd[row]][column] for row, column in zip(firsts.tolist(), columns.tolist(), strict=True)]
        same = own == own[firsts, np.arange(len(columns))]
        form = np.array([numbers.setdefault((id(box), origins[id(origin[1])]), len(numbers)) for _, box, origin in ways], np.int32)
        forms[:, columns] = np.where(same, form, forms[:, columns])
        sources[:, columns] = np.where(same, np.array([origin[0] for _, _, origin in ways], np.int32), sources[:, columns])
        left &= ~same
        pending[:, columns] = left
        columns = columns[left.any(axis=0)]
    for members in _equal_rows(forms):
        yield [crowd[i] for i in members], sources[members]


def _of_way(copy: Copy, way: int) -> Copy:
    """``replace`` takes as long again as everything else."""
    return Copy(
        copy.tensor, copy.shape, way, copy.source_buffer, copy.source_offset, copy.source_strides,
        0, copy.destination_buffer, copy.destination_offset, copy.destination_strides, copy.transform,
    )  # fmt: skip


def _origin_numbers(matching: Matching) -> dict[int, int]:
    """Identity of a source's piece -> a number that pieces share which lie alike in their holders."""
    numbers: dict[Hashable, int] = {}
    sources = matching.sources
    by_kind = dict(zip(sources.kinds, zip(sources.pieces, sources.dtypes, strict=True), strict=True))
    return {
        id(piece): numbers.setdefault((piece, dtypes[piece.buffer]), len(numbers))
        for pieces, dtypes in by_kind.values()
        for piece in pieces
    }


def _coalescing(sources: Integers, tensors: Integers) -> Integers:
    """For each row of ``sources`` what decides which of its ways become one copy: of each way of a tensor that has several, the first of
    these ways with the same source."""
    order = np.argsort(tensors, kind="stable")
    bounds = np.flatnonzero(np.diff(tensors[order])) + 1
    found = [np.empty((len(sources), 0), np.int64)]
    for group in np.split(order, bounds):
        if len(group) > 1:
            own = sources[:, group]
            found.append(np.stack([(own == own[:, [i]]).argmax(axis=1) for i in range(len(group))], axis=1))
    return np.concatenate(found, axis=1)


def _equal_rows(table: Integers) -> Iterable[list[int]]:
    """Indices of rows in groups of equal ones."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for index, row in enumerate(np.ascontiguousarray(table)):
        found[row.tobytes()].append(index)
    return found.values()


class _Distances:
    """Link classes between sources and destinations, many at a time."""

    def __init__(self, sources: Sequence[Placement]) -> None:
        self._sources = sources
        # Whoever is on a host without sources is equally far from all of them.
        self._hosts = {None if p.location is None else p.location.host for p in sources}
        self._known: dict[Location | None, Integers] = {}

    def of(self, locations: Iterable[Location | None], sources: Integers) -> Integers:
        """Link classes from the sources in each row to the location of that row; of the shape of ``sources``."""
        table = [self._from_all(location)[row] for location, row in zip(locations, sources, strict=True)]
        return np.stack(table)

    def _from_all(self, location: Location | None) -> Integers:
        if location is not None and location.host not in self._hosts:
            location = Location("\0")
        if location not in self._known:
            self._known[location] = np.array([link_class(p.location, location) for p in self._sources], np.int8)
        return self._known[location]


def _summed(keys: Integers, amounts: Integers) -> tuple[Integers, Integers]:
    """Each key once, and the sum of its amounts."""
    rows, where = np.unique(keys, return_inverse=True)
    return rows, np.bincount(where, weights=amounts, minlength=len(rows)).astype(np.int64)


def _in_buckets(
    tensors: Sequence[TensorSpec], num_sources: int, counted: Sequence[tuple[Kind, Integers]], bucket_bytes: int | None
) -> tuple[tuple[TensorSpec, ...], ...]:
    """Buckets as ``rlsync.plan.buckets.grouped`` cuts them, where the members of a kind, which take the same, are one holder.

    ``counted``: kinds, and of each way the bytes that count for the size of a bucket.
    """
    if bucket_bytes is None:
        return (tuple(tensors),)
    # Holders: sources, then kinds. A row for each tensor and holder.
    num_holders = num_sources + len(counted)
    keys, amounts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, (kind, nbytes) in enumerate(counted):
        if not nbytes.any():
            continue
        first = kind.tensors * num_holders
        rows, sizes = _summed((first + kind.sources).ravel(), np.broadcast_to(nbytes, kind.sources.shape).ravel())
        keys += [rows, first + num_sources + number]
        amounts += [sizes, nbytes]
    if len(keys) == 1:
        return (tuple(tensors),)
    rows, sizes = _summed(np.concatenate(keys), np.concatenate(amounts))
    rows, sizes = rows[sizes > 0], sizes[sizes > 0]
    holders = rows % num_holders
    limits = np.full(num_holders, bucket_bytes, np.int64)
    np.maximum.at(limits, holders, sizes)
    bounds = np.searchsorted(rows, np.arange(len(tensors) + 1) * num_holders)
    groups: list[list[TensorSpec]] = []
    filled = np.zeros(num_holders, np.int64)
    for tensor, (begin, end) in zip(tensors, pairwise(bounds.tolist()), strict=True):
        own, nbytes = holders[begin:end], sizes[begin:end]
        before = filled[own]
        if not groups or ((before > 0) & (before + nbytes > limits[own])).any():
            groups.append([])
            filled[:] = 0
            before = np.zeros_like(nbytes)
        groups[-1].append(tensor)
        filled[own] = before + nbytes
    return tuple(map(tuple, groups))
