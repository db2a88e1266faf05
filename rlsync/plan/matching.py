"""Who gives what to whom: one source for each piece that a destination wants, the nearest and among those the least loaded.

Owns neither copies nor buckets, which ``rlsync.plan.planner`` makes of it. Pure integers and names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from rlsync.errors import first_few
from rlsync.layout.geometry import DTYPE_BYTES, Box, Location, Piece, Placement, TensorSpec, cover
from rlsync.plan.links import link_class
from rlsync.plan.proof import examine, listing_findings

# The mean work of a source is divided into so many units; a piece of two or more is divided among the replicas that have it.
_UNITS_PER_SOURCE = 100
# So many equally near sources are asked all at once for as many pieces as are wanted.
_FEW = 4


@dataclass(frozen=True, slots=True)
class Holders:
    """One side of a plan: its placements, what can be worked with of each, dtypes by buffer, and the order of holders by name.

    ``kinds``: by placement a number that those share which hold the same, wherever they are.
    """

    placements: tuple[Placement, ...]
    kinds: tuple[int, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    dtypes: tuple[Mapping[str, str], ...]
    ranks: tuple[int, ...]
    findings: tuple[str, ...]

    @classmethod
    def of(cls, placements: Sequence[Placement], specs: Mapping[str, TensorSpec]) -> Holders:
        kinds = _kinds_of(placements)
        of_kind = dict(zip(reversed(kinds), reversed(placements), strict=True))
        firsts = {kind: examine(p, specs) for kind, p in of_kind.items()}
        dtypes = {kind: {b.name: b.dtype for b in p.buffers} for kind, p in of_kind.items()}
        # What is wrong with one is wrong with each, and says whose it is.
        findings = [found for p, kind in zip(placements, kinds, strict=True) if firsts[kind][1] for found in examine(p, specs)[1]]
        order = sorted(range(len(placements)), key=lambda i: placements[i].holder)
        return cls(
            tuple(placements),
            kinds,
            tuple(firsts[kind][0] for kind in kinds),
            tuple(dtypes[kind] for kind in kinds),
            tuple(sorted(range(len(order)), key=order.__getitem__)),
            tuple(findings),
        )

    def only(self, indices: Sequence[int]) -> Holders:
        """Some of them, in this order."""
        order = sorted(range(len(indices)), key=lambda i: self.ranks[indices[i]])
        return Holders(
            tuple(self.placements[i] for i in indices),
            tuple(self.kinds[i] for i in indices),
            tuple(self.pieces[i] for i in indices),
            tuple(self.dtypes[i] for i in indices),
            tuple(sorted(range(len(order)), key=order.__getitem__)),
            self.findings,
        )


def _kinds_of(placements: Sequence[Placement]) -> tuple[int, ...]:
    """A number for each placement, equal for those that hold the same: replicas of an actor rank, the same worker of equal engines."""
    numbers: dict[object, int] = {}
    # Hashing thousands of pieces takes long, and on paper those who hold the same are one object.
    known: dict[tuple[int, int, int], int] = {}
    kinds = []
    for p in placements:
        identity = id(p.buffers), id(p.pieces), id(p.padding)
        if identity not in known:
            known[identity] = numbers.setdefault((p.buffers, p.pieces, p.padding), len(numbers))
        kinds.append(known[identity])
    return tuple(kinds)


# A source and the piece it gives from.
_Origin = tuple[int, Piece]
# What goes to a destination: its piece, the box of that, and where it comes from.
Way = tuple[Piece, Box, _Origin]


@dataclass(frozen=True, slots=True)
class Matching:
    """Who gives what to whom, before it is made copies: by destination its ways, in the order in which they were chosen.

    ``findings``: what keeps it from being a plan.
    """

    sources: Holders
    destinations: Holders
    ways: tuple[list[Way], ...]
    findings: tuple[str, ...] = ()

    def only(self, destinations: Sequence[int]) -> Matching:
        """This matching for some of the destinations, which are numbered anew."""
        return Matching(self.sources, self.destinations.only(destinations), tuple(self.ways[d] for d in destinations), self.findings)


def match(tensors: Sequence[TensorSpec], sources: Sequence[Placement], destinations: Sequence[Placement]) -> Matching:
    """Choose a source for everything that the destinations hold."""
    specs = {t.name: t for t in tensors}
    source_holders, destination_holders = Holders.of(sources, specs), Holders.of(destinations, specs)
    findings = [*listing_findings(tensors, sources, destinations), *source_holders.findings, *destination_holders.findings]
    ways, missing = _matched(tensors, source_holders, destination_holders)
    if missing:
        findings.append(f"no source for {len(missing)} pieces: {first_few(missing)}")
    return Matching(source_holders, destination_holders, ways, tuple(findings))


def _matched(tensors: Sequence[TensorSpec], sources: Holders, destinations: Holders) -> tuple[tuple[list[Way], ...], list[str]]:
    """Ways by destination, and what no source has."""
    matcher = _Matcher(sources, destinations, _wanted(tensors, destinations))
    matcher.match_all()
    return matcher.ways, sorted(matcher.missing)


class _Matcher:
    """Finds sources for everything that is wanted.

    The largest pieces come first, so that the small ones can even out. Destinations that want the same come after one another, because
    which boxes of whom cover it is found once for them all; each then takes the least loaded of those that are nearest to it.

    Attributes:
        ways: by destination.
        missing: what no source has.
    """

    def __init__(self, sources: Holders, destinations: Holders, wanted: Sequence[tuple[int, Piece, list[int]]]) -> None:
        self._sources, self._destinations, self._wanted, self._origins = sources, destinations, wanted, _origins(sources)
        total_bytes = sum(nbytes * len(row) for nbytes, _, row in wanted)
        self._unit_bytes = max(1, total_bytes // max(1, len(sources.placements) * _UNITS_PER_SOURCE))
        self._loads = [0] * len(sources.placements)
        numbers: dict[Location | None, int] = {}
        self._places = [numbers.setdefault(p.location, len(numbers)) for p in destinations.placements]
        self._locations = tuple(numbers)
        hosts = {None if p.location is None else p.location.host for p in sources.placements}
        self._all_are_far = None not in hosts and all(at is not None and at.host not in hosts for at in self._locations)
        self._crowds: dict[tuple[int, ...], _Crowd] = {}
        # By identity of a list of ``_origins``, and of one of ``_wanted``: the same ones are asked for often.
        self._crowd_by_group: dict[int, _Crowd] = {}
        self._appends_by_row: dict[int, list[Callable[[Way], None]]] = {}
        self.ways: tuple[list[Way], ...] = tuple([] for _ in destinations.placements)
        self.missing: list[str] = []

    def match_all(self) -> None:
        """Fill ``ways`` and ``missing``."""
        unit_bytes, all_are_far = self._unit_bytes, self._all_are_far
        for nbytes, piece, row in self._wanted:
            boxes = self._origins.get(piece.tensor, {})
            # One box that has all of it is the usual case of experts, which are many.
            is_inside = len(boxes) == 1 and next(iter(boxes)).contains(piece.box)
            if is_inside and all_are_far and nbytes // unit_bytes < 2:
                self._hand_out(piece, piece.box, next(iter(boxes.values())), nbytes, row)
            elif is_inside:
                self._take_each(piece, list(boxes.items()), [(piece.box, 0)], nbytes, row, {})
            else:
                self._cover(piece, boxes, nbytes, row)

    def _cover(self, piece: Piece, boxes: Mapping[Box, list[_Origin]], nbytes: int, row: list[int]) -> None:
        """Have everybody of a row take a piece out of several boxes."""
        useful = [(box, group) for box, group in boxes.items() if piece.box.intersect(box) is not None]
        useful.sort(key=lambda each: (each[0].start, each[0].stop))
        taken, rest = cover(piece.box, [(box, i) for i, (box, _) in enumerate(useful)])
        # Where boxes overlap it matters which come first: for each destination those that are nearest to it and least loaded.
        common_sizes = [common.size for box, _ in useful if (common := piece.box.intersect(box))]
        overlap = sum(common_sizes) > sum(box.size for box, _ in taken)
        cuts: _Cuts = {}
        if overlap:
            crowds = [self._crowd(group) for _, group in useful]
            for destination in row:
                order = sorted(range(len(useful)), key=lambda i: crowds[i].near(self._places[destination]).rating())
                taken, _ = cover(piece.box, [(useful[i][0], i) for i in order])
                self._take_each(piece, useful, taken, nbytes, [destination], cuts)
        elif self._all_are_far and len(taken) == 1 and nbytes * taken[0][0].size // piece.box.size // self._unit_bytes < 2:
            ((box, index),) = taken
            self._hand_out(piece, box, useful[index][1], nbytes, row)
        else:
            self._take_each(piece, useful, taken, nbytes, row, cuts)
        if rest:
            said = ", ".join(map(str, rest))
            self.missing += [f"{piece.tensor}{said} wanted by {self._destinations.placements[d].holder}" for d in row]

    def _hand_out(self, piece: Piece, box: Box, group: Sequence[_Origin], nbytes: int, row: list[int]) -> None:
        """Have everybody of a row take one box, from any who has it: all of these are equally far. Most of large clusters on paper."""
        positions = self._crowd(group).near(self._places[row[0]]).take(len(row), nbytes)
        appends = self._appends_by_row.get(id(row))
        if appends is None:
            appends = self._appends_by_row[id(row)] = [self.ways[destination].append for destination in row]
        if len(group) == 1:
            only = piece, box, group[0]
            for append in appends:
                append(only)
            return
        way_of: dict[int, Way] = {position: (piece, box, group[position]) for position in set(positions)}
        for append, way in zip(appends, map(way_of.__getitem__, positions), strict=True):
            append(way)

    def _take_each(
        self,
        piece: Piece,
        useful: Sequence[tuple[Box, list[_Origin]]],
        taken: Sequence[tuple[Box, int]],
        nbytes: int,
        row: Sequence[int],
        cuts: _Cuts,
    ) -> None:
        """Have everybody of a row take these boxes, each from the least loaded of the nearest, and large ones from several of them.

        ``taken``: boxes and their places in ``useful``. ``cuts``: those of the piece found so far.
        """
        chosen = [(box, index, nbytes * box.size // piece.box.size // self._unit_bytes) for box, index in taken]
        for destination in row:
            place, own = self._places[destination], self.ways[destination]
            for box, index, num_units in chosen:
                group = useful[index][1]
                near = self._crowd(group).near(place)
                key = box, index, 1 if num_units < 2 else min(num_units, len(near.members))
                if key not in cuts:
                    cuts[key] = tuple(_Cut(part, nbytes * part.size // piece.box.size, {}) for part in _parted(box, key[2]))
                for cut in cuts[key]:
                    (position,) = near.take(1, cut.nbytes)
                    way = cut.ways.get(position)
                    if way is None:
                        way = cut.ways[position] = piece, cut.box, group[position]
                    own.append(way)

    def _crowd(self, group: Sequence[_Origin]) -> _Crowd:
        found = self._crowd_by_group.get(id(group))
        if found is None:
            who = tuple([source for source, _ in group])
            if who not in self._crowds:
                placements = self._sources.placements
                self._crowds[who] = _Crowd(who, [placements[source].location for source in who], self._locations, self._loads)
            found = self._crowd_by_group[id(group)] = self._crowds[who]
        return found


@dataclass(frozen=True, slots=True)
class _Cut:
    """A box that is taken from one source, its bytes in the destination, and the ways of it by the position of the source."""

    box: Box
    nbytes: int
    ways: dict[int, Way]


# Of a piece, by a box of it, who gives that, and into how many it is parted. Ways and boxes are one object for all who take them, by which
# `rlsync.plan.outline` knows them again.
_Cuts = dict[tuple[Box, int, int], tuple[_Cut, ...]]


def _wanted(tensors: Sequence[TensorSpec], destinations: Holders) -> list[tuple[int, Piece, list[int]]]:
    """Bytes and piece of everything that is wanted, the largest first, and the destinations that want it, in the order of their names."""
    ordinals = {t.name: ordinal for ordinal, t in enumerate(tensors)}
    by_kind: dict[int, list[int]] = defaultdict(list)
    for destination in sorted(range(len(destinations.kinds)), key=destinations.ranks.__getitem__):
        by_kind[destinations.kinds[destination]].append(destination)
    wanting: dict[tuple[int, Piece], list[int]] = defaultdict(list)
    for kind, (first, *_) in by_kind.items():
        for piece in destinations.pieces[first]:
            nbytes = piece.box.size * DTYPE_BYTES[destinations.dtypes[first][piece.buffer]]
            if nbytes:
                wanting[nbytes, piece].append(kind)
    merged: dict[tuple[int, ...], list[int]] = {}
    rows = []
    for (nbytes, piece), kinds in wanting.items():
        key = tuple(kinds)
        if key not in merged:
            merged[key] = sorted((d for kind in dict.fromkeys(key) for d in by_kind[kind]), key=destinations.ranks.__getitem__)
        rows.append((nbytes, piece, merged[key]))
    rows.sort(
        key=lambda row: (-row[0], ordinals[row[1].tensor], row[1].box.start, row[1].box.stop, row[1].buffer, row[1].offset, row[1].strides)
    )
    return rows


def _origins(sources: Holders) -> dict[str, dict[Box, list[_Origin]]]:
    """Tensor -> box -> sources that have it and their pieces, in the order of the holders' names."""
    table: dict[str, dict[Box, list[_Origin]]] = defaultdict(dict)
    in_order = {
        kind: sorted(pieces, key=lambda p: (p.buffer, p.offset)) for kind, pieces in zip(sources.kinds, sources.pieces, strict=True)
    }
    for source in sorted(range(len(sources.placements)), key=sources.ranks.__getitem__):
        for piece in in_order[sources.kinds[source]]:
            table[piece.tensor].setdefault(piece.box, []).append((source, piece))
    return table


