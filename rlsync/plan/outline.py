"""Outlines: plans in which one destination stands for all that are alike, so that thousands of GPUs are counted on paper in seconds.

Two destinations are alike when they hold the same and take it alike: the same boxes, from sources that hold the same, are as far away,
and change where the other's change. Sources are chosen for each destination, as in any plan; only copies are made for one alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlsync.layout.geometry import DTYPE_BYTES, Placement, TensorSpec
from rlsync.plan.links import LINK_NAMES, Traffic, link_class, traffic
from rlsync.plan.planner import Copy, Plan, copies_of, holder_bytes_of, in_buckets, match


@dataclass(frozen=True, slots=True)
class Outline:
    """A plan and whom its destinations stand for.

    Attributes:
        plan: from all sources to one destination of each kind. It has no digest: holders of a connection have other names.
        members: by destination of the plan, those that it stands for, itself among them: which source each has in the place of one
            of the plan's.
    """

    plan: Plan
    members: tuple[tuple[Mapping[int, int], ...], ...]

    @property
    def num_copies(self) -> int:
        """Of all members."""
        return sum(len(self.members[copy.destination]) for bucket in self.plan.buckets for copy in bucket.copies)

    def spread(self, destination: int, amounts: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Of amounts that one destination of the plan takes, by source, those of all members, each with its source."""
        for sources in self.members[destination]:
            for source, amount in amounts.items():
                yield sources[source], amount

    def traffic(self) -> Traffic:
        """What all members move. Bytes by destination and redundancy are those of the destinations of the plan."""
        counted = traffic(self.plan)
        by_link = dict.fromkeys(LINK_NAMES, 0)
        given = [0] * len(self.plan.sources)
        for destination, amounts in enumerate(self._bytes()):
            for source, nbytes in amounts.items():
                link = link_class(self.plan.sources[source].location, self.plan.destinations[destination].location)
                by_link[LINK_NAMES[link]] += nbytes * len(self.members[destination])
            for source, nbytes in self.spread(destination, amounts):
                given[source] += nbytes
        by_source = {p.holder: nbytes for p, nbytes in zip(self.plan.sources, given, strict=True)}
        return Traffic(by_link, by_source, counted.bytes_by_destination, counted.redundancy)

    def _bytes(self) -> list[dict[int, int]]:
        """By destination of the plan and source."""
        item_bytes = [{b.name: DTYPE_BYTES[b.dtype] for b in p.buffers} for p in self.plan.destinations]
        taken: list[dict[int, int]] = [defaultdict(int) for _ in self.plan.destinations]
        for bucket in self.plan.buckets:
            for copy in bucket.copies:
                taken[copy.destination][copy.source] += copy.size * item_bytes[copy.destination][copy.destination_buffer]
        return taken


def outlined(plan: Plan) -> Outline:
    """A plan in which every destination stands for itself."""
    itself = {source: source for source in range(len(plan.sources))}
    return Outline(plan, tuple((itself,) for _ in plan.destinations))


def outline(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Placement],
    destinations: Sequence[Placement],
    *,
    bucket_bytes: int | None = None,
    takes_room: Callable[[int, int], bool] = lambda destination, source: True,
    transforms: Collection[str] = (),
    kind_of: Callable[[int], Hashable] = lambda destination: None,
) -> tuple[Outline, tuple[int, ...]]:
    """What :func:`rlsync.plan.planner.build_plan` plans, and the indices of the destinations that stand for others.

    ``kind_of``: what else two destinations must have in common. ``takes_room`` may tell sources apart by distance only.
    Raises PlacementError as it does; what is wrong with destinations that are alike may be said of one.
    """
    matching = match(tensors, sources, destinations)
    kinds: dict[Hashable, list[tuple[int, list[int]]]] = defaultdict(list)
    for destination, ways in enumerate(matching.ways):
        own: dict[int, int] = {}
        numbers = tuple([own.setdefault(origin[0], len(own)) for _, _, origin in ways])
        location = destinations[destination].location
        distances = tuple(link_class(sources[source].location, location) for source in own)
        # Objects that all share who take the same; see `match`.
        taken = tuple([id(box) for _, box, _ in ways]), tuple([id(origin[1]) for _, _, origin in ways])
        kinds[kind_of(destination), matching.destinations.kinds[destination], taken, numbers, distances].append((destination, list(own)))
    firsts = tuple(row[0][0] for row in kinds.values())
    members = tuple(tuple(dict(zip(row[0][1], own, strict=True)) for _, own in row) for row in kinds.values())
    chosen = matching.only(firsts)
    copies = copies_of(chosen, transforms)
    roomy = {name: [c for c in row if takes_room(firsts[c.destination], c.source)] for name, row in copies.items()}
    holder_bytes = outlined_holder_bytes(roomy, chosen.destinations.dtypes, members)
    buckets = in_buckets(tensors, copies, holder_bytes, bucket_bytes)
    return Outline(Plan(chosen.sources.placements, chosen.destinations.placements, buckets, ""), members), firsts


def outlined_holder_bytes(
    copies: Mapping[str, Sequence[Copy]], dtypes: Sequence[Mapping[str, str]], members: Sequence[Sequence[Mapping[int, int]]]
) -> dict[str, dict[Hashable, int]]:
    """As :func:`rlsync.plan.planner.holder_bytes_of`, where ``copies`` go to destinations that stand for ``members``, as in an Outline."""
    spread: dict[str, dict[Hashable, int]] = {}
    for name, row in copies.items():
        by_destination: dict[int, list[Copy]] = defaultdict(list)
        for copy in row:
            by_destination[copy.destination].append(copy)
        by_holder: dict[Hashable, int] = defaultdict(int)
        for destination, some in by_destination.items():
            for holder, nbytes in holder_bytes_of({name: some}, dtypes)[name].items():
                assert isinstance(holder, tuple)
                side, index = holder
                if side == "destination":
                    by_holder[holder] += nbytes
                else:
                    for sources in members[destination]:
                        by_holder["source", sources[index]] += nbytes
        spread[name] = by_holder
    return spread
