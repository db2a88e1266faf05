"""Claims about what an actor does not train: it is sent once, again where it was lost, and verified in every sync; over real channels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rlsync.coordinator.messages import ActorHello, Filled, FromPeer, Recorded, Reports
from rlsync.errors import RlsyncError
from rlsync.layout.geometry import Box, BufferSpec, Piece, Placement, TensorSpec, whole_tensors
from rlsync.sync import syncer
from rlsync.sync.planning import frozen_tensors
from rlsync.sync.source import ranges_of
from rlsync.transport import gloo, nccl
from tests import standin_gpu
from tests.deadlines import ended_before
from tests.thread_actors import SIZES, Actors, Numbers, tensor
from tests.thread_engines import TIMEOUT_S, ThreadEngine
from tests.unit.test_ipc_channel import GpuNumbers
from tests.unit.test_nccl_channel import receiver_that_lands_ahead

FROZEN = (1, 3)
FROZEN_BYTES, NBYTES = 4 * sum(SIZES[i] for i in FROZEN), 4 * sum(SIZES)


def freeze(source: Numbers, names: frozenset[str] | None = None) -> Numbers:
    """Every tensor is of a module of its own; those in FROZEN have the values of version 0 at any version."""
    source.tensors = tuple(replace(t, name=f"{t.name}.weight") for t in source.tensors)
    source.placements = tuple(
        replace(p, pieces=tuple(replace(piece, tensor=f"{piece.tensor}.weight") for piece in p.pieces)) for p in source.placements
    )
    source.frozen = frozenset(f"w{i}.weight" for i in FROZEN) if names is None else names
    source.moved = 0.0  # type: ignore[attr-defined]  # by how much a mistake moves what is frozen
    train = source.begin

    def begin(version: int) -> None:
        train(version)
        for i in FROZEN:
            half = source.buffers[f"half{i}"]
            half.copy_(tensor(0, i)[source.rank * len(half) :][: len(half)] + source.moved)  # type: ignore[attr-defined]

    source.begin = begin  # type: ignore[method-assign]
    return source


def holds(engine: ThreadEngine, version: int) -> bool:
    wanted = {f"w{i}.weight": tensor(0 if i in FROZEN else version, i) for i in range(len(SIZES))}
    return all(torch.equal(weights[name], each) for weights in engine.weights for name, each in wanted.items())


Made = tuple[Actors, list[ThreadEngine]]


@pytest.fixture(params=["shm", "gloo", "nccl", "ipc"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Made]]:
    """Two actor ranks and two workers, connected by a transport. NCCL and GPU memory are stood in for, as in their tests."""
    name, actors = request.param, list[Actors]()
    make_source: Callable[..., Numbers] = Numbers
    engine = ThreadEngine("e")
    if name == "ipc":
        make_source = partial(GpuNumbers, standin_gpu.install(monkeypatch), stays=True)
        engine.gpus = ["GPU-actor-0", "GPU-actor-1"]
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        engine.host, engine.pid_domain = standin_gpu.host(), f"{boot_id}:threads"
    elif name != "shm":
        engine.domain = "another"
    if name == "nccl":
        numbers = itertools.count()
        monkeypatch.setattr(syncer, "_gpu_uuid", lambda: f"GPU-actor-{next(numbers)}")
        monkeypatch.setattr(syncer, "memory_of", lambda buffers, stable_memory: "device")
        monkeypatch.setattr(nccl, "make_sender", gloo.make_sender)
        monkeypatch.setattr(nccl, "make_receiver", receiver_that_lands_ahead)
        engine.gpus = ["GPU-far-0", "GPU-far-1"]

    def connected(names: frozenset[str] | None = None, **config: Any) -> Made:
        settings = {"transport": name, "bucket_bytes": 100, **config}
        actors.append(Actors([engine], lambda rank, size: freeze(make_source(rank=rank, world_size=size), names), **settings))
        actors[-1].connect()
        return actors[-1], [engine]

    yield connected
    for each in actors:
        each.close()


def _filled(actors: Actors) -> list[int]:
    """Buckets that the first rank says are filled, from now on."""
    connection, told = actors.syncers[0]._connection, list[int]()
    assert connection is not None
    send = connection.peer.send

    def noted(message: FromPeer) -> None:
        if isinstance(message, Filled):
            told.append(message.bucket)
        send(message)

    connection.peer.send = noted  # type: ignore[method-assign]
    return told


@pytest.mark.parametrize("num_slots", [1, 3])
def test_what_is_frozen_is_sent_once(made: Callable[..., Made], num_slots: int) -> None:
    actors, (engine,) = made(num_slots=num_slots)
    streams = 1 if actors.syncers[0]._plan.num_destinations == 1 else 2
    told = _filled(actors)
    for version in (1, 2, 3, 4):
        told.clear()
        report = actors.sync(version)
        held = 0 if version == 1 else actors.syncers[0]._plan.num_frozen
        assert told == [*([held - 1] if held else []), *range(held, report.num_buckets)], "of what is not sent by one message"
        assert holds(engine, version) and not holds(engine, version + 1)
        again = 0 if version == 1 else FROZEN_BYTES
        assert (report.bytes, report.held_bytes) == (streams * (NBYTES - again), streams * again)
        assert sum(report.bytes_by_link.values()) == report.bytes
        assert (0 in engine.taken[0]) == (version == 1)


@pytest.mark.parametrize("shows_weights", [True, False])
def test_it_is_sent_again_to_an_engine_that_is_dirty_and_after_a_sync_that_failed(made: Callable[..., Made], shows_weights: bool) -> None:
    actors, (engine,) = made()
    engine.shows_weights = shows_weights
    actors.sync(1)
    for weights in engine.weights:
        for each in weights.values():
            each.fill_(-1)
    engine.mark_dirty("its weights were dropped by sleep level 2")
    assert actors.sync(2).held_bytes == 0
    assert holds(engine, 2)
    actors.sources[0].on_fill = lambda bucket: 1 // 0
    actors.failure(lambda s: s.sync(3))
    actors.sources[0].on_fill = lambda bucket: None
    assert actors.sync(4).held_bytes == 0
    assert holds(engine, 4)
    assert actors.sync(5).held_bytes > 0


def test_checksums_find_what_a_handle_does_not_know_of_and_the_next_sync_heals_it(made: Callable[..., Made]) -> None:
    """The negative control of not sending it: an engine that lost it, and an actor that changed it after all."""
    actors, (engine,) = made(verify="sampled")
    for version in range(1, 4):
        actors.sync(version)
    engine.weights[1]["w3.weight"][5] += 1
    error = actors.failure(lambda s: s.sync(4))
    # A worker's own report and its engine's answer race, and the phase is of the first.
    assert error.phase in ("verify", "transfer") and "w3.weight in w3.weight" in error.cause
    assert actors.sync(5).held_bytes == 0 and holds(engine, 5)
    for shows_weights in (True, False):
        engine.shows_weights = shows_weights
        actors.sync(actors.syncers[0]._version + 1)
        for source in actors.sources:
            source.moved += 1.0  # type: ignore[attr-defined]
        error = actors.failure(lambda s: s.sync(s._version + 2))
        assert error.phase in ("verify", "transfer") and "w1.weight in w1.weight" in error.cause
        assert actors.sync(actors.syncers[0]._version + 3).held_bytes == 0


def test_an_engine_that_cannot_even_be_asked_is_the_same_error_on_all_ranks_and_gets_all_of_it_when_it_is_back(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose process is gone."""
    actors, (engine,) = made()
    actors.sync(1)

    def gone(*_: Any) -> Any:
        raise RlsyncError("its process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadEngine, "state", property(gone))
        patch.setattr(engine, "pause", gone)
        with ended_before(TIMEOUT_S):
            error = actors.failure(lambda s: s.sync(2))
    assert (error.engine, error.phase) == (engine.engine_id, "pause") and "its process is gone" in error.cause
    assert engine.dirty and actors.syncers[0].health.dirty == {engine.engine_id}
    assert actors.sync(3).held_bytes == 0 and holds(engine, 3)
    assert actors.sync(4).held_bytes > 0


def test_without_checksums_or_with_nothing_frozen_all_is_sent_every_time(made: Callable[..., Made]) -> None:
    for settings in ({"verify": "off"}, {"names": frozenset()}):
        actors, (engine,) = made(**settings)
        for version in (1, 2):
            assert actors.sync(version).held_bytes == 0
            assert holds(engine, version)
            assert 0 in engine.taken[0]
        actors.close()


HELLO = ActorHello("", "", 0, 2, "", "", "", 1, None, "")


@pytest.mark.parametrize(
    ("sink", "frozen", "wanted"),
    [
        ("direct", (((0, 3),), ((0, 3),)), {"q", "k", "norm"}),
        ("direct+layerwise", (((0, 2), (2, 3)), ((0, 1), (1, 3))), {"q", "k", "norm"}),
        # Trained on one of the ranks that have a part of it.
        ("layerwise", (((0, 3),), ((0, 2),)), {"q", "k"}),
        # One of two that a worker has in one module, which it renews as a whole.
        ("layerwise", (((0, 1), (2, 3)), ((0, 1), (2, 3))), {"norm"}),
        # Loaders are given whole checkpoints.
        ("loaders", (((0, 3),), ((0, 3),)), set()),
    ],
)
def test_what_no_rank_trains_and_no_module_mixes_is_frozen(sink: str, frozen: Any, wanted: set[str]) -> None:
    tensors = tuple(TensorSpec(name, "float32", (4,)) for name in ("q", "k", "norm", "head"))
    actors = tuple(msgspec.structs.replace(HELLO, actor_rank=rank, frozen=ranges) for rank, ranges in enumerate(frozen))
    buffers = {"q": "attn.qkv.weight", "k": "attn.qkv.bias", "norm": "norm.weight", "head": "head.weight"}
    pieces = tuple(Piece(name, Box((0,), (4,)), buffer, 0, (1,)) for name, buffer in buffers.items())
    held = Placement("worker", tuple(BufferSpec(b, "float32", (4,)) for b in buffers.values()), pieces)
    given = [whole_tensors(f"actor {rank}", tensors) for rank in range(2)]
    assert frozen_tensors(tensors, given, Reports(actors, (), (Recorded(held, sink),))) == wanted


def test_ranges_name_what_they_are_made_of() -> None:
    tensors = tuple(TensorSpec(name, "float32", (4,)) for name in "abcdef")
    assert ranges_of({"b", "c", "e", "nowhere"}, tensors) == ((1, 3), (4, 5))
    assert ranges_of((), tensors) == ()
