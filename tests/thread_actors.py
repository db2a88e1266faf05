"""Two actor ranks in two threads, each with a WeightSyncer and one half of some numbers, and what engines hold after a sync of them.

Knows no Megatron and no process group.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlsync.errors import WeightSyncError
from rlsync.layout.geometry import Box, BufferSpec, Piece, Placement, TensorSpec
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from rlsync.sync.packer import Packed
from rlsync.sync.source import Declared
from tests.thread_engines import TIMEOUT_S, ThreadEngine

SIZES = (24, 30, 16, 24, 26)


class Numbers:
    """A source of five float32 tensors, one in each bucket; with two ranks each holds one half of every tensor."""

    frozen: frozenset[str] = frozenset()
    declared = Declared()

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.stable_memory = rank, world_size, True
        self.tensors = tuple(TensorSpec(f"w{i}", "float32", (n,)) for i, n in enumerate(SIZES))
        self.placements = tuple(half_placement(r, world_size) for r in range(world_size))
        self.buffers = {f"half{i}": torch.zeros(n // world_size) for i, n in enumerate(SIZES)}
        self.on_fill: Callable[[int], None] = lambda bucket: None

    def begin(self, version: int) -> None:
        for i, half in enumerate(self.buffers.values()):
            half.copy_(tensor(version, i)[self.rank * len(half) :][: len(half)])


def half_placement(rank: int, world_size: int) -> Placement:
    halves = [(i, n // world_size) for i, n in enumerate(SIZES)]
    return Placement(
        f"actor {rank}",
        tuple(BufferSpec(f"half{i}", "float32", (n,)) for i, n in halves),
        tuple(Piece(f"w{i}", Box((rank * n,), ((rank + 1) * n,)), f"half{i}", 0, (1,)) for i, n in halves),
    )


def tensor(version: int, bucket: int) -> torch.Tensor:
    return torch.arange(SIZES[bucket]) + 1000.0 * version + 100.0 * bucket


class Actors:
    """Two actor ranks in two threads, each with its WeightSyncer; every call is made on both and both outcomes are kept."""

    def __init__(self, engines: list[ThreadEngine], make_source: Callable[[int, int], Numbers] | None = None, **config: Any) -> None:
        self.sources = [(make_source or Numbers)(rank, 2) for rank in range(2)]
        shared: list[bytes] = []
        there = self.there = threading.Event()

        def broadcast(rank: int, payload: bytes) -> bytes:
            if rank == 0:
                shared[:] = [payload]
                there.set()
            assert there.wait(60)
            return shared[0]

        settings = SyncConfig(**{"timeout_s": TIMEOUT_S, "bucket_bytes": 1, **config})
        self.syncers = [
            WeightSyncer(self.sources[rank], engines, settings, rank=rank, world_size=2, broadcast=partial(broadcast, rank))
            for rank in range(2)
        ]

    def both(self, call: Callable[[WeightSyncer], Any]) -> list[Any]:
        outcomes: list[Any] = [None, None]

        def run(rank: int) -> None:
            try:
                outcomes[rank] = call(self.syncers[rank])
            except BaseException as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return outcomes

    def connect(self) -> None:
        outcomes = self.both(lambda s: s.connect())
        assert outcomes == [None, None], outcomes
        for syncer, source in zip(self.syncers, self.sources, strict=True):
            call_on_fill(syncer, lambda bucket, source=source: source.on_fill(bucket))

    def sync(self, version: int) -> SyncReport:
        first, second = self.both(lambda s: s.sync(version))
        assert isinstance(first, SyncReport), first
        assert first == second
        return first

    def failure(self, call: Callable[[WeightSyncer], Any]) -> WeightSyncError:
        """The one error that both ranks raise."""
        first, second = self.both(call)
        assert isinstance(first, WeightSyncError), first
        assert isinstance(second, WeightSyncError), second
        assert str(first) == str(second), (first, second)
        return first

    def close(self) -> None:
        self.both(lambda s: s.close())


def call_on_fill(syncer: WeightSyncer, call: Callable[[int], None]) -> None:
    """Make a connected syncer call something in its filling thread before each bucket."""
    assert syncer._connection is not None
    packer = syncer._connection.packer
    pack = packer.pack

    def wrapped(bucket: int, turn: int) -> Packed:
        call(bucket)
        return pack(bucket, turn)

    packer.pack = wrapped  # type: ignore[method-assign]


def holds(engine: ThreadEngine, version: int) -> bool:
    return all(torch.equal(weights[f"w{i}"], tensor(version, i)) for weights in engine.weights for i in range(len(SIZES)))
