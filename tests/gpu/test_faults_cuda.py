"""What faults in syncs between GPUs leave: one error in time, engines and ranks that go on, and nothing behind.

The tests share two engines and run in order: the last ones cost an engine each. They count what their GPUs have free, and so want
them to themselves.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rlsync.engine.handles.local import Engine
from rlsync.engine.state import state_difference
from rlsync.errors import ConfigError, EngineDirtyError, RlsyncError, WeightSyncError
from rlsync.transport.cuda_memory import ExportableMemory
from tests.gpu.actor import GpuActor
from tests.gpu.engines import GREEDY, PROMPTS, Answers, State, answers, start, state, worst
from tests.integration.engine_source import call_on_fill
from tests.models import save_tiny_model

pytestmark = [pytest.mark.gpu(2), pytest.mark.timeout(300)]

# A quarter of a gigabyte, so that there is something to be in the midst of, and to be left behind.
MODEL: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 4096, "num_hidden_layers": 8}
NOTICEABLE_BYTES = 100 * 2**20
AT_ONCE_S = 10.0
CALL_S = 60.0
RING = {"staging": "always", "bucket_bytes": 8 * 2**20}
IN_PLACE = {"staging": "auto", "sink": "layerwise", "bucket_bytes": 8 * 2**20}


class World:
    """``both`` has a worker on each GPU, ``single`` is on GPU 1; started from folder ``a``."""

    def __init__(self, root: Path) -> None:
        for device in (1, 0):
            torch.zeros(1, device=f"cuda:{device}")
        self.free_before = free_bytes()
        self.folders = {
            name: save_tiny_model(root / name, "qwen2", seed=seed, dtype=torch.bfloat16, **MODEL) for seed, name in enumerate("ab")
        }
        self.engines: dict[str, Engine] = {}
        self.fresh: dict[str, State] = {}
        self.answers: dict[str, Answers] = {}
        self.processes: dict[str, list[psutil.Process]] = {}
        self._actor: GpuActor | None = None
        try:
            self.start("both", "0,1")
            self.start("single", "1")
            self.heal()
        except BaseException:
            self.close()
            raise
        self.free_settled = free_bytes()

    def start(self, name: str, gpus: str) -> None:
        engine = self.engines[name] = start(name, self.folders["a"], gpus, dtype="bfloat16", enforce_eager=True, enable_sleep_mode=True)
        self.fresh[name], self.answers[name] = state(engine), answers(engine)
        self.processes[name] = [*self.processes.get(name, []), *engine._processes.seen]

    @contextlib.contextmanager
    def connected(self, folder: str, *names: str, **settings: Any) -> Iterator[GpuActor]:
        """An actor of two ranks with the tensors of a folder, connected with these engines; by default with all."""
        if self._actor is None or not self._actor.is_whole:
            self.end_actor()
            self._actor = GpuActor(self.folders[folder], 2)
        self._actor.take(self.folders[folder])
        with self._actor.connected([self.engines[n] for n in names or self.engines], **settings):
            yield self._actor

    def end_actor(self) -> None:
        if self._actor is not None:
            self._actor.close()
        self._actor = None

    def check(self, *names: str) -> None:
        """These engines hold what they were started from, and serve it."""
        for name in names or self.engines:
            held: State = state(self.engines[name])
            assert [state_difference(one, other) for one, other in zip(held, self.fresh[name], strict=True)] == [()] * len(held), name
            assert worst(answers(self.engines[name]), self.answers[name]) <= 2e-2

    def heal(self) -> None:
        """A new connection, another version, and back."""
        with self.connected("b") as actor:
            actor.sync(0)
            assert all(state(engine) != self.fresh[name] for name, engine in self.engines.items())
            actor.take(self.folders["a"])
            actor.sync(1)
        self.check()

    def close(self) -> None:
        self.end_actor()
        for engine in self.engines.values():
            engine.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def free_bytes() -> list[int]:
    """Of each GPU, what is free or held by torch in this process: tensors of its rank, the last actor's too while a test names it."""
    torch.cuda.empty_cache()
    return [torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) for device in (0, 1)]


def assert_refuses(engine: Engine, words: str) -> None:
    assert engine.state == "dirty"
    with pytest.raises(EngineDirtyError, match=words):
        engine.generate(PROMPTS[:1], GREEDY, timeout_s=CALL_S)


def failure(actor: GpuActor, version: int, fault: Callable[[], object]) -> WeightSyncError:
    """Of a sync in which ``fault`` is caused while buckets are on their way; it comes at once."""
    at: list[float] = []

    def cause(bucket: int) -> None:
        if bucket == 2:
            at.append(time.monotonic())
            fault()

    call_on_fill(actor.syncer, cause)
    with pytest.raises(WeightSyncError) as raised:
        actor.sync(version)
    print(f"\nFAULT {time.monotonic() - at[0]:.3f} s after it: {str(raised.value)[:300]}")
    assert time.monotonic() - at[0] < AT_ONCE_S
    return raised.value


