"""The CUDA copier on the shards of real models: ``python -m benchmarks.copy_cuda [--json FILE]``; one GPU, or two for pulls from a peer.

One worker of an engine is filled from what its actor ranks hold: on the same GPU, and with the actor's memory on a second one. The
floor is a copy of one large buffer by torch, measured in the same run. No model is loaded: placements are on paper, bytes random.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.paper import QWEN3_30B_A3B, QWEN25_7B, sides
from rlsync.cli.scene import Sides
from rlsync.copy.cpu import region
from rlsync.copy.cuda import CudaCopyProgram, open_peer, strided
from rlsync.layout.geometry import Placement
from rlsync.plan.planner import Copy, build_plan

WORKER = torch.device("cuda", 0)
FLOOR_BYTES = 8 * 2**30
WARM_UPS = 3
# Megatron's distributed optimizer begins every parameter at a multiple of this many elements of one buffer.
PARAMETER_ALIGNMENT = 64


# The first worker of an engine with TP=2: from an actor that is cut alike, and its halves of experts that are whole at an actor's EP ranks.
CASES: dict[str, Callable[[], Sides]] = {
    "Qwen2.5-7B, TP=2": lambda: sides(QWEN25_7B, {"tp_size": 2}, tp_size=2),
    "Qwen3-30B-A3B, TP=2": lambda: sides(QWEN3_30B_A3B, {"dp_size": 2, "ep_size": 2}, tp_size=2),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One way of copying one case; times are medians. ``floor_ratio`` is speed over that of the large buffer."""

    case: str
    source: str
    kind: str
    copies: int
    tasks: int
    gigabytes: float
    milliseconds: float
    with_launch_milliseconds: float
    gb_per_s: float
    floor_gb_per_s: float
    floor_ratio: float
    tables_s: float
    tables_mib: float


