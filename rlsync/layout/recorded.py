"""Placement of a vLLM worker, from the recorded writes of its own loaders. Pure: knows no vLLM and no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rlsync.layout.geometry import FLOATS, Box, BufferSpec, Location, Padding, Piece, Placement, TensorSpec, contiguous_strides, cover
from rlsync.layout.regions import Side, StridedRegion, split

# A tensor of which more boxes are read is given whole: each costs a copy.
MOST_BOXES_READ = 64


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a loader into one buffer of the worker, in the order in which they were made.

    ``offset``, ``shape`` and ``strides`` (elements) describe the region of ``buffer``. Its elements come, in the same order,
    from the HF tensor ``source`` (contiguous, row-major) at ``source_offset`` with ``source_strides``; or, where ``source`` is
    None, each is ``value``; or, where both are None, from something that a loader computed.
    """

    buffer: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source: str | None = None
    source_offset: int = 0
    source_strides: tuple[int, ...] = ()
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Undescribed:
    """A buffer that no boxes describe, and why. ``unwritten``: elements that no loader wrote; 0 where all were, from elsewhere."""

    buffer: str
    text: str
    unwritten: int = 0

    def __str__(self) -> str:
        return self.text


def placement_of(
    holder: str,
    tensors: Sequence[TensorSpec],
    buffers: Sequence[BufferSpec],
    writes: Sequence[Write],
    location: Location | None = None,
) -> tuple[Placement, tuple[Undescribed, ...]]:
    """The placement that ``writes`` leave behind in row-major ``buffers``, where the last write to an element counts.

    Its pieces and padding cover each of its buffers exactly once. The second result says of each buffer that has
    no such description why: a value that a loader computed, a region that is no combination of boxes, an element that nothing
    writes, a cast other than between floating-point dtypes. The placement leaves these buffers out altogether, and those
    without elements too. ``writes`` name tensors and buffers that are given.
    """
    specs = {tensor.name: tensor for tensor in tensors}
    by_buffer: dict[str, list[Write]] = defaultdict(list)
    for write in writes:
        by_buffer[write.buffer].append(write)
    kept: list[BufferSpec] = []
    pieces: list[Piece] = []
    padding: list[Padding] = []
    findings: list[Undescribed] = []
    # The same in every layer, but for names.
    described: dict[tuple[object, ...], _Described] = {}
    for buffer in buffers:
        made = by_buffer[buffer.name]
        alike = buffer.shape, buffer.dtype, *(_without_names(write, specs) for write in made)
        found = described.get(alike) or _describe(buffer, made, specs)
        if isinstance(found, Undescribed):
            findings.append(found)
            continue
        described[alike] = found
        if buffer.size:
            kept.append(buffer)
            pieces += (Piece(str(made[i].source), p.box, buffer.name, p.offset, p.strides) for i, p in found[0])
            padding += (replace(p, buffer=buffer.name) for p in found[1])
    return Placement(holder, tuple(kept), tuple(pieces), tuple(padding), location), tuple(findings)


def _without_names(write: Write, specs: Mapping[str, TensorSpec]) -> tuple[object, ...]:
    # 0.0 and -0.0 are equal.
    here = write.offset, write.shape, write.strides, repr(write.value)
    if write.source is None:
        return here
    tensor = specs[write.source]
    return *here, tensor.shape, tensor.dtype, write.source_offset, write.source_strides


def tensors_as_read(holder: str, tensors: Sequence[TensorSpec], writes: Sequence[Write], computed: Collection[str]) -> Placement:
    """HF tensors as a worker's loaders are given them: each a whole and contiguous buffer of its name.

    Its pieces are what ``writes`` copy from it, and the rest are gaps; of a tensor in ``computed``, of one that no write names,
    and of one that is copied in many small boxes, all of it.
    """
    by_source: dict[str, list[Write]] = defaultdict(list)
    for write in writes:
        if write.source is not None:
            by_source[write.source].append(write)
    buffers, pieces = [], []
    for tensor in tensors:
        whole = Box.whole(tensor.shape)
        boxes = None if tensor.name in computed else _boxes_read(tensor, by_source[tensor.name])
        boxes = boxes or [whole]
        steps = contiguous_strides(tensor.shape)
        buffers.append(BufferSpec(tensor.name, tensor.dtype, tensor.shape, has_gaps=sum(box.size for box in boxes) < whole.size))
        pieces += [Piece(tensor.name, box, tensor.name, _offset(box, steps), steps) for box in boxes]
    return Placement(holder, tuple(buffers), tuple(pieces))