@pytest.mark.parametrize("mode", [RING, IN_PLACE], ids=["ring", "in-place"])
def test_an_exporter_that_is_killed_is_found_at_once_and_its_memory_let_go(world: World, mode: dict[str, Any]) -> None:
    with world.connected("b", **mode) as actor:
        actor.sync(0)

        def end_rank_1() -> None:
            # Nobody needs it to read its memory, so that a sync may be done before it has ended.
            actor.processes[0].kill()
            actor.processes[0].join()

        error = failure(actor, 1, end_rank_1)
        assert "the process of actor rank 1" in error.cause and "has ended" in error.cause
        for engine in world.engines.values():
            assert_refuses(engine, "actor rank 1")
    world.heal()
    kept = [then - now for then, now in zip(world.free_settled, free_bytes(), strict=True)]
    print(f"kept of the dead: {kept} B")
    assert max(kept) < NOTICEABLE_BYTES


def test_an_engine_asleep_fails_a_sync_and_the_other_goes_on_without_it(world: World) -> None:
    single, both = world.engines["single"], world.engines["both"]
    with world.connected("b") as actor:
        actor.sync(0)
        single.sleep(2, CALL_S)
        began_s = time.monotonic()
        with pytest.raises(WeightSyncError, match="sleeps without its weights") as raised:
            actor.sync(1)
        assert time.monotonic() - began_s < AT_ONCE_S
        assert (raised.value.phase, raised.value.engine) == ("pause", "single")
        for engine in (single, both):
            assert_refuses(engine, "sleeps without its weights")
    with world.connected("a", "both") as actor:
        actor.sync(0)
        world.check("both")
    single.wake(["weights"], CALL_S)
    with world.connected("a") as actor:
        actor.sync(0)
        single.wake(["kv_cache"], CALL_S)
    world.check()


def test_memory_that_is_full_at_wake_costs_that_engine_and_no_other(world: World) -> None:
    single = world.engines["single"]
    with world.connected("b", verify="off") as actor:
        actor.sync(0)
        single.sleep(2, CALL_S)
        hoard = fill(torch.device("cuda", 1))
        try:
            with pytest.raises(RlsyncError, match="could not wake its weights") as refused:
                single.wake(["weights"], CALL_S)
            print(f"\nWAKE {str(refused.value)[:400]}")
            assert_refuses(single, "could not wake its weights")
            with pytest.raises(WeightSyncError, match="sleeps without its weights") as raised:
                actor.sync(1)
            assert (raised.value.phase, raised.value.engine) == ("pause", "single")
        finally:
            for memory in hoard:
                memory.free()
            torch.cuda.set_device(0)
    world.engines.pop("single").close()
    assert not any(map(lives, world.processes["single"]))
    with world.connected("a") as actor:
        actor.sync(0)
    world.check()
    # As a run does that may restart engines.
    world.start("single", "1")
    world.heal()


def test_a_borrower_that_is_killed_is_found_at_once_and_the_other_engine_goes_on(world: World) -> None:
    both, single = world.engines["both"], world.engines["single"]
    worker = psutil.Process(both.call_workers("tell_pid", (), CALL_S)[1])
    with world.connected("b", **RING) as actor:
        actor.sync(0)
        error = failure(actor, 1, worker.kill)
        assert error.engine == "both"
        for engine in (both, single):
            assert_refuses(engine, "engine both")
    world.engines.pop("both").close()
    assert not any(map(lives, world.processes["both"]))
    world.heal()
    assert single.version == 1


def test_nothing_is_left_behind(world: World) -> None:
    world.end_actor()
    before = free_bytes()
    world.close()
    given = [now - then for then, now in zip(before, free_bytes(), strict=True)]
    print(f"\nthe engines gave back {given} B, what they had mapped of the actor among them")
    assert not any(lives(process) for processes in world.processes.values() for process in processes)
    assert [name for name in os.listdir("/dev/shm") if name.startswith(f"rlsync-ring-{os.getpid()}-")] == []
    kept = [then - now for then, now in zip(world.free_before, free_bytes(), strict=True)]
    print(f"kept: {kept} B")
    assert max(kept) < NOTICEABLE_BYTES


def fill(device: torch.device) -> list[ExportableMemory]:
    """All that a GPU has left."""
    held: list[ExportableMemory] = []
    size = 2**35
    while size >= 2**20:
        try:
            held.append(ExportableMemory(size, device))
        except ConfigError:
            size //= 2
    return held


def lives(process: psutil.Process) -> bool:
    """Not one that has ended and that nobody has taken note of."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
