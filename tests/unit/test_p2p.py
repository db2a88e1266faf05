"""Claims about the two ends of a group and whose turn it is with their slots: over real gloo groups between threads of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.copy.cpu import region
from rlsync.layout.geometry import DTYPE_BYTES
from rlsync.layout.topology import Topology
from rlsync.models import model_of
from rlsync.models.placement import megatron_placements
from rlsync.plan import packing
from rlsync.plan.packing import PackedPart, Region, cut, divide, lay_out
from rlsync.plan.planner import build_plan
from rlsync.transport.ends import placed
from rlsync.transport.gloo import GlooCommunicator
from rlsync.transport.p2p import Work, bind_program, steps_of
from rlsync.transport.rendezvous import GroupError, GroupInfo, Rendezvous
from tests.deadlines import ended_before
from tests.p2p_scene import HOST, Scene
from tests.unit.test_staging import CONFIG, fill_from

CPU = torch.device("cpu")
TIMEOUT_S = 8.0


def scene(
    *, tp: int = 2, pp: int = 1, other_tp: int = 2, num_slots: int = 2, num_steps: int = 1, bucket_bytes: int | None = None, seed: int = 0
) -> tuple[Scene, list[dict[str, torch.Tensor]]]:
    """And what the workers' memory is to be in the end."""
    torch.manual_seed(seed)
    model = model_of(CONFIG)
    whole = {t.name: torch.randn(t.shape) for t in model.tensors("float32")}
    givers = megatron_placements(model, Topology(tp_size=tp, pp_size=pp))
    takers = megatron_placements(model, Topology(tp_size=other_tp))
    rendezvous = Rendezvous(HOST, TIMEOUT_S)
    sources = [{b.name: fill_from(p, b, whole) for b in p.buffers} for p in givers]
    # What pads a vocabulary is no tensor's, and stays as it was.
    ones = {name: torch.ones_like(t) for name, t in whole.items()}
    expected = [{b.name: fill_from(p, b, whole) / fill_from(p, b, ones) for b in p.buffers} for p in takers]
    plan = build_plan(model.tensors("float32"), givers, takers, bucket_bytes=bucket_bytes)
    wanted = [{name: torch.full_like(t, torch.nan) for name, t in row.items()} for row in expected]
    made = Scene(lay_out(plan), sources, wanted, rendezvous.port, gloo_communicator, CPU, num_slots=num_slots, num_steps=num_steps)
    # Open as long as the scene is there.
    made.rendezvous = rendezvous  # type: ignore[attr-defined]
    return made, expected


def gloo_communicator(info: GroupInfo, number: int) -> GlooCommunicator:
    return GlooCommunicator(info, number, TIMEOUT_S)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name].nan_to_num(7.0), t.nan_to_num(7.0)) for name, t in wanted.items())


def is_filled(scene: Scene, expected: Sequence[dict[str, torch.Tensor]]) -> bool:
    return all(same(found, want) for found, want in zip(scene.wanted, expected, strict=True))


def everybody(scene: Scene, act_out: Any, act_in: Any, timeout_s: float = 30) -> None:
    """Run one thread for each member."""
    with ThreadPoolExecutor(len(scene.members)) as pool:
        running = [pool.submit(act_out, rank) for rank in range(len(scene.sources))]
        running += [pool.submit(act_in, worker) for worker in range(len(scene.wanted))]
        for future in running:
            future.result(timeout_s)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_PIECE_BYTES", 512)


