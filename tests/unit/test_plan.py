"""Shard, plan, copy: HF tensors survive any change of layout bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.paper import QWEN25_05B, QWEN25_7B
from rlsync.copy.cpu import bind, write_padding
from rlsync.errors import PlacementError
from rlsync.layout.geometry import (
    Box,
    BufferSpec,
    Location,
    Padding,
    Piece,
    Placement,
    TensorSpec,
    box_in_buffer,
    contiguous_strides,
    whole_tensors,
)
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.paper import Seat
from rlsync.models.placement import megatron_placements
from rlsync.plan.links import traffic
from rlsync.plan.matching import _Near
from rlsync.plan.planner import build_plan
from tests.paper import paper_worker


def config(architecture: str, *, tied: bool = False, heads: int = 4, groups: int = 2, layers: int = 4, vocab: int = 37) -> dict:
    return {
        "architectures": [architecture], "hidden_size": 24, "intermediate_size": 40, "vocab_size": vocab, "head_dim": 6,
        "num_attention_heads": heads, "num_key_value_heads": groups, "num_hidden_layers": layers, "tie_word_embeddings": tied,
        "dtype": "float32",
    }  # fmt: skip


def random_tensors(specs) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.shape, generator=generator) for s in specs}


def empty_buffers(placement: Placement) -> dict[str, torch.Tensor]:
    return {b.name: torch.full(b.shape, float("nan")) for b in placement.buffers}


def run(specs, sources, source_buffers, destinations, **options):
    """Execute a plan in one process; returns the buffers of every destination."""
    plan = build_plan(specs, sources, destinations, **options)
    filled = [empty_buffers(d) for d in destinations]
    for placement, buffers in zip(destinations, filled, strict=True):
        write_padding(placement.padding, buffers)
    for bucket in plan.buckets:
        for copy in bucket.copies:
            bind([copy], source_buffers[copy.source], filled[copy.destination]).run()
    return filled


topologies = st.builds(
    Topology,
    tp_size=st.sampled_from([1, 2, 4]),
    pp_size=st.sampled_from([1, 2, 4]),
    dp_size=st.sampled_from([1, 2]),
    cp_size=st.sampled_from([1, 2]),
)
architectures = st.sampled_from(["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])


@settings(max_examples=40, deadline=None)
@given(architectures, st.booleans(), st.sampled_from([1, 2, 4]), topologies, topologies, st.integers(60, 5000))
def test_tensors_survive_hf_to_a_to_b_to_hf(architecture, tied, groups, a, b, bucket_bytes):
    model = model_of(config(architecture, tied=tied, groups=groups))
    specs = model.tensors()
    tensors = random_tensors(specs)
    hf = whole_tensors("hf", specs)
    placed_a = megatron_placements(model, a, make_vocab_size_divisible_by=8)
    placed_b = megatron_placements(model, b)
    in_a = run(specs, [hf], [tensors], placed_a, bucket_bytes=bucket_bytes)
    in_b = run(specs, placed_a, in_a, placed_b, bucket_bytes=bucket_bytes)
    (back,) = run(specs, placed_b, in_b, [hf], bucket_bytes=bucket_bytes)
    assert not any(torch.isnan(t).any() for buffers in (*in_a, *in_b) for t in buffers.values())
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_grouped_qkv_packs_q_k_v_by_group():
    """Reference: ``cat([q, k, v], dim=1)`` over a per-group view, as the packing rule says."""
    model = model_of(config("Qwen2ForCausalLM"))
    specs = model.tensors()
    tensors = random_tensors(specs)
    layer = "model.layers.1.self_attn."
    q, k, v = (tensors[f"{layer}{x}_proj.weight"] for x in "qkv")
    packed = torch.cat([q.view(2, 12, 24), k.view(2, 6, 24), v.view(2, 6, 24)], dim=1).reshape(-1, 24)
    shards = run(specs, [whole_tensors("hf", specs)], [tensors], megatron_placements(model, Topology(tp_size=4)))
    got = torch.cat([s["decoder.layers.1.self_attention.linear_qkv.weight"] for s in shards])
    assert torch.equal(got, packed)


def test_gated_split_inverts_merge():
    model = model_of(config("LlamaForCausalLM"))
    specs = model.tensors()
    tensors = random_tensors(specs)
    shards = run(specs, [whole_tensors("hf", specs)], [tensors], megatron_placements(model, Topology(tp_size=2)))
    gate, up = (tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    for rank, shard in enumerate(shards):
        expected = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
        assert torch.equal(shard["decoder.layers.0.mlp.linear_fc1.weight"], expected)


def test_digest_ignores_the_order_of_holders():
    model = model_of(config("Qwen3ForCausalLM"))
    specs, hf = model.tensors(), whole_tensors("hf", model.tensors())
    shards = megatron_placements(model, Topology(tp_size=2, pp_size=2))
    assert build_plan(specs, shards, [hf]).digest == build_plan(specs, shards[::-1], [hf]).digest
    assert build_plan(specs, shards, [hf]).digest != build_plan(specs, megatron_placements(model, Topology(tp_size=4)), [hf]).digest


def test_replicas_share_the_work():
    model = model_of(config("Qwen2ForCausalLM"))
    specs = model.tensors()
    plan = build_plan(specs, megatron_placements(model, Topology(dp_size=2)), [whole_tensors("hf", specs)])
    given_by = {c.source for bucket in plan.buckets for c in bucket.copies}
    assert given_by == {0, 1}


def test_a_bucket_holds_what_one_takes_or_gives_however_many_there_are():
    """More destinations make no more buckets where each has a source of its own, and do where all have the same."""
    specs = [TensorSpec(f"t{n}", "float32", (8,)) for n in range(6)]  # 32 bytes each
    wanted = [whole_tensors(f"destination {n}", specs) for n in range(3)]
    near = [Location("host", f"gpu {n}") for n in range(3)]
    sources = [replace(whole_tensors(f"source {n}", specs), location=where) for n, where in enumerate(near)]
    beside = [replace(placement, location=where) for placement, where in zip(wanted, near, strict=True)]
    assert [len(b.tensors) for b in build_plan(specs, sources, beside, bucket_bytes=96).buckets] == [3, 3]
    assert [len(b.tensors) for b in build_plan(specs, sources[:1], wanted, bucket_bytes=96).buckets] == [1] * 6


def test_every_missing_tensor_is_named_once():
    model = model_of(config("Qwen2ForCausalLM"))
    specs = model.tensors()
    stage = megatron_placements(model, Topology(pp_size=2))[0]
    with pytest.raises(PlacementError, match=r"model\.layers\.2\..*model\.norm\.weight"):
        build_plan(specs, [stage], [whole_tensors("hf", [s for s in specs if s.name.endswith("norm.weight")])])


def test_unknown_tensor_and_dtype_mismatch_come_in_one_error():
    model = model_of(config("Qwen2ForCausalLM"))
    specs = model.tensors()
    with pytest.raises(PlacementError) as error:
        build_plan(specs[1:], megatron_placements(model, Topology(), dtype="bfloat16"), [whole_tensors("hf", specs[1:])])
    assert "unknown tensors in actor 0: model.embed_tokens.weight" in str(error.value)
    assert "model.layers.0.mlp.gate_proj.weight: float32 in hf, bfloat16 in actor 0" in str(error.value)
    assert str(error.value).endswith(" more"), "many alike are counted"


def test_heads_that_tp_cannot_divide_are_refused_with_both_numbers():
    model = model_of(config("Qwen2ForCausalLM", heads=4, groups=2))
    with pytest.raises(PlacementError, match="4 attention heads cannot be divided by a tensor axis of 8"):
        megatron_placements(model, Topology(tp_size=8))


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_subtracting_a_box_leaves_a_disjoint_cover(ndim, data):
    def box():
        start = data.draw(st.tuples(*[st.integers(0, 5)] * ndim))
        extent = data.draw(st.tuples(*[st.integers(1, 5)] * ndim))
        return Box(start, tuple(a + e for a, e in zip(start, extent, strict=True)))

    whole, hole = box(), box()
    grid = torch.zeros((12,) * ndim, dtype=torch.int)

    def mark(b, value):
        grid[tuple(slice(x, y) for x, y in zip(b.start, b.stop, strict=True))] += value

    mark(whole, 1)
    for part in whole.subtract(hole):
        mark(part, -1)
    common = whole.intersect(hole)
    if common is not None:
        mark(common, -1)
    assert not grid.any()


def placement(*pieces: Piece, shape=(4, 6), padding=()) -> Placement:
    return Placement("worker 0", (BufferSpec("w", "float32", shape),), pieces, padding)


W = TensorSpec("w", "float32", (4, 6))


def rows(start: int, stop: int, at: int) -> Piece:
    return Piece("w", Box((start, 0), (stop, 6)), "w", at * 6, (6, 1))


@pytest.mark.parametrize(
    ("broken", "finding"),
    [
        (placement(rows(0, 3, 0)), "has 24 elements, of which its pieces fill 18"),
        (placement(rows(0, 2, 0), rows(2, 4, 1)), r"nothing fills \[3:4, 0:6\]; filled twice: \[1:2, 0:6\] by w and w"),
        (placement(rows(0, 2, 0), rows(0, 2, 2), padding=(Padding("w", 0, (1, 6), (6, 1)),)), "of which its pieces fill 30"),
        (placement(Piece("w", Box((0, 0), (4, 6)), "w", 0, (5, 1))), "no box of its shape"),
        (placement(rows(0, 3, 0), rows(3, 5, 3)), r"w\[3:5, 0:6\] in worker 0 lies outside its shape \(4, 6\)"),
    ],
)
def test_a_destination_not_filled_exactly_once_is_refused(broken, finding):
    with pytest.raises(PlacementError, match=finding):
        build_plan([W], [whole_tensors("hf", [W])], [broken])


def test_a_buffer_with_gaps_takes_what_its_pieces_name_and_no_element_twice():
    gaping = BufferSpec("w", "float32", (4, 6), has_gaps=True)
    plan = build_plan([W], [whole_tensors("hf", [W])], [Placement("worker 0", (gaping,), (rows(0, 1, 0), rows(2, 4, 2)))])
    assert sum(copy.size for copy in plan.buckets[0].copies) == 18
    assert traffic(plan).redundancy == {"worker 0": 1.0}
    with pytest.raises(PlacementError, match=r"of which its pieces fill 18; filled twice: \[1:2, 0:6\] by w and w"):
        build_plan([W], [whole_tensors("hf", [W])], [Placement("worker 0", (gaping,), (rows(0, 2, 0), rows(2, 3, 1)))])


def test_everything_that_is_wrong_comes_in_one_error():
    a, b = TensorSpec("a", "float32", (4, 6)), TensorSpec("b", "float32", (2,))
    strange = TensorSpec("s", "float3", (1,))
    hf = whole_tensors("hf", [a])
    both = Piece("a", Box((2, 0), (4, 6)), "w", 12, (6, 1))
    broken = Placement(
        "worker 0",
        tuple(BufferSpec(name, "float32", (4, 6)) for name in ("w", "x", "y", "y")),
        (
            Piece("a", Box((0, 0), (4, 6)), "w", 0, (6, 1)), both,
            Piece("a", Box((0,), (4,)), "x", 0, (6, 1)),
            Piece("nobody", Box((0,), (24,)), "y", 0, (1,)),
            Piece("b", Box((0,), (2,)), "elsewhere", 0, (1,)),
        ),
    )  # fmt: skip
    wants_b = whole_tensors("worker 1", [b])
    with pytest.raises(PlacementError) as error:
        build_plan([a, b, strange, a], [hf, hf], [broken, wants_b, wants_b])
    for finding in (
        "tensors listed twice: a;",
        "sources of one name: hf;",
        "destinations of one name: worker 1;",
        "buffers of one name in worker 0: y;",
        "s has dtype float3, of which no size is known",
        "unknown tensors in worker 0: nobody",
        "pieces in worker 0 that lie in buffers which it does not list: elsewhere",
        "a[0:4] in worker 0 has 1, 1 and 2 starts, stops and strides, where its tensor has 2 dims",
        "w of worker 0 has 24 elements, of which its pieces fill 36; filled twice: [2:4, 0:6] by a and a",
        "no source for 2 pieces: b[0:2] wanted by worker 1, b[0:2] wanted by worker 1",
    ):
        assert finding in str(error.value)


def test_overlapping_padding_is_named():
    with pytest.raises(PlacementError, match=r"filled twice: \[3:4, 0:6\] by w and padding"):
        build_plan([W], [whole_tensors("hf", [W])], [placement(rows(0, 4, 0), padding=(Padding("w", 18, (1, 6), (6, 1)),))])


def test_a_doubled_expert_is_named_in_whatever_place_it_stands():
    """Transposed experts with gate and up side by side: no piece is dense, and the doubled one is the last of many."""
    tensors = [TensorSpec(f"{e}.{x}", "float32", (2, 3)) for e in range(300) for x in ("gate", "up")]
    pieces = [Piece(t.name, Box.whole(t.shape), "w", i // 2 * 12 + i % 2 * 3, (6, 1)) for i, t in enumerate(tensors)]
    stack = BufferSpec("w", "float32", (300, 2, 6))
    hf = [whole_tensors("hf", tensors)]
    assert len(build_plan(tensors, hf, [Placement("x", (stack,), tuple(pieces[::-1]))]).buckets[0].copies) == 600
    with pytest.raises(PlacementError, match=r"fill 3606; filled twice: \[299:300, 0:2, 3:6\] by 299.up and 299.up$"):
        build_plan(tensors, hf, [Placement("x", (stack,), (*pieces, pieces[-1]))])
    with pytest.raises(PlacementError, match=r"fill 3600; nothing fills \[298:299, 0:2, 0:3\]; filled twice: \[299:300, 0:2, 3:6\]"):
        build_plan(tensors, hf, [Placement("x", (stack,), (*pieces[:-4], *pieces[-3:], pieces[-1]))])


@pytest.mark.parametrize(
    ("hf_config", "topology"),
    [
        (QWEN25_7B, Topology(tp_size=4, dp_size=2)),
        (QWEN25_7B, Topology(tp_size=2, cp_size=2, dp_size=2)),
        (QWEN25_05B, Topology(dp_size=2)),
        (QWEN25_05B, Topology(tp_size=2, dp_size=4)),
        ({**QWEN25_05B, "tie_word_embeddings": False}, Topology(dp_size=8)),
    ],
)
@pytest.mark.parametrize("engines", [0, 1, 3])
def test_replicas_give_equally_many_bytes(hf_config, topology, engines):
    """To buckets of whole tensors (0) and to engines of two workers each. Split pieces stay few."""
    model = model_of(hf_config)
    tensors, actors = model.tensors(), megatron_placements(model, topology)
    workers = [paper_worker(model, Seat(rank, 2), holder=f"engine {e} worker {rank}") for e in range(engines) for rank in range(2)]
    plan = build_plan(tensors, actors, workers or [whole_tensors("buckets", tensors)], bucket_bytes=2**28)
    count = traffic(plan)
    given_bytes = count.bytes_by_source.values()
    assert max(given_bytes) <= 1.1 * sum(given_bytes) / topology.world_size
    assert set(count.redundancy.values()) == {1.0}
    assert sum(len(bucket.copies) for bucket in plan.buckets) <= 4 * len(tensors) * topology.tp_size * max(1, 2 * engines)


def test_heads_packed_at_equal_distances_are_one_copy():
    model = model_of(config("Qwen2ForCausalLM", heads=8, groups=4))
    specs = model.tensors()
    packed, whole = megatron_placements(model, Topology())[0], whole_tensors("hf", specs)
    for source, destination in ((packed, whole), (whole, packed)):
        plan = build_plan(specs, [source], [destination])
        assert sum(len(bucket.copies) for bucket in plan.buckets) == len(specs)


def test_a_transposed_slice_of_a_stack_is_a_box():
    """Expert 2 of a stack (3, 5, 7) that holds the transpose of an HF tensor (7, 5)."""
    stack = BufferSpec("w", "float32", (3, 5, 7))
    assert box_in_buffer(stack, 2 * 35, (7, 5), (1, 7)) == Box((2, 0, 0), (3, 5, 7))
    assert box_in_buffer(stack, 2 * 35 + 1 * 7 + 3, (2, 4), (1, 7)) == Box((2, 1, 3), (3, 5, 5))
    assert box_in_buffer(stack, 3, (5,), (1,)) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_box_survives_its_strided_form(shape, data):
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, shape, strict=True))
    strides = contiguous_strides(shape)
    offset = sum(a * s for a, s in zip(start, strides, strict=True))
    box = Box(start, stop)
    assert box_in_buffer(BufferSpec("w", "float32", tuple(shape)), offset, box.shape, strides) == box


def test_the_nearest_source_is_chosen_and_bytes_are_counted_by_link():
    model = model_of(config("Qwen2ForCausalLM"))
    specs = model.tensors()
    shards = megatron_placements(model, Topology(tp_size=2, dp_size=2))
    here = [Location("a", "gpu0"), Location("a", "gpu1"), Location("b", "gpu2"), Location("b", "gpu3")]
    sources = [replace(p, location=at) for p, at in zip(shards, here, strict=True)]
    workers = [replace(p, holder=f"worker {i}", location=here[i]) for i, p in enumerate(shards)]
    plan = build_plan(specs, sources, workers)
    count = traffic(plan)
    total = sum(count.bytes_by_destination.values())
    assert count.bytes_by_link == {"same device": total, "same host": 0, "other host": 0}
    crossed = traffic(build_plan(specs, sources, [replace(workers[0], location=here[3])]))
    assert crossed.bytes_by_link["other host"] == 0, "the replica on the same host gives its shard"
    assert set(crossed.redundancy.values()) == {1.0}
    assert crossed.bytes_by_source["actor 0"] == 0 < crossed.bytes_by_source["actor 2"]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(1, 50), st.integers(1, 40))
@example([0, 10], 10, 3)  # the one that was taken is as loaded as the other, and is the first of equals
def test_many_are_taken_at_once_as_one_after_another(loads: list[int], nbytes: int, count: int) -> None:
    """Of few sources and of many, equally loaded or not; the least loaded each time, the first of equals."""
    at_once, singly, expected = list(loads), list(loads), []
    members = range(len(loads))
    few, one = (_Near(members, members, 0, own) for own in (at_once, singly))
    for _ in range(2):
        assert few.take(count, nbytes) == [one.take(1, nbytes)[0] for _ in range(count)]
        for _ in range(count):
            expected.append(min(members, key=lambda i: (loads[i], i)))
            loads[expected[-1]] += nbytes
        assert at_once == singly == loads
