"""Plans between random placements: any boxes, strides, stacks, paddings, replicas and dtypes, on any hosts.

Two placements of the same tensors are drawn independently of each other and of any model. What a plan copies is compared with
the tensors themselves, element by element; what it says about itself must not depend on the order of anything it was given.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlsync.copy.cpu import bind, region, write_padding
from rlsync.errors import PlacementError
from rlsync.layout.geometry import Box, BufferSpec, Location, Padding, Piece, Placement, TensorSpec, contiguous_strides
from rlsync.plan.links import link_class, traffic
from rlsync.plan.planner import Plan, build_plan

LOCATIONS = [None, *(Location(host, device) for host in "ab" for device in (None, "gpu 0", "gpu 1"))]
SENTINEL = -77.0


def cut(draw, box: Box, times: int) -> list[Box]:
    """A random partition of a box by ``times`` cuts."""
    parts = [box]
    for _ in range(times):
        part = parts.pop(draw.randrange(len(parts)))
        dims = [d for d, n in enumerate(part.shape) if n > 1]
        if not dims:
            parts.append(part)
            continue
        dim = draw.choice(dims)
        at = draw.randrange(part.start[dim] + 1, part.stop[dim])
        low, high = list(part.stop), list(part.start)
        low[dim] = high[dim] = at
        parts += [Box(part.start, tuple(low)), Box(tuple(high), part.stop)]
    return parts


def lay(draw, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A dense buffer of a region's elements in any order of its dims, and the strides of the region in it."""
    order = draw.sample(range(len(shape)), len(shape))
    dense = contiguous_strides([shape[d] for d in order])
    strides = [0] * len(shape)
    for stride, dim in zip(dense, order, strict=True):
        strides[dim] = stride
    return tuple(shape[d] for d in order), tuple(strides)


class Draw:
    """One holder in the making: boxes go into buffers of their own, onto stacks of equal ones, or between rows of padding."""

    def __init__(self, draw: random.Random, holder: str, dtype: str) -> None:
        self.draw, self.holder, self.dtype = draw, holder, dtype
        self.buffers: list[BufferSpec] = []
        self.pieces: list[Piece] = []
        self.padding: list[Padding] = []

    def _open(self, shape: tuple[int, ...]) -> str:
        self.buffers.append(BufferSpec(f"buffer {len(self.buffers)}", self.dtype, shape))
        return self.buffers[-1].name

    def alone(self, tensor: str, box: Box) -> None:
        shape, strides = lay(self.draw, box.shape)
        self.pieces.append(Piece(tensor, box, self._open(shape), 0, strides))

    def stacked(self, parts: list[tuple[str, Box]]) -> None:
        """Like experts: equal shapes behind one another, in any order, each transposed or not."""
        shape, strides = lay(self.draw, parts[0][1].shape)
        name, step = self._open((len(parts), *shape)), parts[0][1].size
        for slot, (tensor, box) in zip(self.draw.sample(range(len(parts)), len(parts)), parts, strict=True):
            self.pieces.append(Piece(tensor, box, name, slot * step, strides))

    def padded(self, tensor: str, box: Box) -> None:
        """Rows of padding around and columns beside a matrix (or a vector)."""
        before, after = self.draw.randrange(3), self.draw.randrange(3)
        beside = self.draw.randrange(3) if len(box.shape) == 2 else 0
        tail = (box.shape[1] + beside,) if len(box.shape) == 2 else ()
        row = tail[0] if tail else 1
        name, strides = self._open((before + box.shape[0] + after, *tail)), (row, 1)[: len(box.shape)]
        self.pieces.append(Piece(tensor, box, name, before * row, strides))
        for offset, shape in (
            (0, (before, *tail)),
            ((before + box.shape[0]) * row, (after, *tail)),
            (before * row + (row - beside), (box.shape[0], beside)[: len(box.shape)] if beside else (0,)),
        ):
            if all(shape):
                self.padding.append(Padding(name, offset, shape, strides[: len(shape)], float(self.draw.randrange(-2, 3))))

    def placement(self) -> Placement:
        return Placement(self.holder, tuple(self.buffers), tuple(self.pieces), tuple(self.padding), self.draw.choice(LOCATIONS))


