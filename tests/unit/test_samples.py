"""Claims about how the samples of a step are split over updates, replicas and microbatches, and put into tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.errors import ConfigError
from workers.algorithms import group_advantages
from workers.samples import (
    Padding,
    ReplicaBatch,
    Sample,
    TokenBudget,
    collate,
    micro_batches_by_tokens,
    mini_batches,
    scoring_cuts,
    split_by_length,
    split_samples,
    with_advantages,
)


def sample(prompt: int, response: int, reward: float = 0.0, number: int = 0) -> Sample:
    """A sample with these numbers of tokens; its first token id is its number."""
    return Sample(
        prompt_ids=(number, *range(1, prompt)),
        response_ids=tuple(range(100, 100 + response)),
        engine_logprobs=tuple(-0.5 * (i + 1) for i in range(response)),
        finished=True,
        version=0,
        reward=reward,
    )


def numbers(share: ReplicaBatch) -> list[list[list[int]]]:
    return [[[s.prompt_ids[0] for s in micro] for micro in update] for update in share.updates]


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(LENGTHS, min_size=2, max_size=6), dp_size=st.sampled_from([1, 2, 4]), balance=st.booleans(),
    max_tokens=st.one_of(st.none(), st.integers(15, 40)), padding=st.sampled_from(["none", "each", "all"]), stages=st.sampled_from([1, 3]),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)  # fmt: skip
def test_every_sample_is_trained_on_once_whatever_the_deal(groups, dp_size, balance, max_tokens, padding, stages, seed) -> None:
    samples = [sample(p, r, number=i) for i, (p, r) in enumerate(pair for group in groups for pair in group)]
    batches = split_samples(
        samples, dp_size=dp_size, num_updates=1, micro_batch_size=3, balance=balance, shuffle_seed=seed,
        budget=None if max_tokens is None else TokenBudget(max_tokens, padding, stages),
    )  # fmt: skip
    dealt = Counter(n for share in batches for update in numbers(share) for micro in update for n in micro)
    assert dealt == Counter(range(len(samples)))
    # Replicas run in step: as many microbatches each, and the same divisors.
    assert len({len(update) for share in batches for update in share.updates}) == 1
    assert len({(share.num_tokens, share.num_sequences) for share in batches}) == 1
    assert batches[0].num_tokens == (sum(len(s.response_ids) for s in samples),)
    assert batches[0].num_sequences == (sum(1 for s in samples if s.response_ids),)
    if max_tokens is not None:
        updates = [update for share in batches for update in share.updates]
        assert all(n <= max_tokens for update in updates for n in positions([[s.length for s in micro] for micro in update], padding))
        assert all(len(update) % stages == 0 or -(-len(update) // stages) * stages > len(samples) // dp_size for update in updates)


def positions(batches: Sequence[Sequence[int]], padding: str) -> list[int]:
    """Positions of micro-batches with samples of these lengths."""
    if padding == "none":
        return [sum(lengths) for lengths in batches]
    longest = max(max(lengths) for lengths in batches)
    return [len(lengths) * (longest if padding == "all" else max(lengths)) for lengths in batches]


def test_the_deal_keeps_the_order_without_balance_and_shuffling() -> None:
    batches = split_samples([sample(2, 2, number=i) for i in range(16)], dp_size=2, num_updates=2, micro_batch_size=3)
    assert numbers(batches[0]) == [[[0, 1, 2], [3]], [[8, 9, 10], [11]]]
    assert numbers(batches[1]) == [[[4, 5, 6], [7]], [[12, 13, 14], [15]]]


def test_balance_evens_out_tokens() -> None:
    lengths = [40, 38, 36, 34, 2, 2, 2, 2]
    plain, balanced = (
        split_samples(
            [sample(1, n, number=i) for i, n in enumerate(lengths)], dp_size=2, num_updates=1, micro_batch_size=4, balance=balance
        )
        for balance in (False, True)
    )
    assert spread(plain) > 100 > 10 > spread(balanced)


def spread(batches: Sequence[ReplicaBatch]) -> int:
    tokens = [sum(s.length for s in share.samples) for share in batches]
    return max(tokens) - min(tokens)


def test_shuffling_depends_on_its_seed_alone() -> None:
    samples = [sample(2, 2, number=i) for i in range(16)]
    first, again, other = (
        numbers(split_samples(samples, dp_size=1, num_updates=2, micro_batch_size=8, shuffle_seed=seed)[0]) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first != numbers(split_samples(samples, dp_size=1, num_updates=2, micro_batch_size=8)[0]), "seed 0 shuffles too"


def test_a_share_can_be_cut_anew_in_the_order_of_its_updates() -> None:
    (share,) = split_samples([sample(2, 2, number=i) for i in range(8)], dp_size=1, num_updates=2, micro_batch_size=3, shuffle_seed=4)
    order = [s.prompt_ids[0] for s in share.samples]
    assert [n for update in numbers(share) for micro in update for n in micro] == order
    assert scoring_cuts([share], size=5) == [[[0, 1, 2, 3, 4], [5, 6, 7]]]
    assert scoring_cuts([share]) == [[[0, 1, 2], [3], [4, 5, 6], [7]]]


def test_replicas_score_in_as_many_microbatches_whose_tokens_are_bounded() -> None:
    """Passes of experts and gathered parameters are collective over replicas, and one has ten times the tokens of the other."""
    samples = [sample(2, 38 if i < 4 else 2, number=i) for i in range(8)]
    batches = split_samples(samples, dp_size=2, num_updates=1, micro_batch_size=1)
    long, short = scoring_cuts(batches, budget=TokenBudget(80, "none"))
    assert len(long) == len(short) == 2, "in place of four of one sample each"
    for batch, cuts in zip(batches, (long, short), strict=True):
        assert sorted(index for cut in cuts for index in cut) == list(range(4))
        assert all(sum(batch.samples[index].length for index in cut) <= 80 for cut in cuts)
    # Sorted by length for padding, and still indices of the samples as they lie.
    batches = split_samples([sample(2, n, number=n) for n in (1, 38, 2, 37, 3, 36, 4, 35)], dp_size=1, num_updates=1, micro_batch_size=1)
    assert scoring_cuts(batches, budget=TokenBudget(80, "each")) == [[[1, 3], [5, 7], [0, 2, 4, 6]]]


def test_collate_puts_scores_where_their_tokens_are() -> None:
    batch = collate([sample(2, 3, number=7), sample(4, 0, number=8), sample(1, 1, number=9)])
    assert batch["tokens"].tolist() == [[7, 1, 100, 101, 102], [8, 1, 2, 3, 0], [9, 100, 0, 0, 0]]
    assert batch["mask"].tolist() == [[False, False, True, True, True], [False] * 5, [False, True, False, False, False]]
    assert batch["engine_logprobs"].tolist() == [[0, 0, -0.5, -1.0, -1.5], [0] * 5, [0, -0.5, 0, 0, 0]]
    assert batch["advantages"].shape == (3, 1)


def test_whitening_weighs_a_response_by_its_tokens() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    samples = [sample(1, i + 1, reward=r) for i, r in enumerate(rewards.tolist())]
    whitened = with_advantages(samples, 4, normalize=True)
    tokens = torch.tensor([s.advantage for s in whitened for _ in s.response_ids], dtype=torch.float64)
    assert tokens.mean().abs() < 1e-6 and abs(tokens.std().item() - 1) < 1e-5
    plain = torch.tensor([s.advantage for s in with_advantages(samples, 4, normalize=False)])
    assert torch.equal(plain, group_advantages(rewards, 4))


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_no_advantage(normalize: bool) -> None:
    assert all(s.advantage == 0 for s in with_advantages([sample(1, 2, reward=1.0)] * 8, 4, normalize=normalize))


@pytest.mark.parametrize("rewards", [(1e8, 1e8 + 1), (1e39, 2e39)])
def test_rewards_that_float32_does_not_tell_apart_or_have_give_the_advantages_of_others(rewards: tuple[float, float]) -> None:
    found = with_advantages([sample(1, 2, reward=reward) for reward in rewards], 2, normalize=False)
    assert [s.advantage for s in found] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)


TOKEN_COUNTS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(TOKEN_COUNTS, st.integers(50, 200), st.integers(1, 3), st.sampled_from(["none", "each", "all"]))
def test_micro_batches_hold_every_sample_once_within_the_budget(lengths: list[int], most: int, minimum: int, padding: Padding) -> None:
    minimum, budget = min(minimum, len(lengths)), TokenBudget(most, padding)
    batches = micro_batches_by_tokens(lengths, budget, min_batches=minimum)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches) and max(positions([[lengths[i] for i in batch] for batch in batches], padding)) <= most
    assert len(batches) >= minimum
    assert batches == micro_batches_by_tokens(lengths, budget, min_batches=minimum)
    # As many as are asked, which another replica may need; else none would ever agree.
    more = min(len(batches) + 1, len(lengths))
    if padding != "none":
        assert len(micro_batches_by_tokens(lengths, budget, min_batches=more)) == more


def test_micro_batches_are_few_and_even() -> None:
    lengths = [8, 1, 7, 2, 6, 3, 5, 4]
    batches = micro_batches_by_tokens(lengths, TokenBudget(18, "none"))
    assert [sum(lengths[i] for i in batch) for batch in batches] == [18, 18]
    # 8 7 | 6 5 | 4 3 2 1 with each padded to its longest, where 18 positions would also bear 6 5 4.
    assert micro_batches_by_tokens(lengths, TokenBudget(18, "each")) == [[0, 2], [4, 6], [1, 3, 5, 7]]
    assert micro_batches_by_tokens(lengths, TokenBudget(18, "all")) == [[0, 2], [4, 6], [5, 7], [1, 3]]


def test_one_long_sequence_does_not_pad_many_short_ones_to_its_length() -> None:
    lengths = [4096, *[100] * 40]
    assert len(micro_batches_by_tokens(lengths, TokenBudget(8192, "none"))) == 1
    assert micro_batches_by_tokens(lengths, TokenBudget(8192, "each")) == [[0], list(range(1, 41))]
    assert len(micro_batches_by_tokens(lengths, TokenBudget(8192, "all"))) == 21


@pytest.mark.parametrize("padding", ["none", "each", "all"])
def test_micro_batch_count_is_a_multiple_where_the_schedule_wants_it_and_samples_are_enough(padding: Padding) -> None:
    assert len(micro_batches_by_tokens([5] * 8, TokenBudget(15, padding))) == 3
    assert len(micro_batches_by_tokens([5] * 8, TokenBudget(15, padding, 4))) == 4
    assert len(micro_batches_by_tokens([5] * 8, TokenBudget(15, padding, 4), min_batches=5)) == 8
    # The schedule fills up what no sample is there for.
    assert len(micro_batches_by_tokens([5] * 7, TokenBudget(5, padding, 4))) == 7


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 9], {}, "sample 1 has 9 tokens, more than runner.max_tokens_per_mbs"),
        ([3, 3], {"min_batches": 3}, "2 samples cannot fill 3 micro-batches"),
        ([], {}, "no samples"),
    ],
)
def test_impossible_budgets_are_refused(lengths: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        micro_batches_by_tokens(lengths, TokenBudget(8, "none"), **options)


def test_dealing_by_length_evens_tokens_and_keeps_counts_equal() -> None:
    lengths = [100, 1, 1, 1, 50, 49, 1, 1]
    hands = split_by_length(lengths, 2)
    assert sorted(i for hand in hands for i in hand) == list(range(8)) and {len(hand) for hand in hands} == {4}
    tokens = [sum(lengths[i] for i in hand) for hand in hands]
    assert max(tokens) - min(tokens) <= 2


def test_mini_batches_are_equal_parts_and_shuffled_only_by_the_seed() -> None:
    assert mini_batches(6, 2) == [[0, 1, 2], [3, 4, 5]]
    shuffled = mini_batches(60, 2, shuffle=True, seed=1)
    assert shuffled == mini_batches(60, 2, shuffle=True, seed=1) != mini_batches(60, 2, shuffle=True, seed=2)
    assert sorted(i for part in shuffled for i in part) == list(range(60))
    with pytest.raises(ConfigError, match="n_minibatches"):
        mini_batches(7, 2)
