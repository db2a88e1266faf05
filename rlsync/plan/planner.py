"""Plans: what is left to copy between two sets of placements, in buckets. Pure integers and names; executes nothing.

A plan is complete when it is built: every destination element has exactly one source or is padding, dtypes agree or a transform between
them was allowed, and everything that is wrong comes in one error. Nothing in a plan depends on the order of holders, buffers, pieces.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from rlsync.errors import PlacementError, first_few
from rlsync.layout.geometry import DTYPE_BYTES, Box, Piece, Placement, TensorSpec, collapse
from rlsync.plan.buckets import HolderBytes, grouped, limits_of
from rlsync.plan.matching import Holders, Matching, match
from rlsync.plan.transforms import takes, transform_between


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


def build_plan(
    tensors: Sequence[TensorSpec],
    sources: Sequence[Placement],
    destinations: Sequence[Placement],
    *,
    bucket_bytes: int | None = None,
    takes_room: Callable[[int, int], bool] = lambda destination, source: True,
    transforms: Collection[str] = (),
    frozen: Collection[str] = (),
    declared: Mapping[str, str] | None = None,
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
        frozen: tensors that come first, in buckets of their own, because not every sync sends them.
        declared: rows of ``rlsync.plan.transforms`` by tensor, which stand before all of its copies.

    Raises PlacementError with all findings at once.
    """
    matching = match(tensors, sources, destinations)
    copies = copies_of(matching, transforms, declared or {})
    roomy = {name: [c for c in row if takes_room(c.destination, c.source)] for name, row in copies.items()}
    buckets = in_buckets(tensors, copies, holder_bytes_of(roomy, matching.destinations.dtypes), bucket_bytes, frozen)
    digest = _digest(buckets, matching.sources, matching.destinations)
    return Plan(matching.sources.placements, matching.destinations.placements, buckets, digest)


def copies_of(matching: Matching, transforms: Collection[str], declared: Mapping[str, str]) -> dict[str, list[Copy]]:
    """Copies by tensor, in the order of the destinations' names; transforms as in ``build_plan``.

    Raises PlacementError with all findings at once, those of the matching and dtypes that differ.
    """
    sources, destinations = matching.sources, matching.destinations
    copies: dict[str, list[Copy]] = defaultdict(list)
    for destination in sorted(range(len(destinations.ranks)), key=destinations.ranks.__getitem__):
        rows: dict[str, list[Copy]] = defaultdict(list)
        for piece, box, (source, origin) in matching.ways[destination]:
            dtypes = sources.dtypes[source][origin.buffer], destinations.dtypes[destination][piece.buffer]
            transform = declared.get(piece.tensor) or transform_between(*dtypes, transforms) or ""
            rows[piece.tensor].append(_copy(box, source, origin, destination, piece, transform))
        for name, row in rows.items():
            copies[name].extend(coalesce(row))
    findings = [*matching.findings, *_dtype_findings(copies, sources, destinations)]
    if findings:
        raise PlacementError(f"the plan cannot be built: {first_few(list(dict.fromkeys(findings)), 20, separator='; ')}")
    return copies


def in_buckets(
    tensors: Sequence[TensorSpec],
    copies: Mapping[str, Sequence[Copy]],
    holder_bytes: HolderBytes,
    bucket_bytes: int | None,
    frozen: Collection[str] = (),
) -> tuple[Bucket, ...]:
    """Copies in the order of the tensors, in buckets that a holder's limit ends; those of ``frozen`` come before all others.

    ``holder_bytes``: see ``holder_bytes_of``.
    """
    limits = limits_of(holder_bytes, bucket_bytes)
    parts = ([t for t in tensors if t.name in frozen], [t for t in tensors if t.name not in frozen])
    groups = [group for part in parts for group in grouped(part, holder_bytes, limits)]
    return tuple(Bucket(group, tuple(c for t in group for c in copies.get(t.name, ()))) for group in groups)


def holder_bytes_of(copies: Mapping[str, Iterable[Copy]], dtypes: Sequence[Mapping[str, str]]) -> dict[str, dict[Hashable, int]]:
    """Bytes of each tensor that each destination takes and each source gives. ``dtypes``: by buffer, of each destination."""
    holder_bytes: dict[str, dict[Hashable, int]] = {}
    for name, row in copies.items():
        by_holder: dict[Hashable, int] = defaultdict(int)
        for copy in row:
            nbytes = copy.size * DTYPE_BYTES[dtypes[copy.destination][copy.destination_buffer]]
            by_holder["destination", copy.destination] += nbytes
            by_holder["source", copy.source] += nbytes
        holder_bytes[name] = by_holder
    return holder_bytes


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


def _dtype_findings(copies: Mapping[str, Sequence[Copy]], sources: Holders, destinations: Holders) -> Iterator[str]:
    for name, row in copies.items():
        for c in row:
            found, wanted = sources.dtypes[c.source][c.source_buffer], destinations.dtypes[c.destination][c.destination_buffer]
            if not takes(c.transform, found, wanted) if c.transform else found != wanted:
                destination, source = destinations.placements[c.destination].holder, sources.placements[c.source].holder
                yield f"{name}: {wanted} in {destination}, {found} in {source}"


def _digest(buckets: Sequence[Bucket], sources: Holders, destinations: Holders) -> str:
    """SHA-256 over buckets, tensors, copies, buffers and padding, by names."""
    digest = hashlib.sha256()
    for side in (sources, destinations):
        for placement in sorted(side.placements, key=lambda p: p.holder):
            rows = [f"{b.name}|{b.dtype}|{b.shape}|{b.has_gaps}" for b in placement.buffers]
            rows += [f"{f.buffer}|{f.offset}|{f.shape}|{f.strides}|{float(f.value)!r}" for f in placement.padding]
            digest.update(f"{placement.holder}\n{sorted(rows)}\n".encode())
    from_, to = ([p.holder for p in side.placements] for side in (sources, destinations))
    for bucket in buckets:
        digest.update(f"bucket {[(t.name, t.dtype, t.shape) for t in bucket.tensors]}\n".encode())
        lines = sorted(
            f"{c.tensor}|{c.shape}|{from_[c.source]}|{c.source_buffer}|{c.source_offset}|{c.source_strides}|"
            f"{to[c.destination]}|{c.destination_buffer}|{c.destination_offset}|{c.destination_strides}|{c.transform}"
            for c in bucket.copies
        )
        digest.update("\n".join(lines).encode())
    return digest.hexdigest()
