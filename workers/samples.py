"""Samples of a step and their split: into optimizer updates, over data-parallel replicas, into microbatches.

Pure torch and integers; knows no Ray and no Megatron.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from rlsync.errors import ConfigError
from workers.algorithms import group_advantages, moments, whiten

PAD_ID = 0  # never read: padded positions are masked

# Of the micro-batches of a pass. "none": their sequences are packed, and a micro-batch has the positions of its tokens. "each": rows are
# padded to the longest of their micro-batch. "all": all micro-batches are padded to one shape, as pipelines of fixed shapes need.
Padding = Literal["none", "each", "all"]


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """What bounds a micro-batch: it has at most ``max_positions`` positions, padded ones among them as ``padding`` says, before lengths
    are rounded up to what tensor and context ranks can divide.

    The number of them in a pass is a multiple of ``multiple_of`` where there are samples enough: a pipeline of virtual stages takes
    multiples of its ranks alone, and would pass the last micro-batch again for each that is missing.
    """

    max_positions: int
    padding: Padding
    multiple_of: int = 1


class TokenRow(Protocol):
    """A sequence that passes through the actor, neither padded nor shifted.

    Attributes:
        loss_mask: for each token, whether the loss reads it.
        pixel_values: (patches, patch size) float32 of all pictures in their order; None without pictures.
        image_grid_thw: (pictures, 3) int64, each picture's patches in time, height and width; None without pictures.
    """

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def loss_mask(self) -> tuple[bool, ...]: ...

    @property
    def pixel_values(self) -> Tensor | None: ...

    @property
    def image_grid_thw(self) -> Tensor | None: ...


def stacked(rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """Right-padded tensors of a microbatch: ``tokens`` (B, S) int64 and their ``lengths`` (B,) int64, ``mask`` (B, S) bool at tokens that
    the loss reads, and for rows with pictures ``pixel_values`` and ``image_grid_thw`` of all of them, in the order of rows."""
    longest = max(len(row.token_ids) for row in rows)
    tokens = torch.full((len(rows), longest), PAD_ID, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row.token_ids)
        tokens[i, :length] = torch.tensor(row.token_ids)
        mask[i, :length] = torch.tensor(row.loss_mask)
    batch = {"tokens": tokens, "lengths": torch.tensor([len(row.token_ids) for row in rows]), "mask": mask}
    pictures = [(r.pixel_values, r.image_grid_thw) for r in rows if r.pixel_values is not None and r.image_grid_thw is not None]
    if pictures:
        batch["pixel_values"] = torch.cat([values for values, _ in pictures])
        batch["image_grid_thw"] = torch.cat([grid for _, grid in pictures])
    return batch


@dataclass(frozen=True, slots=True)
class Sample:
    """One response to one prompt: a ``TokenRow``.

    Attributes:
        prompt_ids, response_ids: token ids; the response holds its end-of-sequence token if it ended by itself. A picture's placeholder
            stands in the prompt as often as the actor has features of the picture.
        engine_logprobs: log-probability of each response token as the engine sampled it; empty where it was not asked.
        reward: scaled reward of the response.
        advantage: of the whole response; the same for each of its tokens.
        finished: ended by itself rather than by its length limit.
        version: of the weights that produced it.
        old_logprobs: of its tokens by the actor that trains on it, (length,) float32; None where it has not been scored.
        routes: experts that its tokens went to in the engine, as ``engine_routes`` returns them; None where it was not asked.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    engine_logprobs: tuple[float, ...]
    finished: bool
    version: int | None
    reward: float = 0.0
    advantage: float = 0.0
    old_logprobs: Tensor | None = field(default=None, compare=False, repr=False)
    routes: Tensor | None = field(default=None, compare=False, repr=False)
    pixel_values: Tensor | None = field(default=None, compare=False, repr=False)
    image_grid_thw: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids

    @property
    def loss_mask(self) -> tuple[bool, ...]:
        return (False,) * len(self.prompt_ids) + (True,) * len(self.response_ids)


Microbatches = tuple[tuple[Sample, ...], ...]


