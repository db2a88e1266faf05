"""Which regions of a sync are verified. A pure rule that both sides apply."""

from __future__ import annotations

from collections.abc import Sequence

OFF, SAMPLED, FULL = "off", "sampled", "full"
# ``sampled`` verifies every region in the first sync of a connection, in each that follows one that did not commit, and at least once in
# this many consecutive ones.
SAMPLE_PERIOD = 16


def num_rounds(mode: str) -> int:
    """Number of rounds that the regions of a destination are divided into; the regions of a round are verified in the same syncs."""
    return {OFF: 0, SAMPLED: SAMPLE_PERIOD, FULL: 1}[mode]


def round_of(mode: str, number: int) -> int:
    """The round that region ``number`` of a destination is in."""
    return number % num_rounds(mode)


def rounds_in(mode: str, turn: int) -> Sequence[int]:
    """Rounds that are verified in a turn, which count from 1: all in turn 1, and with ``sampled`` one in each other turn."""
    return (turn % SAMPLE_PERIOD,) if mode == SAMPLED and turn != 1 else range(num_rounds(mode))


def turn_of(attempt: int, *, verifies_all: bool) -> int:
    """The turn of the ``attempt``-th sync of a connection. ``verifies_all``: the one before did not commit."""
    return 1 if verifies_all else attempt
