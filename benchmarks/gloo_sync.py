"""A sync of Qwen2.5-0.5B's shapes to a real engine on CPU, over gloo on loopback and through shared memory, beside their floors.

``python -m benchmarks.gloo_sync``: random bf16 weights, one actor rank, one engine of one worker in a process of its own. The floor
of gloo is a plain send and receive of the same bytes in messages of a bucket, between two processes, alternated with the syncs.
Every message of the transport is in it: what is missing are copies into and out of the messages, and the engine's own work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.paper import QWEN25_05B
from rlsync.engine.handles.local import Engine
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.models import model_of
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from rlsync.sync.source import Declared
from rlsync.transport.gloo import Group
from rlsync.transport.rendezvous import GroupInfo, Rendezvous

CONFIG = {**QWEN25_05B, "max_position_embeddings": 2048}
BUCKET_BYTES = 64 * 2**20
HOST = "127.0.0.1"
TIMEOUT_S = 120.0
# The engine and its compiler take a share of the machine that says nothing about the transport.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}


class RandomSource:
    """Whole tensors of random numbers on one actor rank."""

    def __init__(self) -> None:
        self.tensors: tuple[TensorSpec, ...] = tuple(model_of(CONFIG).tensors("bfloat16"))
        self.placements = (whole_tensors("actor 0", self.tensors),)
        self.stable_memory, self.frozen, self.declared = True, frozenset[str](), Declared()
        self.buffers = {t.name: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for t in self.tensors}

    def begin(self, version: int) -> None:
        """They are as they are."""


def plain_end(port: int, rank: int, nbytes: int, pipe: Connection | None) -> list[float]:
    """One end of the floor: ``nbytes`` in messages of a bucket for each word from the pipe. Returns the seconds of each round."""
    group = Group(GroupInfo(HOST, port, rank, ("sender", "receiver")), 0, TIMEOUT_S)
    group.open()
    messages = [torch.ones(BUCKET_BYTES, dtype=torch.uint8) for _ in range(2)]
    sizes = [BUCKET_BYTES] * (nbytes // BUCKET_BYTES) + [nbytes % BUCKET_BYTES]
    seconds = []
    while pipe is not None and pipe.recv():
        started_s = time.perf_counter()
        under_way = []
        for bucket, size in enumerate(sizes):
            begin = group.send if rank == 0 else group.receive
            under_way.append(begin(messages[bucket % 2][:size], 1 - rank, bucket))
            if bucket:
                group.wait(under_way[bucket - 1])
        group.wait(under_way[-1])
        seconds.append(time.perf_counter() - started_s)
        pipe.send(seconds[-1])
    return seconds


class Floor:
    """Two processes that send and receive on demand."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._meeting = nbytes, Rendezvous(HOST, TIMEOUT_S)
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=plain_end, args=(self._meeting.port, rank, nbytes, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def gb_per_s(self) -> float:
        for pipe in self._pipes:
            pipe.send(True)
        return self._nbytes / 1e9 / max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(False)
            process.join(10)


def start_engine(folder: Path) -> Engine:
    args = {"model": str(folder), "skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 256, "enforce_eager": True}
    engine = Engine("bench", {**args, "max_num_seqs": 4})
    engine.start()
    return engine


def measure(engine: Engine, source: RandomSource, transport: str, rounds: int, floor: Floor) -> tuple[list[SyncReport], list[float]]:
    """Reports of ``rounds`` syncs after a first one, and the floor measured before each."""
    config = SyncConfig(bucket_bytes=BUCKET_BYTES, transport=transport, verify="off", timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
    with WeightSyncer(source, [engine], config) as syncer:
        syncer.connect()
        syncer.sync(1)
        floors, reports = [], []
        for version in range(2, 2 + rounds):
            floors.append(floor.gb_per_s())
            reports.append(syncer.sync(version))
    return reports, floors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    source = RandomSource()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        engine = pool.submit(start_engine, folder).result()
        floor = Floor(sum(t.nbytes for t in source.tensors))
        try:
            for transport in ("gloo", "shm"):
                reports, floors = measure(engine, source, transport, arguments.rounds, floor)
                best = min(reports, key=lambda r: r.transfer_s)
                print(f"{transport}: {best.bytes / 1e6:.0f} MB in {best.num_buckets} buckets, sink {'+'.join(best.sinks)}")
                print(f"  plain gloo, best and median of {len(floors)}: {max(floors):.2f} {statistics.median(floors):.2f} GB/s")
                for report in reports:
                    parts = {n: round(getattr(report, n), 3) for n in ("transfer_s", "fill_s", "wait_s", "pull_s", "finalize_s", "seconds")}
                    print(f"  {report.bytes / 1e9 / report.transfer_s:.2f} GB/s of transfer_s; {parts}")
        finally:
            floor.close()
            engine.close()


if __name__ == "__main__":
    main()
