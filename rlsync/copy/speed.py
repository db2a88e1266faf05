"""How fast a memory can be copied: the floor of a transfer. Measures; moves nobody's data."""

from __future__ import annotations

import time

import torch

# Beyond the caches of any processor, and still only hundredths of a second.
_MOST_BYTES = 64 * 2**20
_ROUNDS = 3


def copy_gb_per_s(memory: torch.Tensor) -> float:
    """10^9 bytes per second at which ``memory`` (1-D uint8, on CPU or CUDA) is copied to a private one: the best of three rounds.

    For a slot of a ring this is the speed of the shm link: what a sync would take that did nothing but move its bytes once.
    Reads at most 64 MiB, writes nothing to it, and takes as many threads as torch has. Not collective.
    """
    source = memory[:_MOST_BYTES]
    target = torch.empty_like(source)
    best_s = float("inf")
    # The first round touches pages for the first time.
    for _ in range(1 + _ROUNDS):
        _synchronize(source)
        begin_s = time.perf_counter()
        target.copy_(source)
        _synchronize(source)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return source.numel() / 1e9 / best_s


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
