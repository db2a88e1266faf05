"""Claims about a sync out of exported GPU memory, over the real channel: in place, staged, and where memory comes and goes.

What plans, exports, maps, stages, binds, follows and verifies is what serves GPUs; under it is tests/standin_gpu.py. tests/gpu claims the
same of the real thing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlsync.copy import checksum_programs
from rlsync.copy.addresses import BufferAddresses
from rlsync.sync import packer
from rlsync.sync.source import Declared
from rlsync.transport import ipc
from rlsync.transport.ipc import IpcExporter
from tests import standin_gpu
from tests.standin_gpu import Driver, GpuTensor, Memory
from tests.thread_actors import SIZES, Actors, Numbers, holds
from tests.thread_engines import ThreadEngine

NBYTES = 4 * sum(SIZES)


class GpuNumbers(Numbers):
    """Its halves lie in one allocation, each 64 bytes behind the one before."""

    def __init__(self, driver: Driver, rank: int, world_size: int, *, stays: bool) -> None:
        super().__init__(rank, world_size)
        self._driver, self.stable_memory = driver, stays
        self.memory: Memory | None = None
        self.buffers = {name: half.as_subclass(GpuTensor) for name, half in self.buffers.items()}
        self.move()

    def move(self, shift: int = 0) -> None:
        """Into new memory, from byte ``shift`` on. What was there before is given back."""
        before, self.memory = self.memory, Memory(self._driver, 4096)
        cursor = shift
        for half in self.buffers.values():
            half.data = self.memory.tensor[cursor : cursor + half.nbytes].view(torch.float32)
            cursor += half.nbytes + 64
        if before is not None:
            before.free()


class Computed(GpuNumbers):
    """Its numbers are computed in each sync, into memory of theirs from byte ``computed_at`` on; what lies in the halves is less by 1."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.computed_at, self._room = 0, Memory(self._driver, 4096)
        self.declared = Declared(dict.fromkeys((t.name for t in self.tensors), "merge"), self._compute)

    def begin(self, version: int) -> None:
        super().begin(version)
        for half in self.buffers.values():
            half.sub_(1.0)

    def _compute(self, names: Sequence[str]) -> list[torch.Tensor]:
        found, cursor = [], self.computed_at
        for half in (self.buffers[name] for name in names):
            found.append(self._room.tensor[cursor : cursor + half.nbytes].view(torch.float32))
            found[-1].copy_(half + 1.0)
            cursor += half.nbytes + 64
        return found


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return standin_gpu.install(monkeypatch)


@pytest.fixture
def engine() -> ThreadEngine:
    """Each worker holds everything, so that it reads half of it on its own GPU and half on the other rank's."""
    made = ThreadEngine("near")
    made.gpus = ["GPU-actor-0", "GPU-actor-1"]
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    made.host, made.pid_domain = standin_gpu.host(), f"{boot_id}:threads"
    return made


Connect = Callable[..., Actors]


@pytest.fixture
def connect(driver: Driver, engine: ThreadEngine) -> Iterator[Connect]:
    made: list[Actors] = []

    def connected(*, stays: bool, numbers: type[GpuNumbers] = GpuNumbers, **config: Any) -> Actors:
        settings = {"verify": "full", "transport": "ipc", **config}
        made.append(Actors([engine], lambda rank, size: numbers(driver, rank, size, stays=stays), **settings))
        made[-1].connect()
        return made[-1]

    yield connected
    for actors in made:
        actors.close()


def test_what_stays_is_read_in_place_and_mapped_once(connect: Connect, driver: Driver, engine: ThreadEngine) -> None:
    actors = connect(stays=True)
    for version in (1, 2, 3):
        report = actors.sync(version)
        assert holds(engine, version)
        assert not holds(engine, version + 1)
    assert (report.transport, report.num_buckets, report.staged_bytes, report.bytes) == ("ipc", 1, 0, 2 * NBYTES)
    assert report.bytes_by_link == {"same device": NBYTES, "same host": NBYTES, "other host": 0}
    assert len(driver.opened) == len(driver.mapped) == 4, "both workers read both ranks"


def test_what_leaves_is_staged_for_other_gpus_alone_and_mapped_anew_on_its_own(
    connect: Connect, driver: Driver, engine: ThreadEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "rlsync"):
        actors = connect(stays=False)
    assert "0.000 GB of that go through staging rings in GPU memory of actor rank 0, actor rank 1" in caplog.text
    rings = {number for number, _ in driver.mapped.values()}
    assert len(rings) == 2, "of parameters nothing stays mapped"
    driver.opened.clear()
    for version, shift in ((1, 0), (2, 0), (3, 64), (4, 8), (5, 4), (6, 0)):
        for source in actors.sources:
            source.move(shift)
        report = actors.sync(version)
        assert holds(engine, version)
        assert {number for number, _ in driver.mapped.values()} == rings
    assert (report.staged_bytes, report.bytes) == (NBYTES, 2 * NBYTES)
    assert report.num_buckets == len(SIZES), "what goes through a ring fills buckets"
    assert len(driver.opened) == 6 * 2 and not rings & set(driver.opened), "a sync maps one allocation for each worker"


