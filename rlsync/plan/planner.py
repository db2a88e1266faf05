"""Plans: what is left to copy between two sets of placements. Pure integers and names; executes nothing.

A plan is complete when it is built: every destination element has exactly one source or is padding, dtypes agree or a transform between
them was allowed, and everything that is wrong comes in one error. Nothing in a plan depends on the order of holders, buffers, pieces.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from rlsync.errors import PlacementError
from rlsync.layout.geometry import DTYPE_BYTES, Box, Piece, Placement, TensorSpec, collapse, cover
from rlsync.plan.buckets import grouped, limits_of
from rlsync.plan.links import link_class
from rlsync.plan.proof import examine, first_of, listing_findings
from rlsync.plan.transforms import transform_between

# The mean work of a source has so many shares; a piece of two or more is divided among the replicas that have it.
_SHARES_PER_SOURCE = 100


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy; offsets and strides count elements of the named buffers.

    ``source`` and ``destination`` are indices into the plan's placements. ``shape`` has neighbouring dims merged.
    ``transform`` names what stands before it, see ``rlsync.plan.transforms``; empty for a copy bit for bit.
    """

    tensor: str
    shape: tuple[int, ...]
    source: int
    source_buffer: str
    source_offset: int
    source_strides: tuple[int, ...]
    destination: int
    destination_buffer: str
    destination_offset: int
    destination_strides: tuple[int, ...]
    transform: str = ""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Copies that are moved and acknowledged together; all copies of a tensor are in one bucket."""

    tensors: tuple[TensorSpec, ...]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Copies between placements, cut into buckets in the order of the tensors."""

    sources: tuple[Placement, ...]
    destinations: tuple[Placement, ...]
    buckets: tuple[Bucket, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class _Holders:
    """One side of a plan: its placements, what can be worked with of each, dtypes by buffer, and the order of holders by name."""

    placements: tuple[Placement, ...]
    pieces: tuple[tuple[Piece, ...], ...]
    dtypes: tuple[Mapping[str, str], ...]
    ranks: tuple[int, ...]
    findings: tuple[str, ...]

    @classmethod
    def of(cls, placements: Sequence[Placement], specs: Mapping[str, TensorSpec]) -> _Holders:
        examined = [examine(p, specs) for p in placements]
        order = sorted(range(len(placements)), key=lambda i: placements[i].holder)
        return cls(
            tuple(placements),
            tuple(pieces for pieces, _ in examined),
            tuple({b.name: b.dtype for b in p.buffers} for p in placements),
            tuple(sorted(range(len(order)), key=order.__getitem__)),
            tuple(finding for _, findings in examined for finding in findings),
        )


# A source and the piece it gives from.
_Origin = tuple[int, Piece]


def build_plan(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Placement],
    destinations: Sequence[Placement],
    *,
    bucket_bytes: int | None = None,
    takes_room: Callable[[int, int], bool] = lambda destination, source: True,
    transforms: Collection[str] = (),
) -> Plan:
    """Choose one source for each destination element and cut the copies into buckets.

    The nearest source is taken: same device before same host before other host; holders that nobody located are equally far.
    Among equally near ones the work is divided by bytes.

    Args:
        tensors: every HF tensor that may occur, in the order in which buckets carry them.
        sources, destinations: holders. A tensor that no destination wants is not copied.
        bucket_bytes: most bytes of a bucket that one destination takes or one source gives, so that the number of buckets does not
            grow with that of the holders; where a holder's largest tensor is more, that. None: one bucket.
        takes_room: whether copies between a destination and a source count for that, by their indices. Others go along for nothing.
        transforms: rows of ``rlsync.plan.transforms`` by which dtypes of source and destination may differ, in order of preference.

    Raises PlacementError with all findings at once.
    """
    specs = {t.name: t for t in tensors}
    givers, takers = _Holders.of(sources, specs), _Holders.of(destinations, specs)
    findings = [*listing_findings(tensors, sources, destinations), *givers.findings, *takers.findings]
    copies, missing = _matched(tensors, givers, takers, transforms)
    if missing:
        findings.append(f"no source for {len(missing)} pieces: {first_of(missing)}")
    findings += _dtype_findings(copies, givers, takers)
    if findings:
        raise PlacementError("the plan cannot be built: " + "; ".join(dict.fromkeys(findings)))
    roomy = {name: [c for c in row if takes_room(c.destination, c.source)] for name, row in copies.items()}
    shares = shares_of(roomy, takers.dtypes)
    groups = grouped(tensors, shares, limits_of(shares, bucket_bytes))
    buckets = tuple(Bucket(group, tuple(c for t in group for c in copies.get(t.name, ()))) for group in groups)
    return Plan(givers.placements, takers.placements, buckets, _digest(buckets, givers, takers))


