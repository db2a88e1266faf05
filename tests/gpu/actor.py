"""Actor ranks with tensors on GPUs: rank 0 in this process, each other one in a process that sees no GPU but its own."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from rlsync.engine.handle import Engine
from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from tests.gpu.engines import only_gpus
from tests.integration.engine_source import FolderSource, read_folder

_ANSWER_S = 90.0


def gpu_source(folder: str | Path, rank: int, world_size: int) -> FolderSource:
    """Every ``world_size``-th tensor of a folder on the first GPU that this process sees."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return FolderSource({n: t.to(device) for n, t in read_folder(folder).items()}, rank=rank, world_size=world_size)


def serve(pipe: Connection, folder: str, rank: int, world_size: int, settings: dict[str, Any]) -> None:
    """An actor rank that answers ``(method, argument)`` with ``("ok", None)`` or ``("error", text)`` until told to ``end``."""
    source = gpu_source(folder, rank, world_size)
    syncer = WeightSyncer(source, (), SyncConfig(**settings), rank=rank, world_size=world_size, broadcast=lambda payload: pipe.recv())
    methods: dict[str, Callable[[Any], object]] = {
        "see": lambda count: _expect(torch.cuda.device_count(), count),
        "take": lambda other: source.take(read_folder(other)),
        "connect": lambda _: syncer.connect(),
        "sync": syncer.sync,
    }
    while True:
        method, argument = pipe.recv()
        if method == "end":
            syncer.close()
            return
        try:
            methods[method](argument)
            pipe.send(("ok", None))
        except Exception as error:
            pipe.send(("error", str(error)))


def _expect(found: int, wanted: int) -> None:
    assert found == wanted, f"this process sees {found} GPUs and should see {wanted}"


class GpuActor:
    """The ranks of one connection; rank r is on GPU r."""

    def __init__(self, folder: Path, engines: Sequence[Engine], num_ranks: int = 1, **settings: Any) -> None:
        settings = {"bucket_bytes": 100_000, "timeout_s": 20.0, "verify": "full", "transport": "ipc", **settings}
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(1, num_ranks):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(theirs, str(folder), rank, num_ranks, settings), daemon=True))
            with only_gpus(str(rank)):
                self.processes[-1].start()
            theirs.close()
        self.source = gpu_source(folder, 0, num_ranks)
        self.syncer = WeightSyncer(
            self.source, engines, SyncConfig(**settings), rank=0, world_size=num_ranks, broadcast=self._broadcast if self.pipes else None
        )
        self._tell("see", 1)

    def _broadcast(self, payload: bytes) -> bytes:
        for pipe in self.pipes:
            pipe.send(payload)
        return payload

    def _tell(self, method: str, argument: Any) -> None:
        for pipe in self.pipes:
            pipe.send((method, argument))
        assert self.answers() == [("ok", None)] * len(self.pipes)

    def answers(self) -> list[tuple[str, str | None]]:
        """Of the other ranks to what they were told."""
        for rank, pipe in enumerate(self.pipes, 1):
            assert pipe.poll(_ANSWER_S), f"rank {rank} does not answer"
        return [pipe.recv() for pipe in self.pipes]

    def take(self, folder: Path) -> None:
        """The tensors of another folder, in the same memory."""
        self.source.take(read_folder(folder))
        self._tell("take", str(folder))

    def connect(self) -> None:
        for pipe in self.pipes:
            pipe.send(("connect", None))
        self.syncer.connect()
        assert self.answers() == [("ok", None)] * len(self.pipes)

    def sync(self, version: int) -> SyncReport:
        """Of all ranks. Raises rank 0's error, after it was seen to be that of every rank that lives."""
        for pipe in self.pipes:
            pipe.send(("sync", version))
        try:
            report = self.syncer.sync(version)
        except WeightSyncError as error:
            self._check_all_heard(str(error))
            raise
        assert self.answers() == [("ok", None)] * len(self.pipes)
        return report

    def _check_all_heard(self, error: str) -> None:
        living = [pipe for process, pipe in zip(self.processes, self.pipes, strict=True) if process.is_alive()]
        assert all(pipe.poll(_ANSWER_S) for pipe in living), "a rank does not answer"
        assert [pipe.recv() for pipe in living] == [("error", error)] * len(living)

    def close(self) -> None:
        self.syncer.close()
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(("end", None))
        for process in self.processes:
            process.join(15)
            process.kill()
            process.join()

    def __enter__(self) -> GpuActor:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