def draw_tensors(draw: random.Random) -> list[TensorSpec]:
    shapes = [tuple(draw.randrange(1, 7) for _ in range(draw.randrange(4))) for _ in range(draw.randrange(1, 4))]
    equal = tuple(draw.randrange(1, 5) for _ in range(2))
    shapes += [equal] * draw.randrange(4)
    if draw.random() < 0.2:
        shapes.append((0, 3))
    return [TensorSpec(f"t{i}", "float32", shape) for i, shape in enumerate(shapes)]


def draw_side(draw: random.Random, name: str, tensors: list[TensorSpec], dtypes: list[str], *, complete: bool) -> list[Placement]:
    """Holders of all boxes of a random partition; every box at least once where ``complete``, else perhaps not at all."""
    holders = [Draw(draw, f"{name} {i}", draw.choice(dtypes)) for i in range(draw.randrange(1, 5))]
    stacks: dict[tuple[int, tuple[int, ...]], list[tuple[str, Box]]] = defaultdict(list)
    for tensor in tensors:
        for box in cut(draw, Box.whole(tensor.shape), draw.randrange(5)):
            several = draw.sample(range(len(holders)), draw.randrange(1 if complete else 0, len(holders) + 1))
            # Some hold a box twice, as a stage that has both the embedding and the tied head.
            for index in several + several[: draw.randrange(2)]:
                way = draw.randrange(3)
                if way == 0 and len(box.shape) in (1, 2):
                    holders[index].padded(tensor.name, box)
                elif way == 1:
                    stacks[index, box.shape].append((tensor.name, box))
                else:
                    holders[index].alone(tensor.name, box)
    for (index, _), parts in stacks.items():
        holders[index].stacked(parts)
    return [h.placement() for h in holders]


def values(tensors: list[TensorSpec]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randn(t.shape, generator=generator) for t in tensors}


def empty(placement: Placement) -> dict[str, torch.Tensor]:
    return {b.name: torch.full(b.shape, SENTINEL, dtype=getattr(torch, b.dtype)) for b in placement.buffers}