@pytest.mark.parametrize(("num_slots", "num_steps"), [(1, 1), (1, 7), (2, 7), (3, 40)])
@pytest.mark.parametrize(("tp", "pp", "other_tp"), [(2, 1, 2), (2, 2, 1), (1, 1, 2)])
def test_a_bucket_lands_step_by_step_and_the_next_sync_too(tp, pp, other_tp, num_slots, num_steps):
    made, expected = scene(tp=tp, pp=pp, other_tp=other_tp, num_slots=num_slots, num_steps=num_steps)
    step_bytes: list[int] = []

    def act_out(rank: int) -> None:
        outbox = made.outbox(rank)
        outbox.join(0)
        for _ in range(2):
            made.send(outbox, rank)
        step_bytes.append(outbox.nbytes // num_slots)

    def act_in(worker: int) -> None:
        inbox = made.inbox(worker)
        inbox.open()
        for _ in range(2):
            for buffer in made.wanted[worker].values():
                buffer.fill_(torch.nan)
            inbox.bind(0, made.buffers(worker, 0))
            inbox.land(0, inbox.communicator.mark())
            assert same(made.wanted[worker], expected[worker])
        step_bytes.append(inbox.nbytes // num_slots)

    assert not is_filled(made, expected)
    everybody(made, act_out, act_in)
    assert is_filled(made, expected)
    most = max(sum(t.nbytes for t in row.values()) for row in (*made.sources, *made.wanted))
    assert max(step_bytes) <= most / num_steps * 1.5 + 4096, "memory of a step, not of a model"


@pytest.mark.parametrize(("tp", "other_tp"), [(2, 2), (2, 1), (1, 2)])
def test_buckets_are_handed_out_or_land_in_turn(tp, other_tp):
    made, expected = scene(tp=tp, other_tp=other_tp, bucket_bytes=3_000)
    assert len(made.parts) > 4

    def act_out(rank: int) -> None:
        outbox = made.outbox(rank)
        outbox.join(0)
        made.send(outbox, rank)

    def act_in(worker: int) -> None:
        inbox = made.inbox(worker)
        inbox.open()
        for bucket, row in enumerate(made.parts):
            if bucket % 2:
                inbox.bind(bucket, made.buffers(worker, bucket))
                inbox.land(bucket, inbox.communicator.mark())
                continue
            slot = inbox.receive(bucket)
            for r in row[worker].regions:
                target = region(made.wanted[worker][r.buffer], r.buffer_offset, r.shape, r.buffer_strides)
                target.copy_(placed(slot, r.slot_offset, r, r.slot_strides))

    everybody(made, act_out, act_in)
    assert is_filled(made, expected)


class WatchedCommunicator(GlooCommunicator):
    """Says in what order its owner did things: ``("carry", step)``, ``("hold", step)``, ``("wait", step)``."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.log: list[tuple[str, int]] = []
        self.is_sender = False
        self._step_of: dict[int, int] = {}

    def carry(self, step: int, *rest: Any) -> Work:
        work = super().carry(step, *rest)
        self.is_sender = bool(rest[0])
        self._step_of[id(work)] = step
        self.log.append(("carry", step))
        # So that no other work gets its number.
        self._kept = [*getattr(self, "_kept", []), work]
        return work

    def hold(self, work: Work) -> None:
        super().hold(work)
        if id(work) in self._step_of:
            self.log.append(("hold", self._step_of[id(work)]))


def test_a_slot_is_written_again_only_after_its_send_has_ended():
    made, _ = scene(num_slots=2, num_steps=6)
    communicators: list[WatchedCommunicator] = []

    def make(info: GroupInfo, number: int) -> WatchedCommunicator:
        communicators.append(WatchedCommunicator(info, number, TIMEOUT_S))
        return communicators[-1]

    made.make_communicator = make

    def act_out(rank: int) -> None:
        outbox = made.outbox(rank)
        outbox.join(0)
        made.send(outbox, rank)
        made.send(outbox, rank)

    def act_in(worker: int) -> None:
        inbox = made.inbox(worker)
        inbox.open()
        inbox.bind(0, made.buffers(worker, 0))
        inbox.land(0, inbox.communicator.mark())
        inbox.land(0, inbox.communicator.mark())

    everybody(made, act_out, act_in)
    assert sum(w.is_sender for w in communicators) == 2
    for communicator in (w for w in communicators if w.is_sender):
        carried = [step for kind, step in communicator.log if kind == "carry"]
        assert carried == [*range(6), *range(6)]
        for at, (kind, step) in enumerate(communicator.log):
            before = [s for k, s in communicator.log[:at] if k == "carry" and s % 2 == step % 2]
            if kind == "carry" and before:
                assert ("hold", before[-1]) in communicator.log[
                    max(i for i in range(at) if communicator.log[i] == ("carry", before[-1])) : at
                ]


def test_giving_up_lets_a_landing_go_and_the_next_group_is_right():
    made, expected = scene(num_steps=4)
    failed: list[BaseException] = []

    def act_in(worker: int) -> None:
        inbox = made.inbox(worker)
        inbox.open()
        inbox.bind(0, made.buffers(worker, 0))
        threading.Timer(0.5, inbox.abandon).start()
        with ended_before(TIMEOUT_S), contextlib.suppress(GroupError):
            inbox.land(0, inbox.communicator.mark())
            failed.append(AssertionError("nobody sent"))
        again = made.inbox(worker, number=1)
        again.open()
        again.bind(0, made.buffers(worker, 0))
        again.land(0, again.communicator.mark())

    def act_out(rank: int) -> None:
        outbox = made.outbox(rank)
        outbox.join(0)
        time.sleep(0.7)
        outbox.abandon()
        outbox.join(1)
        made.send(outbox, rank)

    everybody(made, act_out, act_in)
    assert not failed
    assert is_filled(made, expected)


def test_bound_buffers_that_move_are_bound_anew():
    made, _ = scene()
    inbox = made.inbox(0)
    buffers = made.buffers(0, 0)
    inbox.bind(0, buffers)
    assert inbox.is_bound(0, buffers)
    moved = {name: t.clone() for name, t in buffers.items()}
    assert not inbox.is_bound(0, moved)
    inbox.bind(0, moved)
    assert inbox.is_bound(0, moved)


# Cutting.


def elements(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """Source and destination index of every element, in order."""
    pairs = []
    for r in regions:
        grid = torch.ones(r.shape).nonzero().tolist() or [[]]
        for index in grid:
            source = r.source_offset + sum(i * s for i, s in zip(index, r.source_strides, strict=True))
            taken = r.buffer_offset + sum(i * s for i, s in zip(index, r.buffer_strides, strict=True))
            pairs.append((source, taken))
    return pairs


def make_region(shape: tuple[int, ...], dtype: str = "bfloat16") -> Region:
    source_strides = tuple(1000 ** (len(shape) - 1 - i) for i in range(len(shape)))
    taken_strides = tuple(700 ** (len(shape) - 1 - i) for i in range(len(shape)))
    return Region(0, "w", 0, "a", 5, source_strides, shape, "b", 9, taken_strides, dtype, 0, taken_strides)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 6), max_size=3).map(tuple), st.integers(0, 300))
def test_a_divided_region_has_the_same_elements_in_order(shape, size):
    r = make_region(shape, "float32")
    first, rest = divide(r, size)
    assert elements([*first, *rest]) == elements([r])
    taken = sum(x.nbytes for x in first)
    assert taken <= max(size, 0) * 4 or not shape
    assert size * 4 - taken < 64 or taken == r.nbytes


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    st.integers(1, 9),
    st.sampled_from(["bfloat16", "float32"]),
)
def test_pieces_have_all_elements_once_and_about_equal_bytes(shapes, num_pieces, dtype):
    regions = [make_region(shape, dtype) for shape in shapes]
    pieces = cut(regions, num_pieces)
    assert len(pieces) == num_pieces
    assert elements([r for piece in pieces for r in piece]) == elements(regions)
    sizes = [sum(r.nbytes for r in piece) for piece in pieces]
    assert max(sizes[:-1], default=0) <= max(512, -(-sum(sizes) // num_pieces))
    # What is left over of a piece because of alignment is at most 64 bytes for each region that was divided there.
    assert sizes[-1] <= max(512, -(-sum(sizes) // num_pieces)) + 64 * num_pieces * 3


def test_a_small_message_is_not_cut(monkeypatch):
    monkeypatch.undo()
    r = make_region((100,))
    assert [len(piece) for piece in cut([r], 5)] == [1, 0, 0, 0, 0]
    part = PackedPart(200, (), (r,))
    assert [len(row) for row in steps_of(part, 5)] == [1, 0, 0, 0, 0]


def test_every_piece_begins_aligned():
    big = make_region((100_000,), "bfloat16")
    for piece in cut([big], 7)[1:]:
        assert (piece[0].source_offset - big.source_offset) * DTYPE_BYTES["bfloat16"] % 64 == 0


def test_programs_of_the_host_are_the_cpu_copiers():
    a, b = torch.zeros(4), torch.arange(4.0)
    bind_program([(a, b)], CPU).run()
    assert torch.equal(a, b)