def test_a_bucket_has_room_for_what_is_staged_and_more_of_what_is_not(connect: Connect) -> None:
    """Each rank stages its half for one worker."""
    most = 4 * max(SIZES) // 2
    for bucket_bytes, num_buckets in ((10**6, 1), (NBYTES // 2, 1), (NBYTES // 2 - 4, 2), (most, 5)):
        assert connect(stays=False, bucket_bytes=bucket_bytes).sync(1).num_buckets == num_buckets
    assert connect(stays=True, bucket_bytes=most).sync(1).num_buckets == 1


@pytest.mark.parametrize("stays", [True, False])
def test_rings_take_turns(connect: Connect, engine: ThreadEngine, stays: bool) -> None:
    actors = connect(stays=stays, staging="always", num_slots=2)
    for version in (1, 2, 3):
        for source in actors.sources:
            source.move(16 * version)
        report = actors.sync(version)
        assert holds(engine, version)
    assert (report.staged_bytes, report.num_buckets) == (2 * NBYTES, len(SIZES))


def test_rings_are_freed_when_nobody_maps_them_before_the_next_ones_are_taken(
    connect: Connect, driver: Driver, engine: ThreadEngine
) -> None:
    """CUDA leaves open what happens otherwise; and two rings at once may be more than a GPU has room for."""
    actors = connect(stays=True, staging="always")
    rings: list[int] = []
    for turn in range(3):
        actors.sync(1)
        assert holds(engine, 1)
        former, rings = rings, sorted({number for number, _ in driver.mapped.values()})
        assert len(rings) == 2 and sorted(driver.freed) == [(number, False) for number in former]
        driver.freed.clear()
        actors.close()
        assert driver.freed == [], "workers map them until they connect again"
        if turn < 2:
            actors.there.clear()
            actors.connect()
    del actors.syncers[:]
    assert {number for number, _ in driver.freed} == set(rings), "no connection follows"


def test_memory_that_moves_unsaid_is_found_out_and_the_next_sync_is_right(
    connect: Connect, engine: ThreadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors = connect(stays=True)
    actors.sync(1)
    with monkeypatch.context() as patched:
        patched.setattr(IpcExporter, "renewed", lambda self: None)
        for source in actors.sources:
            source.move()
        error = actors.failure(lambda s: s.sync(2))
    # The worker's own report and its engine's answer race; a phase is of the one that comes first.
    assert error.engine == "near" and "verified regions are not what was sent" in error.cause, error
    actors.sync(3)
    assert holds(engine, 3)


def test_memory_that_nobody_can_map_is_refused_in_every_sync_until_it_leaves(
    connect: Connect, engine: ThreadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    actors = connect(stays=True)
    actors.sync(1)
    for source in actors.sources:
        source.move()
    with monkeypatch.context() as patched:
        patched.setattr(ipc, "can_be_exported", lambda address: False)
        for _ in range(2):
            assert "other processes cannot map" in actors.failure(lambda s: s.sync(2)).cause
    actors.sync(3)
    assert holds(engine, 3)


@pytest.mark.parametrize("stays", [True, False])
def test_the_sync_after_a_failed_one_is_right_in_the_same_connection(connect: Connect, engine: ThreadEngine, stays: bool) -> None:
    actors, tries = connect(stays=stays), itertools.count()

    def boom(bucket: int) -> None:
        if next(tries) == 0:
            raise ZeroDivisionError("cursed")

    actors.sources[1].on_fill = boom
    assert "cursed" in actors.failure(lambda s: s.sync(1)).cause
    for version in (1, 2):
        for source in actors.sources:
            source.move()
        actors.sync(version)
        assert holds(engine, version)


def test_what_a_source_computes_is_sent_and_summed_by_programs_that_follow_its_memory(
    connect: Connect, engine: ThreadEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound in the first sync, one each for each bucket and rank; anew only where memory moved by no multiple of what a thread moves."""
    bound: dict[str, int] = {}

    def counting(module: Any) -> type:
        class Counted(module.CudaCopyProgram):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **named)
                bound[module.__name__] = bound.get(module.__name__, 0) + 1

        return Counted

    for module in (checksum_programs, packer):
        monkeypatch.setattr(module, "CudaCopyProgram", counting(module))
    actors = connect(stays=True, numbers=Computed)
    for version, at, is_anew in ((1, 0, True), (2, 0, False), (3, 64, False), (4, 68, True), (5, 68, False)):
        for source in actors.sources:
            source.computed_at = at
            if version == 5:
                source.move(4)
        bound.clear()
        report = actors.sync(version)
        assert holds(engine, version)
        assert report.staged_bytes == 2 * NBYTES
        assert bound == (dict.fromkeys((checksum_programs.__name__, packer.__name__), 2 * len(SIZES)) if is_anew else {}), version
    engine.on_hold = lambda worker, weights: weights["w2"].neg_()
    assert "verified regions are not what was sent" in actors.failure(lambda s: s.sync(6)).cause


def test_a_sync_looks_at_each_buffer_once(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """For programs, checksums and exports together, on each of two ranks; where something has moved its export looks again."""
    refreshed: list[BufferAddresses] = []
    refresh = BufferAddresses.refresh

    def counted(self: BufferAddresses) -> None:
        refreshed.append(self)
        refresh(self)

    actors = connect(stays=True)
    monkeypatch.setattr(BufferAddresses, "refresh", counted)
    for version, moves, count in ((1, False, 2), (2, True, 4), (3, False, 2)):
        for source in actors.sources if moves else ():
            source.move()
        refreshed.clear()
        actors.sync(version)
        assert len(refreshed) == count, version


def test_a_flipped_bit_is_found_in_place_and_in_the_ring(connect: Connect, engine: ThreadEngine) -> None:
    for staging in ("auto", "always"):
        actors = connect(stays=True, staging=staging)
        engine.on_hold = lambda worker, weights: weights["w2"].neg_() if worker == 1 else None
        error = actors.failure(lambda s: s.sync(1))
        assert error.engine == "near" and "verified regions are not what was sent" in error.cause, error
        engine.on_hold = lambda worker, weights: None
