"""Proof of placements: what is wrong with them, before anything is planned. Pure; chooses no source and builds no copy.

Buffers must be filled exactly once by their pieces and padding (nowhere twice, where they have gaps), of tensors that are known,
under names that are used once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import prod
from operator import le

from rlsync.errors import first_few
from rlsync.layout.geometry import DTYPE_BYTES, Box, BufferSpec, Piece, Placement, TensorSpec, box_in_buffer, collapse, cover

# What lies in a buffer, under its tensor's name or as "padding": offset, shape and strides in elements.
_LocalBox = tuple[str, int, tuple[int, ...], tuple[int, ...]]


def listing_findings(tensors: Sequence[TensorSpec], sources: Sequence[Placement], destinations: Sequence[Placement]) -> Iterator[str]:
    """Names used twice where one thing is meant, and dtypes that nobody knows."""
    lists = {
        "tensors listed twice": [t.name for t in tensors],
        "sources of one name": [p.holder for p in sources],
        "destinations of one name": [p.holder for p in destinations],
        **{f"buffers of one name in {p.holder}": [b.name for b in p.buffers] for p in (*sources, *destinations)},
    }
    for what, names in lists.items():
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            yield f"{what}: {first_few(twice)}"
    strange = {t.name: t.dtype for t in tensors if t.dtype not in DTYPE_BYTES}
    strange |= {f"{b.name} of {p.holder}": b.dtype for p in (*sources, *destinations) for b in p.buffers if b.dtype not in DTYPE_BYTES}
    for name, dtype in strange.items():
        yield f"{name} has dtype {dtype}, of which no size is known"


def examine(placement: Placement, specs: Mapping[str, TensorSpec]) -> tuple[tuple[Piece, ...], list[str]]:
    """The pieces that can be worked with, and what is wrong with the placement.

    Found are unknown tensors and buffers, pieces that are none of their tensor, and buffers that are not filled exactly once.
    """
    holder = placement.holder
    sizable = {b.name: b.dtype in DTYPE_BYTES for b in placement.buffers}
    unknown, strays, unclear = set(), {f.buffer for f in placement.padding if f.buffer not in sizable}, set()
    sound: list[Piece] = []
    misfits: list[str] = []
    parts: dict[str, list[_LocalBox]] = defaultdict(list)
    for piece in placement.pieces:
        spec = specs.get(piece.tensor)
        misfit = _misfit(piece, None if spec is None else spec.shape)
        if misfit is not None:
            misfits.append(f"{piece.tensor}{piece.box} in {holder} {misfit}")
            unclear.add(piece.buffer)
        if spec is None:
            unknown.add(piece.tensor)
        if piece.buffer not in sizable:
            strays.add(piece.buffer)
        elif spec is not None and misfit is None and sizable[piece.buffer]:
            sound.append(piece)
        parts[piece.buffer].append((piece.tensor, piece.offset, piece.box.shape, piece.strides))
    for box in placement.padding:
        parts[box.buffer].append(("padding", box.offset, box.shape, box.strides))
    findings = [f"unknown tensors in {holder}: {first_few(sorted(unknown))}"] if unknown else []
    if strays:
        findings.append(f"pieces in {holder} that lie in buffers which it does not list: {first_few(sorted(strays))}")
    fillings = ((b.name, _filling(b, parts[b.name])) for b in placement.buffers if b.name not in unclear)
    return tuple(sound), [*findings, *misfits, *(f"{name} of {holder} {finding}" for name, finding in fillings if finding is not None)]


def _misfit(piece: Piece, shape: tuple[int, ...] | None) -> str | None:
    """Why a piece cannot be one of a tensor of this shape, or, where that is None, of any; None when it can."""
    start, stop = piece.box.start, piece.box.stop
    dims = len(start) if shape is None else len(shape)
    if not len(start) == len(stop) == len(piece.strides) == dims:
        return f"has {len(start)}, {len(stop)} and {len(piece.strides)} starts, stops and strides, where its tensor has {dims} dims"
    if min(start, default=0) < 0 or not all(map(le, start, stop)) or not (shape is None or all(map(le, stop, shape))):
        return f"lies outside its shape {shape}"
    return None


def _filling(buffer: BufferSpec, parts: Sequence[_LocalBox]) -> str | None:
    """None when the parts fill the buffer exactly once, or no element twice where it has gaps; else what is wrong."""
    parts = [part for part in parts if prod(part[2])]
    if _is_filled_in_order(buffer, parts):
        return None
    boxes = [box_in_buffer(buffer, *part[1:]) for part in parts]
    if None in boxes:
        return f"has a piece that is no box of its shape {buffer.shape}: tensor, offset, shape, strides {parts[boxes.index(None)]}"
    named = sorted(((box, part[0]) for box, part in zip(boxes, parts, strict=True) if box is not None), key=lambda row: row[0].start)
    # Equal volume and full cover exclude overlaps. In the order of their starts the rest stays in few boxes.
    _, rest = cover(Box.whole(buffer.shape), [(box, 0) for box, _ in named])
    filled = sum(box.size for box, _ in named)
    gaps = sum(box.size for box in rest)
    if filled == buffer.size - gaps and (buffer.has_gaps or not rest):
        return None
    says = [f"has {buffer.size} elements, of which its pieces fill {filled}"]
    if rest and not buffer.has_gaps:
        says.append(f"nothing fills {first_few([str(box) for box in rest])}")
    if filled > buffer.size - gaps:
        says.append(f"filled twice: {', '.join(islice(_doubled(named), 5))}")
    return "; ".join(says)


def _is_filled_in_order(buffer: BufferSpec, parts: Iterable[_LocalBox]) -> bool:
    """Whether the parts are dense and lie one after the other from the first element to the last, which is the usual case."""
    end = 0
    for _, offset, shape, strides in sorted(parts, key=lambda part: part[1]):
        size, (_, (steps,)) = prod(shape), collapse(shape, strides)
        if offset != end or steps not in ((), (1,)):
            return False
        end += size
    return end == buffer.size


def _doubled(named: Sequence[tuple[Box, str]]) -> Iterator[str]:
    """Overlaps of boxes that are sorted by their starts."""
    for index, (box, name) in enumerate(named):
        for other, other_name in named[index + 1 :]:
            if other.start and other.start[0] >= box.stop[0]:
                break
            common = box.intersect(other)
            if common is not None:
                yield f"{common} by {name} and {other_name}"
