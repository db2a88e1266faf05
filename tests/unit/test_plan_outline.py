"""Claims about outlines: what is counted of one destination for all that are alike is what a plan of each has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.paper import experts
from rlsync.cli.pricing import Price, Settings, price_of
from rlsync.cli.scene import Scene, Sides, set_out
from rlsync.layout.geometry import Box, BufferSpec, Location, Piece, Placement, TensorSpec, contiguous_strides
from rlsync.plan import packing
from rlsync.plan.links import link_class, traffic
from rlsync.plan.outline import Outline, outline, outlined
from rlsync.plan.planner import Copy, Plan, build_plan

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 96, "intermediate_size": 192, "vocab_size": 331,
    "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = experts(4, 8, vocab_size=331, num_attention_heads=8, num_key_value_heads=4, head_dim=16)


def dense(axes: dict[str, int], engine_tp: int, num_engines: int, gpus_per_host: int, colocated: bool) -> Sides:
    scene = Scene(axes, tp_size=engine_tp, num_engines=num_engines, gpus_per_host=gpus_per_host, colocated=colocated)
    return set_out(CONFIG, scene, dtype=None, engine_dtype=None, make_vocab_size_divisible_by=1)


def mixed(axes: dict[str, int], engine_tp: int, engine_ep: int, num_engines: int, first_gpu: int) -> Sides:
    """A mixture of experts; engines begin anywhere."""
    scene = Scene(axes, tp_size=engine_tp, ep_size=engine_ep, num_engines=num_engines)
    found = set_out(EXPERTS, scene, dtype=None, engine_dtype=None, make_vocab_size_divisible_by=1)
    workers = (replace(w, location=Location(f"host {at // 8}", f"GPU {at}")) for at, w in enumerate(found.workers, first_gpu))
    return replace(found, workers=tuple(workers))


@st.composite
def scenes(draw: st.DrawFn) -> Sides:
    """Small and middle layouts: replicas and engines in numbers that do and do not divide one another, near, far and mixed."""
    if draw(st.booleans()):
        ep_size, engine_tp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
        layout = {"pp_size": draw(st.sampled_from([1, 2])), "ep_size": ep_size, "dp_size": ep_size * draw(st.integers(1, 5))}
        engine_ep = draw(st.sampled_from([1, engine_tp]))
        return mixed(layout, engine_tp, engine_ep, draw(st.integers(1, 7)), draw(st.sampled_from([0, 5, 64])))
    axes = {"tp_size": draw(st.sampled_from([1, 2, 4])), "pp_size": draw(st.sampled_from([1, 2, 4])), "dp_size": draw(st.integers(1, 6))}
    size = axes["tp_size"] * axes["pp_size"] * axes["dp_size"]
    engine_tp, colocated = draw(st.sampled_from([1, 2, 4])), draw(st.booleans())
    most = max(1, size // engine_tp) if colocated else 9
    return dense(axes, engine_tp, draw(st.integers(1, most)), draw(st.sampled_from([2, 4, 8, 512])), colocated and engine_tp <= size)


def price(sides: Sides, by_kind: bool, **options: Any) -> Price:
    found = price_of("x", sides, Settings(**options), by_kind=by_kind).price
    assert found is not None
    return replace(found, planning_s=0.0)


@settings(max_examples=40)
@given(
    scenes(), st.sampled_from(["auto", "gloo", "ipc"]), st.sampled_from(["auto", "always"]), st.booleans(), st.sampled_from([20_000, 10**7])
)
def test_a_price_by_kind_is_that_of_each_destination_planned(
    sides: Sides, transport: str, staging: str, offload: bool, nbytes: int
) -> None:
    options = {"transport": transport, "staging": staging, "offload_weight": offload, "bucket_bytes": nbytes}
    assert price(sides, True, **options) == price(sides, False, **options)


@pytest.mark.parametrize("bucket_bytes", [20_000, 10**7])
def test_steps_and_shared_rings_are_counted_alike(bucket_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes NCCL for those that share no GPU, in steps; on one host shm has one destination for all workers that are alike."""
    monkeypatch.setattr(packing, "LEAST_PIECE_BYTES", 4096)
    for sides, transport in (
        (dense({"tp_size": 2, "dp_size": 3}, 2, 5, 4, False), "auto"),
        (dense({"dp_size": 3}, 2, 5, 512, False), "shm"),
    ):
        options = {"transport": transport, "bucket_bytes": bucket_bytes}
        assert price(sides, True, **options) == price(sides, False, **options)


Moved = tuple[int, Copy]


def planned(plan: Plan) -> Counter[Moved]:
    """All copies of a plan, with the number of their bucket among those that hold any."""
    buckets = [bucket.copies for bucket in plan.buckets if bucket.copies]
    return Counter((number, copy) for number, copies in enumerate(buckets) for copy in copies)


def counted(drawn: Outline) -> Counter[Moved]:
    """All copies to all members, as an outline has them."""
    number_of = {t.name: number for number, group in enumerate(drawn.buckets) for t in group}
    return Counter(
        (number_of[copy.tensor], replace(copy, source=int(sources[copy.source]), destination=member))
        for kind in drawn.kinds
        for member, sources in zip(kind.members, kind.sources, strict=True)
        for copy in kind.copies
    )