@dataclass(frozen=True, slots=True)
class ReplicaBatch:
    """The samples of one step that one data-parallel replica trains on.

    Attributes:
        updates: for each optimizer update, its microbatches.
        num_tokens, num_sequences: of each update over *all* replicas: what losses are divided by.
    """

    updates: tuple[Microbatches, ...]
    num_tokens: tuple[int, ...]
    num_sequences: tuple[int, ...]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples, in the order in which the updates see them."""
        return tuple(sample for update in self.updates for micro in update for sample in micro)


def with_advantages(samples: Sequence[Sample], group_size: int, *, normalize: bool) -> list[Sample]:
    """Group-relative advantages, whitened over all response tokens of the step where asked. Groups lie next to each other."""
    # A function's rewards may be large and differ by little, or be larger than float32 has them.
    advantages = group_advantages(torch.tensor([s.reward for s in samples], dtype=torch.float64), group_size)
    if normalize:
        # A response's tokens share its advantage, so its length is its weight.
        tokens = torch.tensor([len(s.response_ids) for s in samples], dtype=torch.float64)
        values = torch.repeat_interleave(advantages, tokens.long())
        ones = torch.ones_like(values)
        advantages = whiten(advantages, torch.ones_like(advantages), moments(values, ones))
    return [replace(sample, advantage=float(a)) for sample, a in zip(samples, advantages, strict=True)]


def split_samples(
    samples: Sequence[Sample],
    *,
    dp_size: int,
    num_updates: int,
    micro_batch_size: int,
    budget: TokenBudget | None = None,
    balance: bool = False,
    shuffle_seed: int | None = None,
) -> list[ReplicaBatch]:
    """The samples of a step split over updates, replicas and microbatches; one batch for each data-parallel replica.

    Args:
        num_updates: optimizer updates of the step; samples are cut into as many equal mini-batches.
        micro_batch_size: samples in a microbatch, unless ``budget`` bounds its positions instead.
        balance: split by length, so that replicas get about the same number of tokens.
        shuffle_seed: shuffle the samples over the mini-batches; None keeps their order.
    """
    batches = mini_batches(len(samples), num_updates, shuffle=shuffle_seed is not None, seed=0 if shuffle_seed is None else shuffle_seed)
    updates: list[list[Microbatches]] = [[] for _ in range(dp_size)]
    for batch in batches:
        lengths = [samples[i].length for i in batch]
        hands = split_by_length(lengths, dp_size) if balance else _in_order(len(batch), dp_size)
        cuts = _cut([[lengths[i] for i in hand] for hand in hands], micro_batch_size, budget)
        for replica, (hand, cut) in enumerate(zip(hands, cuts, strict=True)):
            updates[replica].append(tuple(tuple(samples[batch[hand[i]]] for i in micro) for micro in cut))
    num_tokens = tuple(sum(len(samples[i].response_ids) for i in batch) for batch in batches)
    num_sequences = tuple(sum(1 for i in batch if samples[i].response_ids) for batch in batches)
    return [ReplicaBatch(tuple(mine), num_tokens, num_sequences) for mine in updates]


def scoring_cuts(batches: Sequence[ReplicaBatch], *, size: int | None = None, budget: TokenBudget | None = None) -> list[list[list[int]]]:
    """Microbatches of each replica when its samples are scored, as indices of its ``samples``; as many on every replica.

    Args:
        size: samples in a microbatch, where ``budget`` is None; None for the microbatches of the updates.
        budget: of a microbatch. Scoring keeps nothing for a backward pass, and bears a larger one than training.
    """
    if size is None and budget is None:
        return [_following(len(micro) for update in batch.updates for micro in update) for batch in batches]
    return _cut([[sample.length for sample in batch.samples] for batch in batches], size or 1, budget)


def _following(sizes: Iterable[int]) -> list[list[int]]:
    """Runs of indices of these sizes."""
    ends = list(accumulate(sizes, initial=0))
    return [list(range(*pair)) for pair in pairwise(ends)]


def aligned(samples: Sequence[Sample], batches: Sequence[ReplicaBatch], found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What was found of each sample, in the order of ``samples``, from what each replica found of its batch's."""
    by_sample = {id(s): value for batch, values in zip(batches, found, strict=True) for s, value in zip(batch.samples, values, strict=True)}
    return [by_sample[id(sample)] for sample in samples]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """``stacked`` samples, whose ``mask`` is at response tokens, with ``advantages`` (B, 1) and ``engine_logprobs`` (B, S) float32,
    aligned with the tokens they are about."""
    batch = stacked(samples)
    logprobs = torch.zeros(batch["tokens"].shape)
    for row, sample in enumerate(samples):
        if sample.engine_logprobs:
            logprobs[row, len(sample.prompt_ids) : sample.length] = torch.tensor(sample.engine_logprobs)
    return {**batch, "engine_logprobs": logprobs, "advantages": torch.tensor([[s.advantage] for s in samples])}


def _in_order(count: int, dp_size: int) -> list[list[int]]:
    assert count % dp_size == 0, "validate_world refuses it"
    size = count // dp_size
    return [list(range(rank * size, (rank + 1) * size)) for rank in range(dp_size)]


