"""Which regions of a sync are verified. A pure rule that both sides apply."""

from __future__ import annotations

OFF, SAMPLED, FULL = MODES = ("off", "sampled", "full")
# ``sampled`` verifies every region in the first sync of a connection and at least once in this many consecutive ones.
SAMPLE_PERIOD = 16


def round_of(mode: str, turn: int) -> int:
    """Syncs with the same number verify the same regions: -1 stands for all of them."""
    return -1 if mode == FULL or (mode == SAMPLED and turn == 1) else turn % SAMPLE_PERIOD


def is_verified(mode: str, number: int, turn: int) -> bool:
    """Whether region ``number`` of a stream is verified in the ``turn``-th sync of a connection, counted from 1."""
    return mode == FULL or (mode == SAMPLED and (turn == 1 or number % SAMPLE_PERIOD == turn % SAMPLE_PERIOD))
