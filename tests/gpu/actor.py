"""Actor ranks with tensors on GPUs: rank 0 in this process, each other one in a process that sees no GPU but its own."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from tests.gpu.engines import only_gpus
from tests.integration.engine_source import FolderSource, read_folder

if TYPE_CHECKING:
    from rlsync.engine.handles.local import Engine

_ANSWER_S = 90.0


def gpu_source(folder: str | Path, rank: int, world_size: int) -> FolderSource:
    """Every ``world_size``-th tensor of a folder on the first GPU that this process sees."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return FolderSource({n: t.to(device) for n, t in read_folder(folder).items()}, rank=rank, world_size=world_size)


def serve(pipe: Connection, folder: str, rank: int, world_size: int) -> None:
    """An actor rank that answers ``(method, argument)`` with ``("ok", None)`` or ``("error", text)`` until told to ``end``."""
    source = gpu_source(folder, rank, world_size)
    syncers: list[WeightSyncer] = []

    def connect(settings: dict[str, Any]) -> None:
        config = SyncConfig(**settings)
        syncers[:] = [WeightSyncer(source, (), config, rank=rank, world_size=world_size, broadcast=lambda payload: pipe.recv())]
        syncers[0].connect()

    methods: dict[str, Callable[[Any], object]] = {
        "see": lambda count: _expect(torch.cuda.device_count(), count),
        "take": lambda other: source.take(read_folder(other)),
        "connect": connect,
        "sync": lambda version: syncers[0].sync(version),
        "close": lambda _: syncers[0].close(),
    }
    while True:
        method, argument = pipe.recv()
        if method == "end":
            return
        try:
            methods[method](argument)
            pipe.send(("ok", None))
        except Exception as error:
            pipe.send(("error", str(error)))


def _expect(found: int, wanted: int) -> None:
    assert found == wanted, f"this process sees {found} GPUs and should see {wanted}"


class GpuActor:
    """Ranks that hold a folder's tensors, rank r on GPU r. Processes are started once, for as many connections as one likes.

    Attributes:
        processes: of all ranks but rank 0.
        syncer: of rank 0, in the present connection.
    """

    syncer: WeightSyncer

    def __init__(self, folder: Path, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(1, num_ranks):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(theirs, str(folder), rank, num_ranks), daemon=True))
            with only_gpus(str(rank)):
                self.processes[-1].start()
            theirs.close()
        self._source = gpu_source(folder, 0, num_ranks)
        self._tell("see", 1)

    @property
    def is_whole(self) -> bool:
        """Whether all ranks live."""
        return all(process.is_alive() for process in self.processes)

    def take(self, folder: Path) -> None:
        """The tensors of another folder, in the same memory."""
        self._source.take(read_folder(folder))
        self._tell("take", str(folder))

    @contextlib.contextmanager
    def connected(self, engines: Sequence[Engine], **settings: Any) -> Iterator[WeightSyncer]:
        """All ranks and these engines. The yielded syncer is rank 0's; ``sync`` is that of all."""
        settings = {"bucket_bytes": 100_000, "timeout_s": 20.0, "verify": "full", "transport": "ipc", **settings}
        self.syncer = WeightSyncer(
            self._source,
            engines,
            SyncConfig(**settings),
            rank=0,
            world_size=1 + len(self._pipes),
            broadcast=self._broadcast if self._pipes else None,
        )
        self._ask("connect", settings)
        try:
            self.syncer.connect()
            self._check(("ok", None))
            yield self.syncer
        finally:
            self.syncer.close()
            if self.is_whole:
                self._tell("close", None)

    def sync(self, version: int) -> SyncReport:
        """Of all ranks. Raises rank 0's error, after it was seen to be that of every rank that lives."""
        self._ask("sync", version)
        try:
            report = self.syncer.sync(version)
        except WeightSyncError as error:
            self._check(("error", str(error)))
            raise
        self._check(("ok", None))
        return report

    def _broadcast(self, payload: bytes) -> bytes:
        for pipe in self._pipes:
            pipe.send(payload)
        return payload

    def _tell(self, method: str, argument: Any) -> None:
        self._ask(method, argument)
        self._check(("ok", None))

    def _ask(self, method: str, argument: Any) -> None:
        for pipe in self._pipes:
            pipe.send((method, argument))

    def _check(self, answer: tuple[str, str | None]) -> None:
        """Of every other rank that lives."""
        living = [pipe for process, pipe in zip(self.processes, self._pipes, strict=True) if process.is_alive()]
        assert all(pipe.poll(_ANSWER_S) for pipe in living), "a rank does not answer"
        assert [pipe.recv() for pipe in living] == [answer] * len(living)

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("end", None))
        for process in self.processes:
            process.join(15)
            process.kill()
            process.join()