def _steps(load: int, nbytes: int, count: int) -> range:
    return range(load, load + count * nbytes, nbytes)


class _Near:
    """The sources of a crowd that are equally near to a destination, by their positions in the crowd."""

    def __init__(self, sources: Sequence[int], members: Sequence[int], cost: int, loads: list[int]) -> None:
        self.members, self._cost = members, cost
        self._sources, self._loads = sources, loads
        # Loads only grow, so that what the heap says of one is at most what it has.
        self._heap = [(loads[sources[position]], position) for position in members]
        heapify(self._heap)

    def take(self, count: int, nbytes: int) -> list[int]:
        """So many times the position of the least loaded, the first of equals, which then has so many bytes more."""
        loads, sources, heap = self._loads, self._sources, self._heap
        if len(self.members) == 1:
            loads[sources[self.members[0]]] += count * nbytes
            return [self.members[0]] * count
        if nbytes and count >= len(self.members):
            in_turn = sorted([(loads[sources[position]], position) for position in self.members])
            if in_turn[-1][0] - in_turn[0][0] < nbytes:
                # Whoever is taken then has more than all others, so that they take turns.
                turns = [position for _, position in in_turn]
                rounds, more = divmod(count, len(turns))
                for number, position in enumerate(turns):
                    loads[sources[position]] += (rounds + (number < more)) * nbytes
                return turns * rounds + turns[:more]
        if len(self.members) <= _FEW < count and nbytes:
            # Sorted runs: what each would have before it is taken the first, the second, ... time. Equals by position, as in the heap.
            size = max(self.members) + 1
            runs = [load * size + position for position in self.members for load in _steps(loads[sources[position]], nbytes, count)]
            runs.sort()
            positions = [run % size for run in runs[:count]]
            for position in self.members:
                loads[sources[position]] += positions.count(position) * nbytes
            return positions
        positions = []
        for _ in range(count):
            load, position = self._least()
            loads[sources[position]] = load + nbytes
            heapreplace(heap, (load + nbytes, position))
            positions.append(position)
        return positions

    def _least(self) -> tuple[int, int]:
        """Load and position, which lie on top of the heap then."""
        heap, loads, sources = self._heap, self._loads, self._sources
        while True:
            known, position = heap[0]
            load = loads[sources[position]]
            if load == known:
                return load, position
            heapreplace(heap, (load, position))

    def rating(self) -> tuple[int, int]:
        return self._cost, self._least()[0]


