"""Plans: what is left to copy between two sets of placements. Pure integers and names; executes nothing.

A plan proves its completeness when it is built: every destination element has exactly one source or one fill, dtypes
agree or a cast was allowed, and unknown, missing and wrongly shaped names are reported together in one error.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from rlsync.errors import PlacementError
from rlsync.geometry import Box, BufferSpec, Piece, Placement, TensorSpec, box_in_buffer, collapse, cover
from rlsync.links import link_class

Preference = Callable[[int, int], int]
FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True)
class Copy:
    """One strided copy; offsets and strides count elements of the named buffers.

    ``source`` and ``destination`` are indices into the plan's placements. ``shape`` has neighbouring dims merged.
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


def build_plan(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Placement],
    destinations: Sequence[Placement],
    *,
    bucket_bytes: int | None = None,
    prefer: Preference | None = None,
    allow_cast: bool = False,
) -> Plan:
    """Choose one source for each destination element and cut the copies into buckets.

    Args:
        tensors: every HF tensor that may occur, in the order in which buckets carry them.
        sources, destinations: holders. A tensor that no destination wants is not copied.
        bucket_bytes: most bytes of HF tensors in one bucket; a larger tensor has a bucket to itself. None: one bucket.
        prefer: cost of a source for a destination, by index; the lowest is taken, ties are spread over the sources. By
            default the distance of their locations: same device before same host before other host.
        allow_cast: floating-point dtypes of source and destination may differ.

    Raises PlacementError with all findings at once.
    """
    specs = {t.name: t for t in tensors}
    prefer = _nearest(sources, destinations) if prefer is None else prefer
    findings = [f for p in (*sources, *destinations) for f in _placement_findings(p, specs)]
    have = _by_tensor(sources)
    want = _by_tensor(destinations)
    dtypes = [{b.name: b.dtype for b in p.buffers} for p in sources], [{b.name: b.dtype for b in p.buffers} for p in destinations]
    copies: dict[str, list[Copy]] = defaultdict(list)
    missing: list[str] = []
    turns = {index: turn for turn, index in enumerate(sorted(range(len(destinations)), key=lambda i: destinations[i].holder))}
    for ordinal, spec in enumerate(tensors):
        for destination, piece in want.get(spec.name, ()):
            order = _ranked(have.get(spec.name, ()), destination, ordinal + turns[destination], prefer)
            taken, rest = cover(piece.box, [(p.box, i) for i, (_, p) in enumerate(order)])
            for box, i in taken:
                source, origin = order[i]
                copies[spec.name].append(_copy(box, source, origin, destination, piece))
                found, wanted = dtypes[0][source][origin.buffer], dtypes[1][destination][piece.buffer]
                if found != wanted and not (allow_cast and {found, wanted} <= FLOATS):
                    findings.append(f"{spec.name}: {wanted} in {destinations[destination].holder}, {found} in {sources[source].holder}")
            if rest:
                missing.append(f"{spec.name}{', '.join(map(str, rest))} wanted by {destinations[destination].holder}")
    if missing:
        findings.append(f"no source for {len(missing)} pieces: {_first(missing)}")
    if findings:
        raise PlacementError("the plan cannot be built: " + "; ".join(dict.fromkeys(findings)))
    buckets = tuple(Bucket(group, tuple(c for t in group for c in copies.get(t.name, ()))) for group in cut_buckets(tensors, bucket_bytes))
    return Plan(tuple(sources), tuple(destinations), buckets, _digest(tensors, sources, destinations, copies))