def parameters(placement: Placement, device: torch.device) -> dict[str, torch.Tensor]:
    """An actor rank's memory: one buffer of random bytes, in which every parameter has its place."""
    dtype = getattr(torch, placement.buffers[0].dtype)
    offsets, cursor = {}, 0
    for buffer in placement.buffers:
        offsets[buffer.name] = cursor
        cursor += -(-buffer.size // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT
    flat = torch.empty(cursor, dtype=torch.int16, device=device)
    for begin in range(0, cursor, 2**30):
        flat[begin : begin + 2**30].random_(-(2**15), 2**15)
    return {b.name: flat.view(dtype)[offsets[b.name] :][: b.size].view(b.shape) for b in placement.buffers}


class Bound:
    """A case in memory: the worker's parameters on WORKER, each by itself, and those of the actor on ``actor``."""

    def __init__(self, case: Sides, actor: torch.device) -> None:
        open_peer(WORKER, actor)
        plan = build_plan(case.tensors, case.actors, case.workers[:1])
        self.copies = [c for bucket in plan.buckets for c in bucket.copies]
        self.sources = [parameters(p, actor) for p in case.actors]
        worker = case.workers[0]
        self.destination = {b.name: torch.zeros(b.shape, dtype=getattr(torch, b.dtype), device=WORKER) for b in worker.buffers}
        self.padding = worker.padding

    def program(self, kind: str) -> tuple[CudaCopyProgram, float]:
        """The program, and the seconds that its tables took: everything from a list of copies to memory of the device."""
        begin_s = time.perf_counter()
        givers = [{name: strided(t) for name, t in memory.items()} for memory in self.sources]
        takers = {name: strided(t) for name, t in self.destination.items()}
        pairs = [
            (
                None if kind == "sum only" else takers[c.destination_buffer].region(c.destination_offset, c.shape, c.destination_strides),
                givers[c.source][c.source_buffer].region(c.source_offset, c.shape, c.source_strides),
            )
            for c in self.copies
        ]
        constants = [(takers[f.buffer].region(f.offset, f.shape, f.strides), f.value) for f in self.padding]
        program = CudaCopyProgram(pairs, () if kind == "sum only" else constants, device=WORKER, summed=kind != "copy")
        return program, time.perf_counter() - begin_s

    def views(self, copy: Copy) -> tuple[torch.Tensor, torch.Tensor]:
        taken = region(self.destination[copy.destination_buffer], copy.destination_offset, copy.shape, copy.destination_strides)
        return taken, region(self.sources[copy.source][copy.source_buffer], copy.source_offset, copy.shape, copy.source_strides)

    def check(self, count: int) -> None:
        """Compare ``count`` copies, bit for bit, with what they were made from."""
        for copy in random.Random(0).sample(self.copies, min(count, len(self.copies))):
            taken, given = self.views(copy)
            assert torch.equal(taken.contiguous().view(torch.int16), given.to(WORKER).contiguous().view(torch.int16)), copy


def medians(work: Callable[[], object], rounds: int, devices: tuple[torch.device, ...]) -> tuple[float, float]:
    """Seconds between events of the current stream of WORKER, and seconds until the host knows that it is done."""
    events, walls = [], []
    for _ in range(WARM_UPS + rounds):
        for device in devices:
            torch.cuda.synchronize(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_s = time.perf_counter()
        begin.record()
        work()
        end.record()
        for device in devices:
            torch.cuda.synchronize(device)
        walls.append(time.perf_counter() - begin_s)
        events.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(events[WARM_UPS:]), statistics.median(walls[WARM_UPS:])


def floor_gb_per_s(actor: torch.device, rounds: int) -> float:
    """10^9 bytes per second, counted once, of one copy of a large buffer."""
    source = torch.ones(FLOOR_BYTES, dtype=torch.uint8, device=actor)
    destination = torch.zeros(FLOOR_BYTES, dtype=torch.uint8, device=WORKER)
    _, seconds = medians(lambda: destination.copy_(source), rounds, (WORKER, actor))
    return FLOOR_BYTES / seconds / 1e9


def rows(name: str, case: Sides, actor: torch.device, rounds: int) -> Iterator[Row]:
    floor = floor_gb_per_s(actor, rounds)
    bound = Bound(case, actor)
    nbytes = sum(c.size for c in bound.copies) * 2
    for kind in ("copy", "copy and sum", "sum only"):
        program, tables_s = bound.program(kind)
        seconds, wall_s = medians(program.run, rounds, (WORKER, actor))
        if kind == "copy":
            bound.check(len(bound.copies) if actor == WORKER else 1000)
        speed = nbytes / seconds / 1e9
        where = "same GPU" if actor == WORKER else "peer"
        yield Row(
            name, where, kind, len(bound.copies), program.num_tasks, nbytes / 1e9, seconds * 1e3, wall_s * 1e3,
            speed, floor, speed / floor, tables_s, program.table_bytes / 2**20,
        )  # fmt: skip


def registers(rounds: int) -> Iterator[Row]:
    """What goes through registers, by large buffers of ones; GB are half of what is read and written."""
    floor, count = floor_gb_per_s(WORKER, rounds), 2**30
    half, single = (torch.ones(count + 8, dtype=dtype, device=WORKER) for dtype in (torch.bfloat16, torch.float32))
    other = torch.zeros_like(half)
    square = (2**15, 2**15)
    pairs = {
        "float32 to bfloat16": (other[:count], single[:count]),
        "bfloat16 to float32": (single[:count], half[:count]),
        "one element off": (other[1 : count + 1], half[:count]),
        "rows of 64 bytes, sliced": (other[: count // 2].view(-1, 32), half[:count].view(-1, 64)[:, :32]),
        "transposition": (other[:count].view(square), half[:count].view(square).t()),
    }
    for kind, pair in pairs.items():
        program = CudaCopyProgram([pair], device=WORKER)
        seconds, wall_s = medians(program.run, rounds, (WORKER,))
        gigabytes = sum(view.numel() * view.element_size() for view in pair) / 2e9
        yield Row(
            "one pair", "same GPU", kind, 1, program.num_tasks, gigabytes, seconds * 1e3, wall_s * 1e3,
            gigabytes / seconds, floor, gigabytes / seconds / floor, 0.0, program.table_bytes / 2**20,
        )  # fmt: skip


def line(row: Row) -> str:
    """A row of RESULTS.md."""
    return (
        f"| {row.case} | {row.source} | {row.kind} | {row.copies:,} | {row.tasks:,} | {row.gigabytes:.2f} | {row.milliseconds:.2f} | "
        f"{row.with_launch_milliseconds:.2f} | {row.gb_per_s:,.0f} | {row.floor_gb_per_s:,.0f} | {row.floor_ratio:.3f} | "
        f"{row.tables_s:.2f} | {row.tables_mib:.1f} |"
    )


HEAD = (
    "| case | source | kind | copies | tasks | GB | ms | ms with launch | GB/s | floor GB/s | of floor | tables s | tables MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    actors = [WORKER, *([torch.device("cuda", 1)] if torch.cuda.device_count() > 1 else [])]
    print(f"{torch.cuda.get_device_name(WORKER)}, torch {torch.__version__}, median of {options.rounds}\n{HEAD}", flush=True)
    found = []
    for name, make in CASES.items():
        for actor in actors:
            for row in rows(name, make(), actor, options.rounds):
                found.append(asdict(row))
                print(line(row), flush=True)
            torch.cuda.empty_cache()
    for row in registers(options.rounds):
        found.append(asdict(row))
        print(line(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