class _Crowd:
    """Sources that have the same box of a tensor, in the order of their names. ``locations``: theirs; ``places``: of destinations."""

    def __init__(
        self, sources: Sequence[int], locations: Sequence[Location | None], places: Sequence[Location | None], loads: list[int]
    ) -> None:
        self._sources, self._locations, self._places, self._loads = sources, locations, places, loads
        self._hosts = {None if location is None else location.host for location in locations}
        self._found: dict[int, _Near] = {}
        self._far: _Near | None = None

    def near(self, place: int) -> _Near:
        """The sources that are nearest to the destinations at a place."""
        found = self._found.get(place)
        if found is None:
            found = self._found[place] = self._nearest(self._places[place])
        return found

    def _nearest(self, location: Location | None) -> _Near:
        is_far = location is not None and None not in self._hosts and location.host not in self._hosts
        if is_far and self._far is not None:
            return self._far
        costs = [link_class(each, location) for each in self._locations]
        nearest = [position for position, cost in enumerate(costs) if cost == min(costs)]
        near = _Near(self._sources, nearest, min(costs), self._loads)
        if is_far:
            # From a host that has none of them all are equally far, also from another such host.
            self._far = near
        return near


def _parted(box: Box, num_parts: int) -> Iterator[Box]:
    """The box, or slices of it where it is worth several units and several equally near sources have it."""
    dim = next((d for d, size in enumerate(box.shape) if size >= num_parts), None)
    if num_parts < 2 or dim is None:
        yield box
        return
    first, size = box.start[dim], box.shape[dim]
    for i in range(num_parts):
        start, stop = list(box.start), list(box.stop)
        start[dim], stop[dim] = first + size * i // num_parts, first + size * (i + 1) // num_parts
        yield Box(tuple(start), tuple(stop))