def filled(placement: Placement, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a holder's memory must be, straight from the tensors."""
    buffers = empty(placement)
    write_padding(placement.padding, buffers)
    for p in placement.pieces:
        ranges = tuple(slice(a, b) for a, b in zip(p.box.start, p.box.stop, strict=True))
        region(buffers[p.buffer], p.offset, p.box.shape, p.strides).copy_(tensors[p.tensor][ranges])
    return buffers


def execute(plan: Plan, source_buffers: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    taken = [empty(p) for p in plan.destinations]
    for placement, buffers in zip(plan.destinations, taken, strict=True):
        write_padding(placement.padding, buffers)
    for bucket in plan.buckets:
        for copy in bucket.copies:
            bind([copy], source_buffers[copy.source], taken[copy.destination]).run()
    return taken


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def case(seed: int, dtypes: list[str]) -> tuple[list[TensorSpec], list[Placement], list[Placement]]:
    draw = random.Random(seed)
    tensors = draw_tensors(draw)
    sources = draw_side(draw, "source", tensors, ["float32"], complete=True)
    return tensors, sources, draw_side(draw, "destination", tensors, dtypes, complete=False)


seeds = st.integers(0, 2**32)


@settings(max_examples=250, deadline=None)
@given(seeds, st.integers(1, 300))
def test_any_placement_becomes_any_other_bit_for_bit(seed, bucket_bytes):
    tensors, sources, destinations = case(seed, ["float32"])
    plan = build_plan(tensors, sources, destinations, bucket_bytes=bucket_bytes)
    taken = execute(plan, [filled(p, values(tensors)) for p in sources])
    for placement, buffers in zip(destinations, taken, strict=True):
        assert equal(buffers, filled(placement, values(tensors)))


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_declared_cast_is_that_of_the_destination_and_no_other_passes(seed):
    tensors, sources, destinations = case(seed, ["float32", "bfloat16", "float64"])
    plan = build_plan(tensors, sources, destinations, transforms=("cast",))
    taken = execute(plan, [filled(p, values(tensors)) for p in sources])
    for placement, buffers in zip(destinations, taken, strict=True):
        assert equal(buffers, filled(placement, values(tensors)))
    differ = {p.holder for p in destinations if p.pieces and any(b.size and b.dtype != "float32" for b in p.buffers)}
    assume(differ & {plan.destinations[c.destination].holder for bucket in plan.buckets for c in bucket.copies})
    with pytest.raises(PlacementError, match="float32 in source"):
        build_plan(tensors, sources, destinations)


def shuffled(draw: random.Random, placement: Placement) -> Placement:
    lists = {name: tuple(draw.sample(rows := getattr(placement, name), len(rows))) for name in ("buffers", "pieces", "padding")}
    return replace(placement, **lists)


def by_name(plan: Plan) -> list[set]:
    """What a plan copies, by bucket, free of indices."""
    return [
        {replace(c, source=plan.sources[c.source].holder, destination=plan.destinations[c.destination].holder) for c in bucket.copies}
        for bucket in plan.buckets
    ]


@settings(max_examples=120, deadline=None)
@given(seeds, st.integers(1, 300), st.randoms(use_true_random=False))
def test_no_order_of_holders_buffers_pieces_or_fills_changes_plan_or_digest(seed, bucket_bytes, shuffle):
    tensors, sources, destinations = case(seed, ["float32"])
    plan = build_plan(tensors, sources, destinations, bucket_bytes=bucket_bytes)
    other_sources, other_destinations = (
        [shuffled(shuffle, p) for p in shuffle.sample(side, len(side))] for side in (sources, destinations)
    )
    other = build_plan(tensors, other_sources, other_destinations, bucket_bytes=bucket_bytes)
    assert other.digest == plan.digest
    assert by_name(other) == by_name(plan)


def test_whatever_changes_a_plan_changes_its_digest():
    tensors = [TensorSpec(name, "float32", (2, 3)) for name in ("a", "b")]
    a, b = (Box.whole((2, 3)),) * 2

    def stack(first: str, second: str, holder: str = "x", dtype: str = "float32", fill: float = 0.0, columns: bool = False) -> Placement:
        strides, fill_at = ((1, 2), 12) if columns else ((3, 1), 12)
        pieces = Piece(first, a, "w", 0, strides), Piece(second, b, "w", 6, strides)
        shape = (3, 3, 2) if columns else (3, 2, 3)
        return Placement(holder, (BufferSpec("w", dtype, shape),), pieces, (Padding("w", fill_at, shape[1:], (shape[2], 1), fill),))

    source, other = stack("a", "b"), stack("b", "a")
    plans = {
        "as it is": build_plan(tensors, [source], [source]),
        "another source": build_plan(tensors, [other], [source]),
        "another destination": build_plan(tensors, [source], [other]),
        "transposed": build_plan(tensors, [source], [stack("a", "b", columns=True)]),
        "another holder": build_plan(tensors, [source], [stack("a", "b", "y")]),
        "another dtype": build_plan(tensors, [source], [stack("a", "b", dtype="bfloat16")], transforms=("cast",)),
        "another fill": build_plan(tensors, [source], [stack("a", "b", fill=1.0)]),
        "another order of tensors": build_plan(tensors[::-1], [source], [source]),
        "two destinations": build_plan(tensors, [source], [source, stack("a", "b", "y")]),
        "smaller buckets": build_plan(tensors, [source], [source], bucket_bytes=24),
    }
    assert len({plan.digest for plan in plans.values()}) == len(plans)
    assert build_plan(tensors, [source], [source], bucket_bytes=48).digest == plans["as it is"].digest


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_each_destination_receives_what_it_holds_once_and_from_the_nearest(seed):
    tensors, sources, destinations = case(seed, ["float32"])
    plan = build_plan(tensors, sources, destinations)
    count = traffic(plan)
    assert set(count.redundancy.values()) <= {1.0}
    assert sum(count.bytes_by_link.values()) == sum(count.bytes_by_source.values()) == sum(count.bytes_by_destination.values())
    # Element by element: no source that also has it is nearer than the one that gives it.
    for bucket in plan.buckets:
        for c in bucket.copies:
            taker = plan.destinations[c.destination]
            cost = link_class(plan.sources[c.source].location, taker.location)
            nearer = [p for p in plan.sources if link_class(p.location, taker.location) < cost]
            marks = torch.zeros(next(b.shape for b in taker.buffers if b.name == c.destination_buffer))
            region(marks, c.destination_offset, c.shape, c.destination_strides).fill_(1)
            (shape,) = (t.shape for t in tensors if t.name == c.tensor)
            wanted = torch.zeros(shape)
            for piece in (p for p in taker.pieces if (p.tensor, p.buffer) == (c.tensor, c.destination_buffer)):
                ranges = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
                wanted[ranges] += region(marks, piece.offset, piece.box.shape, piece.strides)
            for piece in (p for holder in nearer for p in holder.pieces if p.tensor == c.tensor):
                assert not wanted[tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))].any()


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 300))
def test_buckets_keep_the_order_and_bound_what_anybody_takes_or_gives(seed, bucket_bytes):
    tensors, sources, destinations = case(seed, ["float32", "bfloat16"])
    plan = build_plan(tensors, sources, destinations, bucket_bytes=bucket_bytes, transforms=("cast",))
    assert [t for bucket in plan.buckets for t in bucket.tensors] == tensors
    sizes = [{b.name: 2 if b.dtype == "bfloat16" else 4 for b in p.buffers} for p in destinations]
    moved: dict[tuple[str, int], dict[tuple[int, str], int]] = defaultdict(lambda: defaultdict(int))
    for number, bucket in enumerate(plan.buckets):
        for c in bucket.copies:
            for holder in (("takes", c.destination), ("gives", c.source)):
                moved[holder][number, c.tensor] += c.size * sizes[c.destination][c.destination_buffer]
        assert {c.tensor for c in bucket.copies} <= {t.name for t in bucket.tensors}
    for had in moved.values():
        limit = max(bucket_bytes, *had.values())
        assert all(sum(n for (at, _), n in had.items() if at == number) <= limit for number in range(len(plan.buckets)))


