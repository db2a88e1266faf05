"""Claims about the rule of what is verified."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlsync.plan.verification import SAMPLE_PERIOD, num_rounds, round_of, rounds_in


def is_verified(mode: str, number: int, turn: int) -> bool:
    """As both sides of a sync put the rule together."""
    return num_rounds(mode) > 0 and round_of(mode, number) in rounds_in(mode, turn)


@given(st.integers(2, 10**6), st.integers(0, 10**6))
def test_any_period_of_syncs_verifies_every_region_once(first_turn, number):
    turns = range(first_turn, first_turn + SAMPLE_PERIOD)
    assert sum(is_verified("sampled", number, turn) for turn in turns) == 1


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_the_first_sync_verifies_all_full_always_does_and_off_never(number, turn):
    assert is_verified("sampled", number, 1)
    assert is_verified("full", number, turn)
    assert not is_verified("off", number, turn)


def test_the_regions_of_one_sync_are_an_even_share():
    for turn in range(2, 40):
        assert sum(is_verified("sampled", number, turn) for number in range(100 * SAMPLE_PERIOD)) == 100
