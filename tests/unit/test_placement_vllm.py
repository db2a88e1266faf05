"""What loaders were seen to write, turned into a placement, gives the bytes that the loaders themselves give."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.copy.cpu import bind, write_padding
from rlsync.errors import PlacementError
from rlsync.layout.geometry import Box, BufferSpec, Padding, Piece, Placement, TensorSpec, contiguous_strides, whole_tensors
from rlsync.layout.recorded import Write, placement_of, tensors_as_read
from rlsync.layout.regions import MOST_REGIONS, Side, split
from rlsync.plan.planner import build_plan
from tests.counted import num_calls
from tests.view_chains import memories, region_of, views

DTYPES = ("float32", "bfloat16", "float16", "float64")


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def random_tensor(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype_of(dtype))


def write_of(buffer: str, target: torch.Tensor, source: tuple[str, torch.Tensor] | None = None, value: float | None = None) -> Write:
    """A copy or a fill, as a recorder notes it."""
    region = (target.storage_offset(), tuple(target.shape), target.stride())
    if source is None:
        return Write(buffer, *region, value=value)
    return Write(buffer, *region, source[0], source[1].storage_offset(), source[1].stride())


def executed(tensors: dict[str, torch.Tensor], placement: Placement) -> dict[str, torch.Tensor]:
    """Empty buffers, filled by a plan from whole HF tensors. Raises where the placement does not fill each of them once."""
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    plan = build_plan(specs, [whole_tensors("hf", specs)], [placement], transforms=("cast",))
    buffers = {b.name: torch.full(b.shape, 7.0, dtype=dtype_of(b.dtype)) for b in placement.buffers}
    write_padding(placement.padding, buffers)
    bind((c for bucket in plan.buckets for c in bucket.copies), tensors, buffers).run()
    return buffers


def test_buffers_that_are_alike_but_for_one_number_are_told_apart():
    """Layers are described once where they are alike but for names."""
    tensors = {name: random_tensor((4, 2), dtype, seed) for seed, (name, dtype) in enumerate((("t", "float32"), ("u", "bfloat16")))}
    halves, rows = (slice(0, 2), slice(2, 4)), (tensors["t"][:2], tensors["t"][2:])
    wanted, writes, buffers = {}, [], []

    def add(name: str, dtype: str, *parts: tuple[slice, torch.Tensor, str]) -> None:
        wanted[name] = torch.full((4, 2), 9.0, dtype=dtype_of(dtype))
        buffers.append(BufferSpec(name, dtype, (4, 2)))
        for half, source, tensor in parts:
            wanted[name][half] = source
            writes.append(write_of(name, wanted[name][half], (tensor, source)))

    add("plain", "float32", (halves[0], rows[0], "t"), (halves[1], rows[1], "t"))
    add("other order", "float32", (halves[1], rows[0], "t"), (halves[0], rows[1], "t"))
    add("other rows", "float32", (halves[0], rows[1], "t"), (halves[1], rows[0], "t"))
    add("other strides", "float32", (halves[0], rows[0].t(), "t"), (halves[1], rows[1], "t"))
    add("other dtype", "bfloat16", (halves[0], rows[0], "t"), (halves[1], rows[1], "t"))
    add("other tensor", "float32", (halves[0], tensors["u"][:2], "u"), (halves[1], rows[1], "t"))
    for name, value in (("zero", 0.0), ("negative zero", -0.0)):
        wanted[name] = torch.full((4, 2), value)
        buffers.append(BufferSpec(name, "float32", (4, 2)))
        writes.append(write_of(name, wanted[name], value=value))
    wanted["turned"] = wanted["plain"].clone()
    wanted["turned"][:2] = rows[0].t()
    buffers.append(BufferSpec("turned", "float32", (4, 2)))
    writes += [write_of("turned", wanted["turned"][:2].t(), ("t", rows[0])), write_of("turned", wanted["turned"][2:], ("t", rows[1]))]
    specs = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]
    # No casts: of integers into a buffer, and of floating-point numbers into one of integers.
    specs.append(TensorSpec("integers", "int64", (4, 2)))
    for name, dtype, tensor in (("of integers", "float32", "integers"), ("into integers", "int64", "t")):
        buffers.append(BufferSpec(name, dtype, (4, 2)))
        writes += [replace(write, buffer=name, source=tensor) for write in writes[:2]]
    placement, findings = placement_of("worker", specs, buffers, writes)
    found = executed(tensors, placement)
    assert [finding.buffer for finding in findings] == ["of integers", "into integers"] and list(found) == list(wanted)
    assert [name for name, t in found.items() if not torch.equal(t.view(torch.uint8), wanted[name].view(torch.uint8))] == []


shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_placement_gives_the_bytes_of_the_copies_it_was_made_of(data):
    """Overlaps included: every buffer is filled first, and later copies go over earlier ones."""
    tensors = {
        f"t{i}": random_tensor(data.draw(shapes), data.draw(st.sampled_from(DTYPES)), i) for i in range(data.draw(st.integers(1, 3)))
    }
    region = data.draw(views(tensors["t0"]))
    shape, chain = data.draw(memories(tuple(region.shape), 5))
    buffer = torch.full(shape, -1.0, dtype=dtype_of(data.draw(st.sampled_from(DTYPES))))
    wanted, writes = buffer.clone(), [write_of("w", buffer, value=-1.0)]
    for turn in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        source = region if turn == 0 else data.draw(views(tensors[name]))
        name = "t0" if turn == 0 else name
        target = region_of(wanted, chain)
        target = None if target is None else (target if turn == 0 else data.draw(views(target)))
        if target is None or (data.draw(st.booleans()) and turn):
            target = data.draw(views(wanted))
            target.fill_(turn)
            writes.append(write_of("w", target, value=float(turn)))
        elif target.shape == source.shape:
            target.copy_(source)
            writes.append(write_of("w", target, (name, source)))
    specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
    placement, findings = placement_of("worker", specs, [BufferSpec("w", str(buffer.dtype).removeprefix("torch."), shape)], writes)
    assert not findings
    if wanted.numel():
        assert torch.equal(executed(tensors, placement)["w"], wanted)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_parts_of_a_split_are_the_region_each_element_once(data):
    source, target = (torch.arange(torch.Size(s).numel()).view(s) for s in (data.draw(shapes), data.draw(shapes)))
    view = data.draw(views(source))
    flat = target.flatten()[: view.numel()]
    if flat.numel() != view.numel():
        return
    grids = (tuple(target.shape), tuple(source.shape))
    sides = (Side(grids[0], 0, contiguous_strides(view.shape)), Side(grids[1], view.storage_offset(), view.stride()))
    parts = split(tuple(view.shape), sides)
    assert parts is not None
    pairs: list[tuple[int, int]] = []
    for part in parts:
        ends = []
        for k, memory in enumerate((target, source)):
            ends.append(memory.as_strided(part.shape, part.sides[k].strides, part.sides[k].offset).flatten().tolist())
            box = memory[tuple(slice(a, b) for a, b in zip(part.box(k).start, part.box(k).stop, strict=True))]
            assert sorted(box.flatten().tolist()) == sorted(ends[-1])
        pairs += zip(*ends, strict=True)
    assert sorted(pairs) == sorted(zip(flat.tolist(), view.flatten().tolist(), strict=True))


def copies(*pairs: tuple[torch.Tensor, str, torch.Tensor]) -> list[Write]:
    return [write_of("w", target, (name, source)) for target, name, source in pairs]


def one(shape: tuple[int, ...], specs: list[TensorSpec], writes: list[Write], dtype: str = "float32") -> tuple[Placement, tuple[str, ...]]:
    return placement_of("worker 0", specs, [BufferSpec("w", dtype, shape)], writes)


HF = TensorSpec("t", "float32", (4, 6))


def read(writes: list[Write], computed: tuple[str, ...] = (), spec: TensorSpec = HF) -> tuple[BufferSpec, set[Box]]:
    placement = tensors_as_read("worker 0", [spec], writes, computed)
    (buffer,) = placement.buffers
    assert all(p.strides == contiguous_strides(spec.shape) and p.offset == p.offset_of(p.box) for p in placement.pieces)
    build_plan([spec], [whole_tensors("hf", [spec])], [placement])
    return buffer, {piece.box for piece in placement.pieces}


def test_of_a_tensor_what_is_copied_is_read_and_the_rest_are_gaps():
    source = torch.empty(4, 6)
    writes = copies(
        (torch.empty(2, 6), "t", source[2:]), (torch.empty(3), "t", source[3, 3:]), (torch.empty(2, 6), "t", source[:1].expand(2, 6))
    )
    buffer, boxes = read(writes)
    assert buffer == BufferSpec("t", "float32", (4, 6), has_gaps=True)
    assert boxes == {Box((2, 0), (4, 6)), Box((0, 0), (1, 6))}


def test_all_is_read_of_a_tensor_from_which_something_is_computed_or_nothing_is_seen_to_be_copied():
    source, whole = torch.empty(4, 6), (BufferSpec("t", "float32", (4, 6)), {Box((0, 0), (4, 6))})
    some = copies((torch.empty(2, 6), "t", source[2:]))
    assert read(some)[1] != whole[1]
    assert read(some, ("t",)) == read([]) == whole
    scattered = TensorSpec("t", "float32", (300, 6))
    single = copies(*((torch.empty(1, 1), "t", torch.empty(300, 6)[row : row + 1, :1]) for row in range(0, 300, 2)))
    assert read(single, spec=scattered) == (BufferSpec("t", "float32", (300, 6)), {Box((0, 0), (300, 6))})


def test_fused_rows_become_one_piece_each():
    buffer, source = torch.empty(6, 6), torch.empty(4, 6)
    placement, findings = one((6, 6), [HF, replace(HF, name="u")], copies((buffer[:4], "t", source), (buffer[4:], "u", source[1:3])))
    assert not findings
    assert set(placement.pieces) == {
        Piece("t", Box((0, 0), (4, 6)), "w", 0, (6, 1)),
        Piece("u", Box((1, 0), (3, 6)), "w", 24, (6, 1)),
    }


def test_a_flat_chunk_that_begins_in_a_row_becomes_boxes():
    buffer, source = torch.empty(13), torch.empty(4, 6)
    placement, findings = one((13,), [HF], copies((buffer, "t", source.flatten()[4:17])))
    assert not findings
    assert {p.box for p in placement.pieces} == {Box((0, 4), (1, 6)), Box((1, 0), (2, 6)), Box((2, 0), (3, 5))}


def test_a_transposed_expert_is_one_piece():
    buffer, source = torch.empty(3, 6, 4), torch.empty(4, 6)
    writes = copies(*((buffer[e], "t", source.t()) for e in range(3)))
    placement, findings = one((3, 6, 4), [HF], writes)
    assert not findings
    assert placement.pieces == tuple(Piece("t", Box((0, 0), (4, 6)), "w", 24 * e, (1, 4)) for e in range(3))


def test_vocabulary_padding_is_filled_and_a_fill_under_a_copy_is_not():
    buffer, source = torch.empty(6, 6), torch.empty(4, 6)
    writes = [write_of("w", buffer, value=3.0), *copies((buffer[:4], "t", source)), write_of("w", buffer[4:], value=0.0)]
    placement, findings = one((6, 6), [HF], writes)
    assert not findings
    assert placement.padding == (Padding("w", 24, (2, 6), (6, 1), 0.0),)
    assert [p.box for p in placement.pieces] == [Box((0, 0), (4, 6))]


def test_an_identical_repeat_counts_once_and_the_last_write_wins():
    buffer, source = torch.empty(4, 6), torch.empty(4, 6)
    twice = copies((buffer, "t", source), (buffer, "t", source))
    assert one((4, 6), [HF], twice)[0].pieces == one((4, 6), [HF], twice[:1])[0].pieces
    later = one((4, 6), [HF, replace(HF, name="u")], [*twice, *copies((buffer[1:3], "u", source[:2]))])[0]
    assert {(p.tensor, p.box) for p in later.pieces} == {
        ("t", Box((0, 0), (1, 6))), ("u", Box((0, 0), (2, 6))), ("t", Box((3, 0), (4, 6))),
    }  # fmt: skip


def test_scalars_and_empty_tensors():
    scalar = TensorSpec("s", "float32", ())
    placement, findings = one((1,), [scalar], [Write("w", 0, (1,), (1,), "s", 0, (1,))])
    assert not findings
    assert executed({"s": torch.tensor(2.5)}, placement)["w"].tolist() == [2.5]
    placement, findings = one((), [scalar], [Write("w", 0, (), (), "s", 0, ())])
    assert not findings
    assert executed({"s": torch.tensor(2.5)}, placement)["w"].item() == 2.5
    empty = TensorSpec("e", "float32", (0, 3))
    assert one((0, 3), [empty], [Write("w", 0, (0, 3), (3, 1), "e", 0, (3, 1))]) == (Placement("worker 0", (), ()), ())
    assert one((0, 3), [], [])[1] == ()


@pytest.mark.parametrize(
    ("writes", "finding"),
    [
        ([], r"w \(4, 6\): nothing writes 24 of its 24 elements, among them \[0:4, 0:6\]"),
        ([Write("w", 0, (3, 6), (6, 1), "t", 0, (6, 1))], r"nothing writes 6 of its 24 elements, among them \[3:4, 0:6\]"),
        ([Write("w", 0, (4, 6), (6, 1))], "its loader computes 24 elements"),
        ([Write("w", 0, (4, 6), (6, 1), "t", 0, (6, 1)), Write("w", 8, (2,), (1,))], r"its loader computes 2 elements at \[1:2, 2:4\]"),
        ([Write("w", 0, (2, 24), (0, 1), value=0.0)], "is no combination of boxes"),
        ([Write("w", 0, (4, 6), (6, 1), "i", 0, (6, 1))], r"w \(4, 6\) is float32, i \(4, 6\) is int32; only floating-point tensors"),
    ],
)
def test_a_buffer_without_description_is_left_out_with_a_sentence(writes, finding):
    buffers = [BufferSpec("w", "float32", (4, 6)), BufferSpec("v", "float32", (4, 6))]
    good = Write("v", 0, (4, 6), (6, 1), "t", 0, (6, 1))
    placement, findings = placement_of("worker 0", [HF, replace(HF, name="i", dtype="int32")], buffers, [*writes, good])
    assert len(findings) == 1
    assert re.search(finding, str(findings[0])), findings[0]
    assert [b.name for b in placement.buffers] == ["v"] and {p.buffer for p in placement.pieces} == {"v"}


def test_computed_elements_under_a_later_copy_do_not_count():
    whole = Write("w", 0, (4, 6), (6, 1), "t", 0, (6, 1))
    assert one((4, 6), [HF], [replace(whole, source=None), whole])[1] == ()


def test_a_region_of_too_many_boxes_is_a_finding_with_both_shapes():
    size = MOST_REGIONS + 2
    tensor = TensorSpec("t", "float32", (3 * size,))
    # Every third element: a transpose of a flat tensor, which has no rows.
    writes = [Write("w", 0, (3, size), (size, 1), "t", 0, (1, 3))]
    (finding,) = one((3 * size,), [tensor], writes)[1]
    assert str(finding).startswith(f"w ({3 * size},), from t ({3 * size},): the region written (0, (3, {size})")
    assert not one((3 * size,), [replace(tensor, shape=(size, 3))], writes)[1], "with rows, each column is one piece"


def test_a_plan_refuses_a_placement_that_lost_a_piece():
    """Negative control of the comparisons above: the plan proves that buffers are filled exactly once."""
    buffer, source = torch.empty(6, 6), torch.empty(4, 6)
    placement, _ = one((6, 6), [HF, replace(HF, name="u")], copies((buffer[:4], "t", source), (buffer[4:], "u", source[1:3])))
    with pytest.raises(PlacementError, match="has 36 elements, of which its pieces fill 12"):
        executed({"t": source, "u": source}, replace(placement, pieces=placement.pieces[1:]))


def calls_for_a_stack(experts: int) -> float:
    """That it takes to describe it, for each write; the writes are in an order by name that is not that of the experts."""
    rows, columns = 64, 32
    specs = [TensorSpec(f"e{e}.{p}", "bfloat16", (rows, columns)) for e in sorted(range(experts), key=str) for p in ("gate", "up")]
    writes = []
    for spec in specs:
        expert, half = int(spec.name[1:].split(".")[0]), spec.name.endswith("up")
        writes.append(Write("w", (2 * expert + half) * rows * columns, (rows, columns), (columns, 1), spec.name, 0, (columns, 1)))
    made: list[Any] = []
    stack = [BufferSpec("w", "bfloat16", (experts, 2 * rows, columns))]
    calls = num_calls(lambda: made.append(placement_of("worker 0", specs, stack, writes)))
    (placement, findings) = made[0]
    assert not findings and len(placement.pieces) == 2 * experts
    return calls / len(writes)


def test_a_stack_of_many_experts_costs_the_same_for_each_write_as_one_of_few():
    """As many writes as one layer of DeepSeek-V3 has."""
    few, many = calls_for_a_stack(32), calls_for_a_stack(256)
    assert many < 1.2 * few
