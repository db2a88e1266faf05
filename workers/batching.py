"""Dealing samples: mini-batches, micro-batches by token budget, ranks by length. Pure integers; deterministic."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlsync.errors import ConfigError


def mini_batches(num_samples: int, num_minibatches: int, *, shuffle: bool = False, seed: int = 0) -> list[list[int]]:
    """Indices of each mini-batch: equal parts, in order or shuffled by ``seed`` alone."""
    if num_samples % num_minibatches:
        raise ConfigError(f"{num_samples} samples cannot form algorithm.n_minibatches ({num_minibatches}) equal mini-batches")
    order = list(range(num_samples))
    if shuffle:
        random.Random(seed).shuffle(order)
    size = num_samples // num_minibatches
    return [order[start : start + size] for start in range(0, num_samples, size)]


def deal_by_length(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices for each data-parallel rank: equally many samples, token sums as even as a greedy deal makes them."""
    if len(lengths) % num_ranks:
        raise ConfigError(f"{len(lengths)} samples cannot be dealt evenly to {num_ranks} data-parallel ranks")
    room, tokens = len(lengths) // num_ranks, [0] * num_ranks
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in _longest_first(lengths):
        rank = min((r for r in range(num_ranks) if len(hands[r]) < room), key=lambda r: (tokens[r], r))
        hands[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(hand) for hand in hands]


def micro_batches_by_tokens(lengths: Sequence[int], max_tokens: int, *, min_batches: int = 1, multiple_of: int = 1) -> list[list[int]]:
    """Micro-batches whose token sums stay within ``max_tokens``, as few and as even as a greedy deal makes them.

    Args:
        lengths: tokens of each sample (prompt and response).
        min_batches: at least this many, e.g. the largest count over the data-parallel ranks, which must all agree.
        multiple_of: the count is a multiple of this, as interleaved pipeline schedules want (PP size).

    Returns:
        Sorted indices of each micro-batch; none is empty.

    Raises:
        ConfigError: one sample alone exceeds the budget, or there are too few samples for the asked count.
    """
    if not lengths:
        raise ConfigError("no samples to cut into micro-batches")
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[longest] > max_tokens:
        raise ConfigError(f"sample {longest} has {lengths[longest]} tokens, more than runner.max_tokens_per_mbs ({max_tokens})")
    count = max(min_batches, -(-sum(lengths) // max_tokens))
    while True:
        count = -(-count // multiple_of) * multiple_of
        if count > len(lengths):
            raise ConfigError(
                f"{len(lengths)} samples cannot fill {count} micro-batches (a multiple of {multiple_of}, at least {min_batches})"
            )
        batches = _spread(lengths, count)
        if max(sum(lengths[i] for i in batch) for batch in batches) <= max_tokens:
            return batches
        count += 1


def _spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Longest first, each to the batch with the fewest tokens; every batch gets one before any gets two."""
    tokens, batches = [0] * count, [[] for _ in range(count)]  # type: list[int], list[list[int]]
    for index in _longest_first(lengths):
        batch = min(range(count), key=lambda b: (bool(batches[b]), tokens[b], b))
        batches[batch].append(index)
        tokens[batch] += lengths[index]
    return [sorted(batch) for batch in batches]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
