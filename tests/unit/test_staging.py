"""Slots between a plan's two ends: what is put in by regions comes out by segments, bit for bit."""

from __future__ import annotations

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.coordinator.messages import ActorAssignment
from rlsync.copy.addresses import BufferAddresses
from rlsync.copy.cpu import region
from rlsync.layout.geometry import Box, BufferSpec, Piece, Placement, TensorSpec, whole_tensors
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.placement import megatron_placements
from rlsync.plan.packing import SEGMENT_ALIGNMENT, PackedPart, lay_out, side_by_side
from rlsync.plan.planner import Plan, build_plan
from rlsync.sync.packer import Packer
from rlsync.transport import shm
from rlsync.transport.ends import Routes, SenderContext

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 24, "intermediate_size": 40, "vocab_size": 37, "head_dim": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "dtype": "float32",
}  # fmt: skip


def land(part: PackedPart, slot: torch.Tensor, buffers: dict[str, torch.Tensor]) -> None:
    """What a sink does: every segment to its place."""
    for s in part.segments:
        flat = slot[s.slot_offset : s.slot_offset + s.nbytes].view(getattr(torch, s.dtype))
        region(buffers[s.buffer], s.buffer_offset, s.shape, s.strides).copy_(flat.view(s.shape))


def unset(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)


def replay(plan, sources: list[dict[str, torch.Tensor]], num_slots: int = 2, verify: str = "off") -> list[dict[str, torch.Tensor]]:
    """Fill and empty every bucket, through slots that are used again; returns the buffers of every destination."""
    parts, destinations = lay_out(plan), tuple(range(len(plan.destinations)))
    names = tuple(f"worker {d}" for d in destinations)
    routes = Routes(parts, destinations, tuple(f"actor {i}" for i in range(len(sources))), names, names, num_slots)
    ring = shm.Ring.create(num_slots, shm.slot_bytes(routes))
    ends = shm.assign(routes, ring)
    packers = []
    for end, buffers in zip(ends.actors, sources, strict=True):
        addresses = BufferAddresses(buffers)
        sender = shm.make_sender(end, SenderContext(addresses, True, 1.0, None, ring, [], []))
        packers.append(Packer(ActorAssignment(plan.digest, num_slots, verify, len(parts), {"shm": end}), addresses, [sender]))
    slots = [ring.slot(i) for i in range(num_slots)]
    for slot in slots:
        slot.random_(0, 255)
    offsets = [msgspec.msgpack.decode(ends.workers[d], type=shm.ReceiverEnd).offsets for d in destinations]
    filled = [{b.name: unset(getattr(torch, b.dtype), b.shape) for b in p.buffers} for p in plan.destinations]
    for bucket, row in enumerate(parts):
        nbytes = sum(packer.pack(bucket, 1).nbytes for packer in packers)
        assert nbytes == sum(s.nbytes for part in row for s in part.segments), "each byte is put in once"
        for d, part in enumerate(row):
            land(part, slots[bucket % num_slots][offsets[d][bucket] :][: part.nbytes], filled[d])
    ring.close()
    return filled


@settings(max_examples=40, deadline=None)
@given(
    tp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2]), dp=st.sampled_from([1, 2]), other_tp=st.sampled_from([1, 2]),
    other_dtype=st.sampled_from(["float32", "bfloat16"]), bucket_bytes=st.sampled_from([1, 3000, 10**9]), num_slots=st.sampled_from([1, 3]),
)  # fmt: skip
def test_megatron_shards_of_one_layout_become_those_of_another(tp, pp, dp, other_tp, other_dtype, bucket_bytes, num_slots):
    whole, sources, plan = between_layouts(tp, pp, dp, other_tp, other_dtype, bucket_bytes)
    for placement, found in zip(plan.destinations, replay(plan, sources, num_slots), strict=True):
        for piece in placement.pieces:
            got = region(found[piece.buffer], piece.offset, piece.box.shape, piece.strides)
            slices = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
            assert torch.equal(got, whole[piece.tensor][slices].to(got.dtype))