def shares_of(copies: Mapping[str, Iterable[Copy]], dtypes: Sequence[Mapping[str, str]]) -> dict[str, dict[Hashable, int]]:
    """By tensor what each destination takes and each source gives; ``copies`` by tensor, ``dtypes`` of each destination's buffers."""
    shares: dict[str, dict[Hashable, int]] = {}
    for name, row in copies.items():
        share: dict[Hashable, int] = defaultdict(int)
        for copy in row:
            nbytes = copy.size * DTYPE_BYTES[dtypes[copy.destination][copy.destination_buffer]]
            share["destination", copy.destination] += nbytes
            share["source", copy.source] += nbytes
        shares[name] = share
    return shares


def _matched(
    tensors: Sequence[TensorSpec], givers: _Holders, takers: _Holders, transforms: Collection[str]
) -> tuple[dict[str, list[Copy]], list[str]]:
    """Copies by tensor, and what no source has."""
    origins, wanted = _origins(givers), _wanted(tensors, takers)
    share_bytes = max(1, sum(nbytes for nbytes, _, _ in wanted) // max(1, len(givers.placements) * _SHARES_PER_SOURCE))
    costs = [[link_class(s.location, d.location) for s in givers.placements] for d in takers.placements]
    loads = [0] * len(givers.placements)
    found: dict[tuple[str, int], list[Copy]] = {}
    missing: list[str] = []
    for nbytes, destination, piece in wanted:

        def rating(origin: _Origin, cost: Sequence[int] = costs[destination]) -> tuple[int, int]:
            return cost[origin[0]], loads[origin[0]]

        taken, rest = _choose(origins.get(piece.tensor, {}), piece.box, rating)
        row = found.setdefault((piece.tensor, destination), [])
        for box, group in taken:
            for part in _parted(box, group, costs[destination], nbytes * box.size // piece.box.size // share_bytes):
                source, origin = group[0] if len(group) == 1 else min(group, key=rating)
                dtypes = givers.dtypes[source][origin.buffer], takers.dtypes[destination][piece.buffer]
                transform = transform_between(*dtypes, transforms) or ""
                row.append(_copy(part, source, origin, destination, piece, transform))
                loads[source] += nbytes * part.size // piece.box.size
        if rest:
            missing.append(f"{piece.tensor}{', '.join(map(str, rest))} wanted by {takers.placements[destination].holder}")
    copies: dict[str, list[Copy]] = defaultdict(list)
    for (name, _), row in sorted(found.items(), key=lambda item: takers.ranks[item[0][1]]):
        copies[name].extend(coalesce(row))
    return copies, sorted(missing)


def _wanted(tensors: Sequence[TensorSpec], takers: _Holders) -> list[tuple[int, int, Piece]]:
    """Bytes, destination and piece of everything that is wanted: the largest first, so that the small ones can even out."""
    ordinals = {t.name: ordinal for ordinal, t in enumerate(tensors)}
    rows = [
        (piece.box.size * DTYPE_BYTES[dtypes[piece.buffer]], ordinals[piece.tensor], destination, piece)
        for destination, (pieces, dtypes) in enumerate(zip(takers.pieces, takers.dtypes, strict=True))
        for piece in pieces
    ]
    rows.sort(key=lambda row: (-row[0], row[1], takers.ranks[row[2]], row[3].box.start, row[3].buffer, row[3].offset))
    return [(nbytes, destination, piece) for nbytes, _, destination, piece in rows if nbytes]


def _origins(givers: _Holders) -> dict[str, dict[Box, list[_Origin]]]:
    """By tensor and box, who has it, in the order of the holders' names."""
    table: dict[str, dict[Box, list[_Origin]]] = defaultdict(dict)
    for source in sorted(range(len(givers.placements)), key=givers.ranks.__getitem__):
        for piece in sorted(givers.pieces[source], key=lambda p: (p.buffer, p.offset)):
            table[piece.tensor].setdefault(piece.box, []).append((source, piece))
    return table


def _choose(
    origins: Mapping[Box, Sequence[_Origin]], wanted: Box, rating: Callable[[_Origin], tuple[int, int]]
) -> tuple[list[tuple[Box, Sequence[_Origin]]], list[Box]]:
    """Cover a box from the nearest and least loaded. Returns boxes with all who have them, and what nobody has."""
    useful = [(box, group) for box, group in origins.items() if wanted.intersect(box) is not None]
    if len(useful) == 1 and useful[0][0].contains(wanted):
        return [(wanted, useful[0][1])], []
    useful.sort(key=lambda row: (min(map(rating, row[1])), row[0].start, row[0].stop))
    taken, rest = cover(wanted, [(box, i) for i, (box, _) in enumerate(useful)])
    return [(box, useful[i][1]) for box, i in taken], rest


def _parted(box: Box, group: Sequence[_Origin], cost: Sequence[int], num_shares: int) -> Iterator[Box]:
    """The box, or slices of it where it is worth several shares and several equally near sources have it."""
    nearest = min(cost[source] for source, _ in group) if num_shares > 1 < len(group) else None
    num_parts = min(num_shares, sum(cost[source] == nearest for source, _ in group))
    dim = next((d for d, size in enumerate(box.shape) if size >= num_parts), None)
    if num_parts < 2 or dim is None:
        yield box
        return
    first, size = box.start[dim], box.shape[dim]
    for i in range(num_parts):
        start, stop = list(box.start), list(box.stop)
        start[dim], stop[dim] = first + size * i // num_parts, first + size * (i + 1) // num_parts
        yield Box(tuple(start), tuple(stop))


def _copy(box: Box, source: int, origin: Piece, destination: int, piece: Piece, transform: str) -> Copy:
    shape, (source_strides, destination_strides) = collapse(box.shape, origin.strides, piece.strides)
    return Copy(
        piece.tensor, shape,
        source, origin.buffer, origin.offset_of(box), source_strides,
        destination, piece.buffer, piece.offset_of(box), destination_strides, transform,
    )  # fmt: skip


def coalesce(copies: Sequence[Copy]) -> list[Copy]:
    """Copies of one tensor to one destination, with those of equal form at equal distances made one: the heads of a packed QKV."""
    if len(copies) < 2:
        return list(copies)
    alike: dict[tuple[object, ...], list[Copy]] = defaultdict(list)
    for c in sorted(copies, key=lambda c: (c.destination_buffer, c.destination_offset)):
        alike[c.source, c.source_buffer, c.destination_buffer, c.shape, c.source_strides, c.destination_strides].append(c)
    return [_joined(run) for group in alike.values() for run in _even_runs(group)]


def _even_runs(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Split copies, sorted by destination, into runs whose offsets grow by the same steps on both sides."""
    run: list[Copy] = []
    for copy in copies:
        even = _step(run[-1], copy) == _step(run[0], run[1]) if len(run) > 1 else not run or _step(run[0], copy)[0] > 0
        if not even:
            yield run
            run = []
        run.append(copy)
    yield run


def _step(a: Copy, b: Copy) -> tuple[int, int]:
    return b.source_offset - a.source_offset, b.destination_offset - a.destination_offset


def _joined(run: Sequence[Copy]) -> Copy:
    if len(run) == 1:
        return run[0]
    first = run[0]
    step = _step(first, run[1])
    strides = (step[0], *first.source_strides), (step[1], *first.destination_strides)
    shape, (source_strides, destination_strides) = collapse((len(run), *first.shape), *strides)
    return replace(first, shape=shape, source_strides=source_strides, destination_strides=destination_strides)


def _dtype_findings(copies: Mapping[str, Sequence[Copy]], givers: _Holders, takers: _Holders) -> Iterator[str]:
    for name, row in copies.items():
        for c in row:
            found, wanted = givers.dtypes[c.source][c.source_buffer], takers.dtypes[c.destination][c.destination_buffer]
            if found != wanted and not c.transform:
                taker, giver = takers.placements[c.destination].holder, givers.placements[c.source].holder
                yield f"{name}: {wanted} in {taker}, {found} in {giver}"


def _digest(buckets: Sequence[Bucket], givers: _Holders, takers: _Holders) -> str:
    """SHA-256 over buckets, tensors, copies, buffers and padding, by names."""
    digest = hashlib.sha256()
    for side in (givers, takers):
        for placement in sorted(side.placements, key=lambda p: p.holder):
            rows = [f"{b.name}|{b.dtype}|{b.shape}|{b.has_gaps}" for b in placement.buffers]
            rows += [f"{f.buffer}|{f.offset}|{f.shape}|{f.strides}|{float(f.value)!r}" for f in placement.padding]
            digest.update(f"{placement.holder}\n{sorted(rows)}\n".encode())
    from_, to = ([p.holder for p in side.placements] for side in (givers, takers))
    for bucket in buckets:
        digest.update(f"bucket {[(t.name, t.dtype, t.shape) for t in bucket.tensors]}\n".encode())
        lines = sorted(
            f"{c.tensor}|{c.shape}|{from_[c.source]}|{c.source_buffer}|{c.source_offset}|{c.source_strides}|"
            f"{to[c.destination]}|{c.destination_buffer}|{c.destination_offset}|{c.destination_strides}|{c.transform}"
            for c in bucket.copies
        )
        digest.update("\n".join(lines).encode())
    return digest.hexdigest()
