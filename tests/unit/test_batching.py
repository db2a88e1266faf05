"""Claims about dealing samples: every sample once, within budget, even, and the same every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsync.errors import ConfigError
from workers.samples import micro_batches_by_tokens, mini_batches, split_by_length

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(50, 200), st.integers(1, 3))
def test_micro_batches_hold_every_sample_once_within_the_budget(lengths: list[int], max_tokens: int, minimum: int) -> None:
    minimum = min(minimum, len(lengths))
    batches = micro_batches_by_tokens(lengths, max_tokens, min_batches=minimum)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batch and sum(lengths[i] for i in batch) <= max_tokens for batch in batches)
    assert len(batches) >= minimum
    assert batches == micro_batches_by_tokens(lengths, max_tokens, min_batches=minimum)


def test_micro_batches_are_few_and_even() -> None:
    batches = micro_batches_by_tokens([8, 1, 7, 2, 6, 3, 5, 4], 18)
    assert [sum([8, 1, 7, 2, 6, 3, 5, 4][i] for i in batch) for batch in batches] == [18, 18]


def test_micro_batch_count_is_a_multiple_where_the_schedule_wants_it() -> None:
    assert len(micro_batches_by_tokens([5] * 8, 15, multiple_of=4)) == 4


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3, 9], {"max_tokens": 8}, "sample 1 has 9 tokens, more than runner.max_tokens_per_mbs"),
        ([3, 3], {"max_tokens": 8, "min_batches": 3}, "2 samples cannot fill 3 micro-batches"),
        ([], {"max_tokens": 8}, "no samples"),
    ],
)
def test_impossible_budgets_are_refused(lengths: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        micro_batches_by_tokens(lengths, **options)


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