def cut_buckets(tensors: Iterable[TensorSpec], bucket_bytes: int | None) -> tuple[tuple[TensorSpec, ...], ...]:
    """Consecutive groups of tensors of at most ``bucket_bytes``; a larger tensor is a group of its own."""
    groups: list[list[TensorSpec]] = []
    filled = 0
    for tensor in tensors:
        if not groups or (bucket_bytes is not None and filled + tensor.nbytes > bucket_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return tuple(map(tuple, groups))


def _copy(box: Box, source: int, origin: Piece, destination: int, piece: Piece) -> Copy:
    shape, (source_strides, destination_strides) = collapse(box.shape, origin.strides, piece.strides)
    return Copy(
        piece.tensor, shape,
        source, origin.buffer, origin.offset_of(box), source_strides,
        destination, piece.buffer, piece.offset_of(box), destination_strides,
    )  # fmt: skip


def _ranked(candidates: Sequence[tuple[int, Piece]], destination: int, turn: int, prefer: Preference) -> list[tuple[int, Piece]]:
    """Candidates from the best; equal ones are rotated by ``turn``, so that replicas share the work."""
    count = len(candidates)
    return [
        candidate
        for _, _, candidate in sorted(
            ((prefer(c[0], destination), (i - turn) % count, c) for i, c in enumerate(candidates)), key=lambda row: row[:2]
        )
    ]


def _by_tensor(placements: Sequence[Placement]) -> dict[str, list[tuple[int, Piece]]]:
    table: dict[str, list[tuple[int, Piece]]] = defaultdict(list)
    # By holder name, so that the choice among replicas does not depend on the order of the arguments.
    for index, placement in sorted(enumerate(placements), key=lambda row: row[1].holder):
        for piece in placement.pieces:
            table[piece.tensor].append((index, piece))
    return table


def _nearest(sources: Sequence[Placement], destinations: Sequence[Placement]) -> Preference:
    """Cost by link class of two holders."""
    return lambda source, destination: link_class(sources[source].location, destinations[destination].location)


def _placement_findings(placement: Placement, specs: dict[str, TensorSpec]) -> Iterable[str]:
    """What is wrong with one placement: unknown tensors, boxes outside their tensor, buffers not filled exactly once."""
    parts: dict[str, list[tuple[int, tuple[int, ...], tuple[int, ...]]]] = defaultdict(list)
    unknown = []
    for piece in placement.pieces:
        spec = specs.get(piece.tensor)
        if spec is None:
            unknown.append(piece.tensor)
        elif not Box.whole(spec.shape).contains(piece.box):
            yield f"{piece.tensor}{piece.box} in {placement.holder} lies outside its shape {spec.shape}"
        parts[piece.buffer].append((piece.offset, piece.box.shape, piece.strides))
    for fill in placement.fills:
        parts[fill.buffer].append((fill.offset, fill.shape, fill.strides))
    if unknown:
        yield f"unknown tensors in {placement.holder}: {_first(sorted(set(unknown)))}"
    for buffer in placement.buffers:
        finding = _filling(buffer, parts[buffer.name])
        if finding is not None:
            yield f"{buffer.name} of {placement.holder} {finding}"


def _filling(buffer: BufferSpec, parts: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> str | None:
    """None when the parts fill the buffer exactly once, else what is wrong. Equal volume and full cover exclude overlaps."""
    filled = sum(prod(shape) for _, shape, _ in parts)
    if filled != buffer.size:
        return f"has {buffer.size} elements, of which its pieces fill {filled}"
    boxes = [box_in_buffer(buffer, *part) for part in parts]
    if None in boxes:
        return f"has a piece that is no box of its shape {buffer.shape}: offset, shape, strides {parts[boxes.index(None)]}"
    _, rest = cover(Box.whole(buffer.shape), [(box, i) for i, box in enumerate(boxes) if box is not None])
    return f"has elements that no piece fills, while others are filled twice: {', '.join(map(str, rest[:5]))}" if rest else None


def _first(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _digest(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Placement],
    destinations: Sequence[Placement],
    copies: dict[str, list[Copy]],
) -> str:
    """SHA-256 over tensors and copies by holder name; independent of the order in which copies were found."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name}|{tensor.dtype}|{tensor.shape}\n".encode())
        rows = sorted(
            f"{sources[c.source].holder}|{c.source_buffer}|{c.source_offset}|{c.source_strides}|"
            f"{destinations[c.destination].holder}|{c.destination_buffer}|{c.destination_offset}|{c.destination_strides}|{c.shape}"
            for c in copies.get(tensor.name, ())
        )
        digest.update("\n".join(rows).encode())
    return digest.hexdigest()
