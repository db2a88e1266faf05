"""Plans of large models on paper: seconds, memory, balance. One core, no torch.

``python -m benchmarks.planning [CASE ...]``, a process for each case whose memory matters. ``busiest_source`` is the most bytes that
a source gives over the mean of those that give any. ``price-...`` are clusters of thousands of GPUs as ``rlsync plan`` counts them,
one destination for all that are alike; their seconds count everything from the layout to the price.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.paper import DEEPSEEK_V3, LLAMA31_405B, QWEN3_30B_A3B, QWEN25_7B, QWEN25_72B, sides
from rlsync.cli.pricing import Settings, price_of
from rlsync.cli.scene import Sides
from rlsync.plan.links import traffic
from rlsync.plan.planner import build_plan

# Engines beside the actor begin on a host of their own. Of DeepSeek-V3 the first stage has three layers, which are dense, and the last two.
_STAGES = {"pp_size": 16, "first_stage_layers": 3, "last_stage_layers": 2}
CASES: dict[str, Callable[[], Sides]] = {
    "72b": lambda: sides(QWEN25_72B, {"tp_size": 8, "pp_size": 8}, num_engines=8, tp_size=8, colocated=True),
    "72b-apart": lambda: sides(QWEN25_72B, {"tp_size": 8, "pp_size": 8}, num_engines=8, tp_size=8),
    "7b-dp2": lambda: sides(QWEN25_7B, {"tp_size": 4, "dp_size": 2}, num_engines=4, tp_size=2, colocated=True),
    "7b-dp2-apart": lambda: sides(QWEN25_7B, {"tp_size": 4, "dp_size": 2}, num_engines=4, tp_size=2),
    "30b-ep": lambda: sides(QWEN3_30B_A3B, {"dp_size": 64, "ep_size": 8}, num_engines=8, tp_size=8, ep_size=8),
    "30b-tp": lambda: sides(QWEN3_30B_A3B, {"dp_size": 64, "ep_size": 8}, num_engines=8, tp_size=8),
}
BUCKET_BYTES = 256 * 2**20

PRICES: dict[str, Callable[[], Sides]] = {
    "price-72b-3072": lambda: sides(QWEN25_72B, {"tp_size": 8, "pp_size": 8, "dp_size": 32}, tp_size=8, num_engines=128),
    "price-405b-1016": lambda: sides(LLAMA31_405B, {"tp_size": 8, "pp_size": 9, "dp_size": 7}, tp_size=8, num_engines=64),
    "price-deepseek-v3-512-ep": lambda: sides(
        DEEPSEEK_V3, {**_STAGES, "dp_size": 16, "ep_size": 16}, tp_size=8, dp_size=4, ep_size=32, num_engines=8
    ),
    "price-deepseek-v3-512-tp": lambda: sides(DEEPSEEK_V3, {**_STAGES, "dp_size": 16, "ep_size": 16}, tp_size=16, num_engines=16),
    "price-deepseek-v3-3072-ep": lambda: sides(
        DEEPSEEK_V3, {**_STAGES, "tp_size": 2, "dp_size": 64, "ep_size": 64}, tp_size=8, dp_size=4, ep_size=32, num_engines=32
    ),
    "price-deepseek-v3-3072-tp": lambda: sides(
        DEEPSEEK_V3, {**_STAGES, "tp_size": 2, "dp_size": 64, "ep_size": 64}, tp_size=16, num_engines=64
    ),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """What planning a case took and what came out. Seconds are those of the processor, memory that of the whole process."""

    case: str
    tensors: int
    sources: int
    destinations: int
    pieces: int
    copies: int
    buckets: int
    seconds: float
    peak_mib: float
    plan_mib: float
    busiest_source: float
    redundancy: tuple[float, float]


def planned(name: str) -> Planned:
    case = CASES[name]()
    before_mib, begin = _peak_mib(), time.process_time()
    plan = build_plan(case.tensors, case.actors, case.workers, bucket_bytes=BUCKET_BYTES)
    seconds = time.process_time() - begin
    count = traffic(plan)
    given_bytes = [n for n in count.bytes_by_source.values() if n]
    return Planned(
        name, len(case.tensors), len(case.actors), len(case.workers), sum(len(p.pieces) for p in case.workers),
        sum(len(b.copies) for b in plan.buckets), len(plan.buckets), round(seconds, 2), round(_peak_mib()), round(_peak_mib() - before_mib),
        round(max(given_bytes) * len(given_bytes) / sum(given_bytes), 3), (min(count.redundancy.values()), max(count.redundancy.values())),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Priced:
    """What pricing a cluster took. Seconds are those of the processor."""

    case: str
    tensors: int
    sources: int
    destinations: int
    copies: int
    buckets: int
    seconds: float
    peak_mib: float


def priced(name: str, transport: str) -> Priced:
    begin = time.process_time()
    price = price_of(name, PRICES[name](), Settings(transport=transport)).price
    assert price is not None
    seconds = time.process_time() - begin
    counts = price.num_tensors, price.actor_ranks, price.engine_workers, price.num_copies, price.num_buckets
    return Priced(
        name, *counts, round(seconds, 2), round(_peak_mib())
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["72b", "7b-dp2", "30b-ep"], help=f"of {', '.join((*CASES, *PRICES))}")
    parser.add_argument("--transport", default="auto", help="of a price")
    arguments = parser.parse_args()
    for name in arguments.cases:
        result = planned(name) if name in CASES else priced(name, arguments.transport)
        print(json.dumps(asdict(result)), flush=True)


def _peak_mib() -> float:
    """Not ``ru_maxrss``, which begins with the memory of the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