def _cut(lengths: list[list[int]], micro_batch_size: int, budget: TokenBudget | None) -> list[list[list[int]]]:
    """Microbatches of each replica, the same number on all replicas, whose passes are collective."""
    if budget is None:
        return [
            [list(range(i, min(i + micro_batch_size, len(mine)))) for i in range(0, len(mine), micro_batch_size)]
            for mine in lengths
        ]  # fmt: skip
    count = 1
    while True:
        cuts = [micro_batches_by_tokens(mine, budget, min_batches=count) for mine in lengths]
        most = max(map(len, cuts))
        if all(len(cut) == most for cut in cuts):
            return cuts
        count = most


def mini_batches(num_samples: int, num_minibatches: int, *, shuffle: bool = False, seed: int = 0) -> list[list[int]]:
    """Indices of each mini-batch: equal parts, in order or shuffled by ``seed`` alone."""
    if num_samples % num_minibatches:
        raise ConfigError(f"{num_samples} samples cannot form algorithm.n_minibatches ({num_minibatches}) equal mini-batches")
    order = list(range(num_samples))
    if shuffle:
        random.Random(seed).shuffle(order)
    size = num_samples // num_minibatches
    return [order[start : start + size] for start in range(0, num_samples, size)]


def split_by_length(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices for each data-parallel rank: equally many samples, token sums as even as a greedy split makes them."""
    if len(lengths) % num_ranks:
        raise ConfigError(f"{len(lengths)} samples cannot be split evenly over {num_ranks} data-parallel ranks")
    room, tokens = len(lengths) // num_ranks, [0] * num_ranks
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for index in _longest_first(lengths):
        rank = min((r for r in range(num_ranks) if len(hands[r]) < room), key=lambda r: (tokens[r], r))
        hands[rank].append(index)
        tokens[rank] += lengths[index]
    return [sorted(hand) for hand in hands]


def micro_batches_by_tokens(lengths: Sequence[int], budget: TokenBudget, *, min_batches: int = 1) -> list[list[int]]:
    """Micro-batches whose positions stay within ``budget``, few and even: with padding as few as there can be, of sequences of like
    length; without as few and as even as a greedy split makes them.

    Args:
        lengths: tokens of each sample (prompt and response).
        min_batches: at least this many, e.g. the largest count over the data-parallel ranks, which must all agree.

    Returns:
        Sorted indices of each micro-batch; none is empty.

    Raises:
        ConfigError: one sample alone exceeds the budget, or there are too few samples for the asked count.
    """
    if not lengths:
        raise ConfigError("no samples to cut into micro-batches")
    longest, most = max(range(len(lengths)), key=lambda i: lengths[i]), budget.max_positions
    if lengths[longest] > most:
        raise ConfigError(f"sample {longest} has {lengths[longest]} tokens, more than runner.max_tokens_per_mbs ({most})")
    # With padding the fewest that there can be; without, fewer than can be found perhaps.
    fewest = -(-sum(lengths) // most) if budget.padding == "none" else len(_padded_runs(lengths, most, budget.padding))
    count = max(min_batches, fewest)
    while True:
        if count > len(lengths):
            raise ConfigError(f"{len(lengths)} samples cannot fill {count} micro-batches (at least {min_batches})")
        rounded = -(-count // budget.multiple_of) * budget.multiple_of
        count = rounded if rounded <= len(lengths) else count
        if budget.padding != "none":
            return _even_runs(lengths, most, count, budget.padding)
        batches = _spread(lengths, count)
        if max(sum(lengths[i] for i in batch) for batch in batches) <= most:
            return batches
        count += 1


def _padded_runs(lengths: Sequence[int], most: int, padding: Padding) -> list[list[int]]:
    """Longest first, the fewest runs whose rows times their longest, or the longest of all, are at most ``most``."""
    order, runs = _longest_first(lengths), []  # type: list[int], list[list[int]]
    while order:
        rows = most // lengths[order[0]] if padding == "each" or not runs else len(runs[0])
        runs.append(order[:rows])
        order = order[rows:]
    return runs


def _even_runs(lengths: Sequence[int], most: int, count: int, padding: Padding) -> list[list[int]]:
    """``count`` runs of ``_padded_runs``, at least as many as ``most`` makes, whose largest has as few positions as can be."""
    low, high = max(lengths), most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_padded_runs(lengths, middle, padding)) <= count else (middle + 1, high)
    runs = _padded_runs(lengths, low, padding)
    while len(runs) < count:
        # No bound gives this number: one more run from the one with most positions.
        largest = max((run for run in runs if len(run) > 1), key=lambda run: len(run) * lengths[run[0]])
        at, half = runs.index(largest), len(largest) // 2
        runs[at : at + 1] = [largest[:half], largest[half:]]
    return [sorted(run) for run in runs]


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