def between_layouts(
    tp: int, pp: int, dp: int, other_tp: int, other_dtype: str, bucket_bytes: int
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]], Plan]:
    """A tiny model's tensors, the buffers of Megatron ranks under a layout, and the plan from these to another tensor parallelism."""
    model = model_of(CONFIG)
    whole = {t.name: torch.randn(t.shape) for t in model.tensors("float32")}
    placements = megatron_placements(model, Topology(tp_size=tp, pp_size=pp, dp_size=dp))
    wanted = megatron_placements(model, Topology(tp_size=other_tp), dtype=other_dtype)
    sources = [{b.name: fill_from(p, b, whole) for b in p.buffers} for p in placements]
    plan = build_plan(model.tensors("float32"), placements, wanted, bucket_bytes=bucket_bytes, transforms=("cast",))
    return whole, sources, plan


def fill_from(placement: Placement, spec: BufferSpec, whole: dict[str, torch.Tensor]) -> torch.Tensor:
    buffer = torch.zeros(spec.shape)
    for piece in placement.pieces:
        if piece.buffer == spec.name:
            slices = tuple(slice(a, b) for a, b in zip(piece.box.start, piece.box.stop, strict=True))
            region(buffer, piece.offset, piece.box.shape, piece.strides).copy_(whole[piece.tensor][slices])
    return buffer


def one_buffer(*pieces: Piece, shape: tuple[int, ...]) -> Placement:
    return Placement("worker", (BufferSpec("fused", "float32", shape),), pieces)


def specs(**shapes: tuple[int, ...]) -> list[TensorSpec]:
    return [TensorSpec(name, "float32", shape) for name, shape in shapes.items()]


def test_neighbours_from_many_sources_become_one_segment():
    tensors = specs(q=(4, 3), k=(2, 3), v=(2, 3))
    rows = ((0, 4), (4, 6), (6, 8))
    fused = one_buffer(
        *(Piece(t.name, Box.whole(t.shape), "fused", 3 * a, (3, 1)) for t, (a, _) in zip(tensors, rows, strict=True)), shape=(8, 3)
    )
    plan = build_plan(tensors, [whole_tensors(f"actor {i}", [t]) for i, t in enumerate(tensors)], [fused])
    ((part,),) = lay_out(plan)
    assert [(s.buffer_offset, s.shape) for s in part.segments] == [(0, (24,))]
    assert [r.source for r in part.regions] == [0, 1, 2]
    assert part.nbytes == 2 * SEGMENT_ALIGNMENT


def test_columns_side_by_side_are_one_segment_and_a_column_alone_is_dense():
    tensors = specs(left=(4, 2), right=(4, 3))
    fused = one_buffer(
        Piece("left", Box.whole((4, 2)), "fused", 0, (5, 1)), Piece("right", Box.whole((4, 3)), "fused", 2, (5, 1)), shape=(4, 5)
    )
    source = [whole_tensors("actor", tensors)]
    together = lay_out(build_plan(tensors, source, [fused]))
    assert [s.shape for s in together[0][0].segments] == [(20,)]
    apart = lay_out(build_plan(tensors, source, [fused], bucket_bytes=1))
    assert [s.shape for row in apart for s in row[0].segments] == [(4, 2), (4, 3)]
    values = {t.name: torch.randn(t.shape) for t in tensors}
    expected = torch.cat([values["left"], values["right"]], 1)
    for bucket_bytes in (None, 1):
        (found,) = replay(build_plan(tensors, source, [fused], bucket_bytes=bucket_bytes), [values])
        assert torch.equal(found["fused"], expected)


def test_parts_of_a_bucket_lie_side_by_side():
    tensors = specs(a=(5,), b=(7,))
    both = [whole_tensors("worker 0", tensors), whole_tensors("worker 1", tensors[:1])]
    (row,) = lay_out(build_plan(tensors, [whole_tensors("actor", tensors)], both))
    assert side_by_side(part.nbytes for part in row) == (0, 128, 192)
    numbers = [[r.number for r in part.regions] for part in row]
    assert numbers == [[0, 1], [0]], "regions are counted by destination"
