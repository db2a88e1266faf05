"""Plans of large models on paper: seconds, memory, balance. One core, no torch.

``python -m benchmarks.planning [CASE ...]``, a process for each case whose memory matters. ``busiest_source`` is the most bytes that
a source gives over the mean of those that give any.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.paper import QWEN3_30B_A3B, QWEN25_7B, QWEN25_72B, Case, dense_case
from rlsync.layout.topology import Topology
from rlsync.plan.links import traffic
from rlsync.plan.planner import build_plan

CASES: dict[str, Callable[[], Case]] = {
    "72b": lambda: dense_case(QWEN25_72B, Topology(tp_size=8, pp_size=8), num_engines=8, engine_tp=8),
    "72b-apart": lambda: dense_case(QWEN25_72B, Topology(tp_size=8, pp_size=8), num_engines=8, engine_tp=8, colocated=False),
    "7b-dp2": lambda: dense_case(QWEN25_7B, Topology(tp_size=4, dp_size=2), num_engines=4, engine_tp=2),
    "7b-dp2-apart": lambda: dense_case(QWEN25_7B, Topology(tp_size=4, dp_size=2), num_engines=4, engine_tp=2, colocated=False),
    "30b-ep": lambda: QWEN3_30B_A3B.case(world_size=64, ep_size=8, pp_size=1, num_engines=8, engine_tp=8, expert_parallel=True),
    "30b-tp": lambda: QWEN3_30B_A3B.case(world_size=64, ep_size=8, pp_size=1, num_engines=8, engine_tp=8, expert_parallel=False),
}
BUCKET_BYTES = 256 * 2**20


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
    plan = build_plan(case.tensors, case.sources, case.destinations, bucket_bytes=BUCKET_BYTES)
    seconds = time.process_time() - begin
    count = traffic(plan)
    given_bytes = [n for n in count.bytes_by_source.values() if n]
    return Planned(
        name, len(case.tensors), len(case.sources), len(case.destinations), sum(len(p.pieces) for p in case.destinations),
        sum(len(b.copies) for b in plan.buckets), len(plan.buckets), round(seconds, 2), round(_peak_mib()), round(_peak_mib() - before_mib),
        round(max(given_bytes) * len(given_bytes) / sum(given_bytes), 3), (min(count.redundancy.values()), max(count.redundancy.values())),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["72b", "7b-dp2", "30b-ep"], help=f"of {', '.join(CASES)}")
    for name in parser.parse_args().cases:
        print(json.dumps(asdict(planned(name))), flush=True)


def _peak_mib() -> float:
    """Not ``ru_maxrss``, which begins with the memory of the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
