"""One step of a sync on the CPU, without processes: a plan's copies against a plain copy of the same bytes, in the same run.

``python -m benchmarks.replay``: Qwen2.5-0.5B in bf16, actor TP=2, one engine worker as vLLM lays it out. The floor is one
contiguous ``copy_`` of as many bytes, alternated with the replays, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.paper import QWEN25_05B, dense_case
from rlsync.copy.cpu import CopyProgram, bind
from rlsync.geometry import Placement
from rlsync.plan import build_plan
from rlsync.topology import Topology


def buffers(placement: Placement) -> dict[str, torch.Tensor]:
    """Memory of a holder, every page of it touched."""
    return {b.name: torch.ones(b.shape, dtype=getattr(torch, b.dtype)) for b in placement.buffers}


def programs() -> list[CopyProgram]:
    """The copies of a step, bucket by bucket and source by source, bound to memory."""
    case = dense_case(QWEN25_05B, Topology(tp_size=2), num_engines=1, engine_tp=1)
    plan = build_plan(case.tensors, case.sources, case.destinations, bucket_bytes=256 * 2**20)
    sources = [buffers(p) for p in case.sources]
    (destination,) = (buffers(p) for p in case.destinations)
    return [
        bind([c for c in bucket.copies if c.source == s], sources[s], destination) for bucket in plan.buckets for s in range(len(sources))
    ]


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    step = programs()
    nbytes = sum(program.nbytes for program in step)
    source, destination = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    replays, floors = [], []
    for _ in range(arguments.rounds + 1):
        floors.append(seconds(lambda: destination.copy_(source)))
        replays.append(seconds(lambda: [program.run() for program in step]))
    ratios = [r / f for r, f in zip(replays[1:], floors[1:], strict=True)]
    print(
        f"{nbytes / 1e6:,.0f} MB, {arguments.threads} threads, {arguments.rounds} rounds: replay {nbytes / min(replays) / 1e9:.2f} GB/s, "
        f"floor {nbytes / min(floors) / 1e9:.2f} GB/s (best of each); ratio {min(replays) / min(floors):.2f} of the best, "
        f"{statistics.median(ratios):.2f} median of the rounds"
    )


if __name__ == "__main__":
    main()