@settings(max_examples=40)
@given(scenes(), st.sampled_from([None, 20_000]))
def test_members_take_what_the_plan_of_each_gives_them(sides: Sides, bucket_bytes: int | None) -> None:
    """Copy by copy: boxes, offsets, strides, sources and buckets."""
    plan = build_plan(sides.tensors, sides.actors, sides.workers, bucket_bytes=bucket_bytes)
    drawn = outline(sides.tensors, sides.actors, sides.workers, bucket_bytes=bucket_bytes)
    assert drawn.buckets == tuple(b.tensors for b in plan.buckets if b.copies)
    assert counted(drawn) == planned(plan) == counted(outlined(plan))
    assert drawn.num_copies == sum(len(b.copies) for b in plan.buckets)
    found, expected = drawn.traffic(), traffic(plan)
    assert (found.bytes_by_link, found.bytes_by_source) == (expected.bytes_by_link, expected.bytes_by_source)
    hosts = [[int(p.location.host.split()[1]) for p in side if p.location] for side in (sides.actors, sides.workers)]
    between = drawn.between(*hosts)
    given, taken = drawn.by_link()
    for copy in (copy for bucket in plan.buckets for copy in bucket.copies):
        nbytes = 2 * copy.size
        link = link_class(sides.actors[copy.source].location, sides.workers[copy.destination].location)
        between[hosts[0][copy.source], hosts[1][copy.destination]] -= nbytes
        given[copy.source, link] -= nbytes
        taken[copy.destination, link] -= nbytes
    assert not between.any() and not given.any() and not taken.any()
    for kind in drawn.kinds:
        for member in kind.members:
            holder = sides.workers[member].holder
            assert found.bytes_by_destination[kind.placement.holder] == expected.bytes_by_destination[holder]
            assert found.redundancy[kind.placement.holder] == expected.redundancy[holder]


# Long ones of one dim, which are cut without making pieces, among others.
SHAPES = st.one_of(st.lists(st.integers(1, 4000), min_size=1, max_size=1), st.lists(st.integers(1, 40), max_size=3))


@settings(max_examples=100)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(["bfloat16", "float32", "int8"])), max_size=6), st.integers(1, 9))
def test_bytes_of_pieces_are_those_of_the_pieces(shapes: list[tuple[list[int], str]], num_pieces: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LEAST_PIECE_BYTES", 256)
        regions = [
            packing.Region(
                0, "t", 0, "b", 0, contiguous_strides(s), tuple(s), "b", 0, contiguous_strides(s), dtype, 0, contiguous_strides(s)
            )
            for s, dtype in shapes
        ]
        found, expected = packing.cut_bytes(regions, num_pieces), packing.cut(regions, num_pieces)
    assert [row for row in found if row] == [[r.nbytes for r in piece] for piece in expected if piece]


def test_equal_engines_and_replicas_are_of_few_kinds() -> None:
    """About one for each rank of an engine, whoever its sources are: 2,048 workers are of no more kinds than 256."""
    for num_engines in (64, 512):
        sides = dense({"tp_size": 2, "pp_size": 2, "dp_size": 8}, 4, num_engines, 8, False)
        drawn = outline(sides.tensors, sides.actors, sides.workers)
        assert len(sides.workers) == 4 * num_engines == sum(len(kind.members) for kind in drawn.kinds)
        assert 4 <= len(drawn.kinds) < 16, "a rank of an engine, and which of its ways have one source and become one copy"


def test_destinations_that_differ_in_anything_are_not_alike() -> None:
    """The negative control: another distance, another content, or whatever the caller tells apart."""
    sides = dense({}, 1, 4, 1, False)
    assert len(outline(sides.tensors, sides.actors, sides.workers).kinds) == 1
    assert len(outline(sides.tensors, sides.actors, sides.workers, kind_of=lambda d: d % 2).kinds) == 2
    near = [*sides.workers[:3], replace(sides.workers[3], location=sides.actors[0].location)]
    assert len(outline(sides.tensors, sides.actors, near).kinds) == 1, "the distance is another one of its sources, which are counted"
    assert len(outline(sides.tensors, sides.actors, near, takes_room=lambda d, link: link == 2).kinds) == 2, "unless buckets depend on it"
    first, *others = sides.workers[3].buffers
    other = replace(sides.workers[3], buffers=(replace(first, has_gaps=True), *others))
    assert len(outline(sides.tensors, sides.actors, [*sides.workers[:3], other]).kinds) == 2


@pytest.mark.parametrize(("offset", "dtype", "num_kinds"), [(0, "float32", 1), (4, "float32", 2), (0, "bfloat16", 2)])
def test_sources_in_which_a_piece_lies_otherwise_make_other_kinds(offset: int, dtype: str, num_kinds: int) -> None:
    """Two sources of one tensor, each near one of two destinations that hold the same."""
    spec = TensorSpec("t", "float32", (8,))

    def holder(name: str, host: str, offset: int = 0, dtype: str = "float32") -> Placement:
        piece = Piece("t", Box.whole((8,)), "b", offset, (1,))
        return Placement(name, (BufferSpec("b", dtype, (8 + offset,), has_gaps=True),), (piece,), location=Location(host))

    sources = holder("s0", "x"), holder("s1", "y", offset, dtype)
    content = holder("d0", "x")
    destinations = content, replace(content, holder="d1", location=Location("y"))
    plan = build_plan([spec], sources, destinations, transforms=("cast",))
    drawn = outline([spec], sources, destinations, transforms=("cast",))
    assert len(drawn.kinds) == num_kinds and counted(drawn) == planned(plan)


def test_replicas_share_what_they_hold() -> None:
    actors: tuple[Placement, ...] = dense({"tp_size": 2, "dp_size": 3}, 1, 1, 8, False).actors
    assert len({id(a.pieces) for a in actors}) == 2 and len({a.holder for a in actors}) == 6