def _boxes_read(tensor: TensorSpec, writes: Sequence[Write]) -> list[Box] | None:
    """Disjoint boxes of a tensor that hold everything that is copied from it, or None where that takes many."""
    found: dict[Box, None] = {}
    for write in writes:
        # An element that is copied to several places is read once.
        read = [(n, step) for n, step in zip(write.shape, write.source_strides, strict=True) if step or not n]
        side = Side(tensor.shape, write.source_offset, tuple(step for _, step in read))
        parts = split([n for n, _ in read], [side], MOST_BOXES_READ)
        if parts is None:
            return None
        found.update(dict.fromkeys(part.box(0) for part in parts))
    if len(found) > MOST_BOXES_READ:
        return None
    taken, _ = cover(Box.whole(tensor.shape), [(box, 0) for box in found])
    return sorted((box for box, _ in taken), key=lambda box: box.start) if len(taken) <= MOST_BOXES_READ else None


# Pieces of a buffer, each with the number of the write that it is of, and its padding.
_Described = tuple[list[tuple[int, Piece]], list[Padding]]


def _describe(buffer: BufferSpec, writes: Sequence[Write], specs: Mapping[str, TensorSpec]) -> _Described | Undescribed:
    """Pieces and padding of one buffer, or what is wrong with it."""
    parts: list[tuple[Box, StridedRegion, int]] = []
    for number, write in enumerate(writes):
        found = _parts(buffer, write, specs)
        if isinstance(found, str):
            return Undescribed(buffer.name, found)
        parts += ((part.box(0), part, number) for part in found)
    # The last write is the first choice.
    parts.reverse()
    taken, rest = cover(Box.whole(buffer.shape), [(box, i) for i, (box, _, _) in enumerate(parts)])
    unwritten = sum(box.size for box in rest)
    if unwritten:
        text = f"{buffer.name} {buffer.shape}: nothing writes {unwritten} of its {buffer.size} elements, among them {rest[0]}"
        return Undescribed(buffer.name, text, unwritten)
    pieces: list[tuple[int, Piece]] = []
    padding: list[Padding] = []
    for box, i in sorted(taken, key=lambda row: row[0].start):
        _, part, number = parts[i]
        write = writes[number]
        if write.source is not None:
            pieces.append((number, _piece(buffer, box, part, write.source)))
        elif write.value is not None:
            padding.append(_padding(buffer, box, write.value))
        else:
            return Undescribed(
                buffer.name,
                f"{buffer.name} {buffer.shape}: its loader computes {box.size} elements at {box}, which are no copy of a tensor",
            )
    return pieces, padding


def _parts(buffer: BufferSpec, write: Write, specs: Mapping[str, TensorSpec]) -> Sequence[StridedRegion] | str:
    """Boxes of a write; side 0 is the buffer, side 1 the tensor."""
    here = Side(buffer.shape, write.offset, write.strides)
    sides, what = [here], f"{buffer.name} {buffer.shape}"
    if write.source is not None:
        tensor = specs[write.source]
        if tensor.dtype != buffer.dtype and not {tensor.dtype, buffer.dtype} <= FLOATS:
            return f"{what} is {buffer.dtype}, {tensor.name} {tensor.shape} is {tensor.dtype}; only floating-point tensors can be cast"
        sides.append(Side(tensor.shape, write.source_offset, write.source_strides))
        what += f", from {tensor.name} {tensor.shape}"
    assert 0 in write.shape or all(side.is_inside(write.shape) for side in sides), write
    overlaps = any(n > 1 and not step for n, step in zip(write.shape, write.strides, strict=True))
    parts = None if overlaps else split(write.shape, sides)
    return f"{what}: the region written {here.offset, write.shape, here.strides} is no combination of boxes" if parts is None else parts


def _piece(buffer: BufferSpec, box: Box, part: StridedRegion, tensor: str) -> Piece:
    """The piece of a box that lies in a part."""
    whole, here = part.box(1), part.box(0)
    steps = contiguous_strides(buffer.shape)
    start, stop = list(whole.start), list(whole.stop)
    strides: dict[int, int] = {}
    for axis, at in zip(part.axes(1), part.axes(0), strict=True):
        start[axis] += box.start[at] - here.start[at]
        stop[axis] = start[axis] + box.stop[at] - box.start[at]
        strides[axis] = steps[at]
    found = Box(tuple(start), tuple(stop))
    return Piece(tensor, found, buffer.name, _offset(box, steps), _dense(found.shape, strides))


def _padding(buffer: BufferSpec, box: Box, value: float) -> Padding:
    steps = contiguous_strides(buffer.shape)
    return Padding(buffer.name, _offset(box, steps), box.shape, steps, value)


def _offset(box: Box, steps: Sequence[int]) -> int:
    return sum(a * step for a, step in zip(box.start, steps, strict=True))


def _dense(shape: Sequence[int], strides: dict[int, int]) -> tuple[int, ...]:
    """Strides by dim, completed for dims of size 1 as torch does it, so that a contiguous piece looks contiguous."""
    found, after = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        found[dim] = strides.get(dim, after)
        after = found[dim] * shape[dim]
    return tuple(found)
