"""Plans of large models on paper: seconds, memory, balance. ``python -m benchmarks.planning [CASE ...]``; one core, no torch."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

from benchmarks.paper import QWEN3_30B_A3B, QWEN25_7B, QWEN25_72B, Case, dense_case
from rlsync.links import traffic
from rlsync.plan import build_plan
from rlsync.topology import Topology

CASES: dict[str, Callable[[], Case]] = {
    "72b": lambda: dense_case(QWEN25_72B, Topology(tp_size=8, pp_size=8), num_engines=8, engine_tp=8),
    "72b-apart": lambda: dense_case(QWEN25_72B, Topology(tp_size=8, pp_size=8), num_engines=8, engine_tp=8, colocated=False),
    "7b-dp2": lambda: dense_case(QWEN25_7B, Topology(tp_size=4, dp_size=2), num_engines=4, engine_tp=2),
    "7b-dp2-apart": lambda: dense_case(QWEN25_7B, Topology(tp_size=4, dp_size=2), num_engines=4, engine_tp=2, colocated=False),
    "30b-ep": lambda: QWEN3_30B_A3B.case(world_size=64, ep_size=8, pp_size=1, num_engines=8, engine_tp=8, expert_parallel=True),
    "30b-tp": lambda: QWEN3_30B_A3B.case(world_size=64, ep_size=8, pp_size=1, num_engines=8, engine_tp=8, expert_parallel=False),
}
BUCKET_BYTES = 256 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=["72b", "7b-dp2", "30b-ep"], help=f"of {', '.join(CASES)}")
    for name in parser.parse_args().cases:
        case = CASES[name]()
        before = _peak_mib()
        begin = time.process_time()
        plan = build_plan(case.tensors, case.sources, case.destinations, bucket_bytes=BUCKET_BYTES)
        planned = time.process_time() - begin
        count = traffic(plan)
        given = [n for n in count.bytes_by_source.values() if n]
        print(
            f"{name}: {len(case.tensors):,} tensors, {len(case.sources)} -> {len(case.destinations)} holders, "
            f"{sum(len(p.pieces) for p in case.destinations):,} pieces: {planned:.1f} s, peak {_peak_mib():,.0f} MiB "
            f"({_peak_mib() - before:,.0f} for the plan); {sum(len(b.copies) for b in plan.buckets):,} copies, "
            f"{len(plan.buckets)} buckets, "
            f"max/mean of a source {max(given) * len(given) / sum(given):.3f} over {len(given)}, "
            f"redundancy {min(count.redundancy.values()):.2f}..{max(count.redundancy.values()):.2f}, {dict(count.bytes_by_link)}",
            flush=True,
        )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