@settings(max_examples=150, deadline=None)
@given(seeds, st.randoms(use_true_random=False))
def test_whatever_is_taken_away_or_doubled_is_found(seed, chance):
    """The negative control: one piece fewer at a destination, one more, or a source that lost the only copy."""
    tensors, sources, destinations = case(seed, ["float32"])
    holders = [i for i, p in enumerate(destinations) if any(piece.box.size for piece in p.pieces)]
    assume(holders)
    index = chance.choice(holders)
    broken = destinations[index]
    piece = chance.choice([p for p in broken.pieces if p.box.size])
    for pieces in (tuple(p for p in broken.pieces if p != piece), (*broken.pieces, piece)):
        changed = [*destinations[:index], replace(broken, pieces=pieces), *destinations[index + 1 :]]
        with pytest.raises(PlacementError, match=f"{piece.buffer} of {broken.holder} has"):
            build_plan(tensors, sources, changed)
    without = [replace(p, pieces=(), buffers=(), padding=()) if any(q.tensor == piece.tensor for q in p.pieces) else p for p in sources]
    with pytest.raises(PlacementError, match=rf"no source for \d+ pieces: (.*{piece.tensor}\[.*wanted by {broken.holder}|.* and \d+ more)"):
        build_plan(tensors, without, destinations)
