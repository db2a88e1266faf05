"""Adapters merged into all weights of a model, against a copy of the same weights. ``python -m benchmarks.merging [--device cuda]``.

Buckets as in a sync. ``--tiles`` measures other tiles than the kernel's own: rows, columns, and warps of a block.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.checksums import best_s
from rlsync.copy import merge

BUCKET_BYTES = 2**30
# Rows of each projection, as often as they come one after the other; columns; and how many there are.
Weight = tuple[tuple[int, ...], int, int, int]
SHAPES: dict[str, tuple[Weight, ...]] = {
    "7B, 28 layers": (((896, 128, 128), 4, 3584, 28), ((3584,), 1, 3584, 28), ((18944, 18944), 1, 3584, 28), ((3584,), 1, 18944, 28)),
    "30B-A3B, experts of 16 layers": (((768, 768), 1, 2048, 2048), ((2048,), 1, 768, 2048)),
    "tiny": (((24, 8, 8), 2, 48, 6), ((48,), 1, 48, 6)),
}


def drawn(weight: Weight, rank: int, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor, merge.Factors]]:
    projections, times, columns, count = weight
    rows, owners = sum(projections) * times, None
    if len(projections) > 1:
        owner = torch.arange(len(projections)).repeat_interleave(torch.tensor(projections)).repeat(times)
        owners = torch.nn.functional.one_hot(owner).to(device, dtype)
    random = partial(torch.randn, dtype=dtype, device=device)
    return [
        (random(rows, columns), merge.Factors(random(rows, rank), random(rank * len(projections), columns), owners, weight))
        for _ in range(count)
    ]


def in_buckets(given: Sequence[tuple[torch.Tensor, merge.Factors]]) -> list[list[tuple[torch.Tensor, merge.Factors]]]:
    buckets: list[list[tuple[torch.Tensor, merge.Factors]]] = [[]]
    for pair in given:
        if sum(weight.nbytes for weight, _ in buckets[-1]) + pair[0].nbytes > BUCKET_BYTES and buckets[-1]:
            buckets.append([])
        buckets[-1].append(pair)
    return buckets


def merge_all(buckets: Sequence[Sequence[tuple[torch.Tensor, merge.Factors]]]) -> None:
    for bucket in buckets:
        merge.merged([weight for weight, _ in bucket], [factors for _, factors in bucket], 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--shapes", default="7B, 28 layers", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiles", nargs="*", default=[], metavar="ROWSxCOLUMNSxWARPS")
    arguments = parser.parse_args()
    device, rounds = torch.device(arguments.device), arguments.rounds
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    kinds = [drawn(weight, arguments.rank, torch.bfloat16, device) for weight in SHAPES[arguments.shapes]]
    # Layer by layer.
    given = [pair for layer in zip(*kinds, strict=True) for pair in layer]
    weights, nbytes = [weight for weight, _ in given], sum(weight.nbytes for weight, _ in given)
    into = [torch.empty_like(weight) for weight in weights[: len(weights) // 4]]
    some = weights[: len(into)]
    floor_s = best_s(lambda: torch._foreach_copy_(into, some), device, rounds) * nbytes / sum(weight.nbytes for weight in some)
    print(f"copy of {nbytes / 1e6:,.0f} MB in {len(given)} weights: {floor_s * 1e3:.2f} ms, {nbytes / floor_s / 1e9:,.0f} GB/s")
    buckets = in_buckets(given)
    tiles: list[str | None] = [None, *arguments.tiles]
    for tile in tiles:
        if tile is not None:
            rows, columns, warps = map(int, tile.split("x"))
            kernel: Any = merge._kernel()
            kernel._HALF_TILE, kernel._NUM_WARPS = (rows, columns, kernel._HALF_TILE[2]), warps
        seconds = best_s(partial(merge_all, buckets), device, rounds)
        way = tile or ("the kernel" if merge._fuses(device) else "torch")
        print(f"merged, rank {arguments.rank}, {way}: {seconds * 1e3:.2f} ms, {seconds / floor_s:.2f} of the copy")


if __name__ == "__main__":
    main()
