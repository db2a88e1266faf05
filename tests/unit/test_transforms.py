"""Claims about declared transforms: a second one is a row of a table and a function, and nothing else has to know of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rlsync.coordinator.messages import Recorded, Reports
from rlsync.copy import transforms as functions
from rlsync.copy.checksum import checksum
from rlsync.errors import ConfigError, PlacementError
from rlsync.layout.geometry import BufferSpec, Piece, Placement, TensorSpec, whole_tensors
from rlsync.plan.packing import lay_out
from rlsync.plan.planner import build_plan
from rlsync.plan.transforms import TRANSFORMS, Transform, transform_between
from rlsync.sync.config import SyncConfig
from rlsync.sync.packer import Packer
from rlsync.sync.planning import plan_connection
from rlsync.sync.source import Declared
from tests.unit.test_planning_ipc import actor, worker
from tests.unit.test_staging import replay

TENSORS = [TensorSpec("w", "float32", (6, 10)), TensorSpec("norm", "float32", (10,))]


def holder(name: str, dtype: str) -> Placement:
    """``w`` in this dtype, and the other as it is."""
    whole = whole_tensors(name, TENSORS)
    buffers = tuple(BufferSpec(b.name, dtype if b.name == "w" else b.dtype, b.shape) for b in whole.buffers)
    pieces = tuple(Piece(p.tensor, p.box, p.buffer, p.offset, p.strides) for p in whole.pieces)
    return Placement(name, buffers, pieces)


def doubled(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (2 * view).to(dtype)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform from floats to bytes that no copy computes."""
    monkeypatch.setitem(TRANSFORMS, "doubled", Transform("doubled", frozenset({"float32"}), frozenset({"int8"})))
    monkeypatch.setattr(functions, "doubled", doubled, raising=False)


def test_dtypes_that_differ_need_a_transform_that_is_allowed(second: None) -> None:
    assert transform_between("float32", "float32", ()) == ""
    assert transform_between("float32", "bfloat16", ("cast",)) == "cast"
    assert transform_between("float32", "int8", ("cast",)) is None
    assert transform_between("float32", "int8", TRANSFORMS) == "doubled"
    with pytest.raises(PlacementError, match="w: int8 in engine, float32 in actor"):
        build_plan(TENSORS, [whole_tensors("actor", TENSORS)], [holder("engine", "int8")], transforms=("cast",))


def test_a_second_transform_is_a_row_of_a_table(second: None) -> None:
    """Planned, packed and summed up by what served casts alone."""
    values = {"w": torch.randint(-60, 60, (6, 10)).float(), "norm": torch.randn(10)}
    plan = build_plan(TENSORS, [whole_tensors("actor", TENSORS)], [holder("engine", "int8")], transforms=tuple(TRANSFORMS))
    (found,) = replay(plan, [values])
    assert torch.equal(found["w"], (2 * values["w"]).to(torch.int8))
    assert torch.equal(found["norm"], values["norm"])
    cast = build_plan(TENSORS, [whole_tensors("actor", TENSORS)], [holder("engine", "bfloat16")], transforms=tuple(TRANSFORMS))
    assert cast.digest != plan.digest
    assert torch.equal(replay(cast, [values])[0]["w"], values["w"].bfloat16()), "and casts are what they were"


def test_checksums_are_of_what_arrives(second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"w": torch.randint(-60, 60, (6, 10)).float(), "norm": torch.randn(10)}
    plan = build_plan(TENSORS, [whole_tensors("actor", TENSORS)], [holder("engine", "int8")], transforms=tuple(TRANSFORMS))
    sums: dict[int, int] = {}
    pack = Packer.pack

    def kept(self: Packer, bucket: int, turn: int) -> object:
        packed = pack(self, bucket, turn)
        sums.update((s.region, s.value) for s in packed.sums)
        return packed

    monkeypatch.setattr(Packer, "pack", kept)
    replay(plan, [values], verify="full")
    numbers = {r.tensor: r.number for row in lay_out(plan) for part in row for r in part.regions}
    assert sums[numbers["w"]] == checksum((2 * values["w"]).to(torch.int8))
    assert sums[numbers["norm"]] == checksum(values["norm"])


def test_what_a_source_declares_is_computed_once_a_bucket_and_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where dtypes are equal, and cast where they are not; of two destinations and their checksums it is computed once."""
    values = {"w": torch.randn(6, 10), "norm": torch.randn(10)}
    merged, calls, pack, sums = values["w"] + 1, [], Packer.pack, {}

    def compute(names: Sequence[str]) -> list[torch.Tensor]:
        calls.extend(names)
        return [values[name] + 1 for name in names]

    def kept(self: Packer, bucket: int, turn: int) -> object:
        self._declared = Declared({"w": "merge"}, compute)
        packed = pack(self, bucket, turn)
        sums.update(((s.destination, s.region), s.value) for s in packed.sums)
        return packed

    monkeypatch.setattr(Packer, "pack", kept)
    takers = [holder("a", "float32"), holder("b", "bfloat16")]
    options = {"transforms": tuple(TRANSFORMS), "declared": {"w": "merge"}}
    plan = build_plan(TENSORS, [whole_tensors("actor", TENSORS)], takers, **options)
    same, cast = replay(plan, [values], verify="full")
    assert torch.equal(same["w"], merged) and torch.equal(cast["w"], merged.bfloat16())
    assert torch.equal(same["norm"], values["norm"]) and torch.equal(cast["norm"], values["norm"])
    assert calls == ["w"] and checksum(merged) in sums.values() and checksum(merged.bfloat16()) in sums.values()
    with pytest.raises(PlacementError, match="w: int8 in engine, float32 in actor"):
        build_plan(TENSORS, [whole_tensors("actor", TENSORS)], [holder("engine", "int8")], **options)


def test_what_is_computed_goes_through_a_ring_and_is_never_read_where_its_base_lies() -> None:
    reports = Reports((actor(0, "a0", "stable"),), (worker(0, "a0"),), (Recorded(holder("engine", "float32"), "direct"),))
    sources, config = [whole_tensors("actor", TENSORS)], SyncConfig(transport="ipc")
    assert plan_connection(TENSORS, sources, reports, config).staging == frozenset(), "the control: nothing is computed"
    assert plan_connection(TENSORS, sources, reports, config, {"w": "merge"}).staging == {(0, 0)}


def test_what_is_read_where_it_lies_has_no_transform_of_the_senders(second: None) -> None:
    reports = Reports((actor(0, "a0", "stable"),), (worker(0, "a0"),), (Recorded(holder("engine", "int8"), "direct"),))
    sources = [whole_tensors("actor", TENSORS)]
    with pytest.raises(ConfigError, match=r"w is sent through doubled, .* set weight_sync.staging to always"):
        plan_connection(TENSORS, sources, reports, SyncConfig(transport="ipc"))
    assert plan_connection(TENSORS, sources, reports, SyncConfig(transport="ipc", staging="always")).staging == {(0, 0)}
