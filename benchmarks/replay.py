"""One step of a sync on the CPU, without processes: a plan's copies against a plain copy of the same bytes, in the same run.

``python -m benchmarks.replay``: Qwen2.5-0.5B in bf16, actor TP=2, one engine worker as vLLM lays it out. The floor is one
contiguous ``copy_`` of as many bytes, alternated with the replays, so that both see the same machine. Beside it stand as many
contiguous copies as the step has, of the same sizes: what the number of copies costs, apart from their strides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.paper import QWEN25_05B, sides
from rlsync.copy.cpu import CopyProgram, bind
from rlsync.layout.geometry import DTYPE_BYTES, Placement
from rlsync.plan.planner import build_plan


def buffers(placement: Placement) -> dict[str, torch.Tensor]:
    """Memory of a holder, every page of it touched."""
    return {b.name: torch.ones(b.shape, dtype=getattr(torch, b.dtype)) for b in placement.buffers}


def step_programs() -> tuple[list[CopyProgram], list[int]]:
    """The copies of a step, bucket by bucket and source by source, bound to memory; and the bytes of each copy."""
    case = sides(QWEN25_05B, {"tp_size": 2})
    plan = build_plan(case.tensors, case.actors, case.workers, bucket_bytes=256 * 2**20)
    sources = [buffers(p) for p in case.actors]
    (destination,) = (buffers(p) for p in case.workers)
    groups = [[c for c in bucket.copies if c.source == s] for bucket in plan.buckets for s in range(len(sources))]
    item_bytes = {b.name: DTYPE_BYTES[b.dtype] for p in case.workers for b in p.buffers}
    sizes = [c.size * item_bytes[c.destination_buffer] for group in groups for c in group]
    return [bind(group, sources[group[0].source], destination) for group in groups if group], sizes


def contiguous(sizes: list[int], source: torch.Tensor, destination: torch.Tensor) -> CopyProgram:
    """The same sizes, one after the other in flat memory (1-D uint8)."""
    pairs, cursor = [], 0
    for nbytes in sizes:
        pairs.append((destination[cursor : cursor + nbytes], source[cursor : cursor + nbytes]))
        cursor += nbytes
    return CopyProgram(pairs)


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
    step, sizes = step_programs()
    nbytes = sum(sizes)
    source, destination = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    cut = contiguous(sizes, source, destination)
    works: dict[str, Callable[[], object]] = {
        "floor": lambda: destination.copy_(source),
        "contiguous copies": cut.run,
        "replay": lambda: [program.run() for program in step],
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(arguments.rounds + 1):
        for name, work in works.items():
            times[name].append(seconds(work))
    print(f"{nbytes / 1e6:,.0f} MB in {len(sizes)} copies, {arguments.threads} threads, {arguments.rounds} rounds")
    floors = times["floor"][1:]
    for name, (_, *rounds) in times.items():
        median = statistics.median(r / f for r, f in zip(rounds, floors, strict=True))
        best = min(rounds)
        print(
            f"{name}: best {nbytes / best / 1e9:.2f} GB/s; {best / min(floors):.2f} x the best floor, median of the rounds {median:.2f} x"
        )


if __name__ == "__main__":
    main()
