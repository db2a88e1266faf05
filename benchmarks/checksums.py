"""Checksums against a plain copy of the same bytes, in the same run. ``python -m benchmarks.checksums [--device cuda]``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from rlsync.copy.checksum import checksums

NBYTES = 512 * 2**20


def views(device: torch.device) -> dict[str, tuple[list[torch.Tensor], int]]:
    """What is summed, and its bytes: one long row, the half of each row of a matrix, and many small tensors."""
    flat = torch.ones(NBYTES // 2, dtype=torch.bfloat16, device=device)
    halves = flat[: flat.numel() // 9728 * 9728].view(-1, 9728)[:, :4864]
    small = [flat[i * 896 : (i + 1) * 896] for i in range(10_000)]
    return {
        "contiguous": ([flat], NBYTES),
        "half of each row (4864 of 9728 bf16)": ([halves], halves.numel() * 2),
        "10,000 of 1792 bytes": (small, len(small) * 1792),
    }


def best_s(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Seconds of the fastest round. On the CPU those of the processor, as other work on the machine must not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = float("inf")
    for _ in range(rounds + 1):
        begin = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the end of what is measured
        best = min(best, clock() - begin)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    # One thread: the processor's seconds of several add up.
    torch.set_num_threads(1)
    source, target = (torch.ones(NBYTES, dtype=torch.uint8, device=device) for _ in range(2))
    floor_s = best_s(lambda: target.copy_(source), device, arguments.rounds)
    print(f"copy of {NBYTES / 1e6:,.0f} MB: {NBYTES / floor_s / 1e9:.2f} GB/s")
    for name, (tensors, nbytes) in views(device).items():
        seconds = best_s(partial(checksums, tensors), device, arguments.rounds)
        print(f"checksums, {name}: {nbytes / seconds / 1e9:.2f} GB/s, {seconds * 1e6 / len(tensors):,.1f} us a tensor")


if __name__ == "__main__":
    main()
