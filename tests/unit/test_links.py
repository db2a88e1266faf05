"""Claims about what a plan moves: into how many steps messages are cut."""

from __future__ import annotations

import pytest

from rlsync.plan.links import MOST_STEP_BYTES, Traffic, num_steps

MIB = 2**20


@pytest.mark.parametrize(
    ("given", "taken", "bucket_bytes", "expected"),
    [
        ([100 * MIB, 100 * MIB], [200 * MIB], 50 * MIB, 4),
        ([200 * MIB], [100 * MIB, 100 * MIB], 50 * MIB, 4),
        # Larger steps take memory at both ends and no less time.
        ([3 * MOST_STEP_BYTES], [3 * MOST_STEP_BYTES], 2**40, 3),
        ([3 * MOST_STEP_BYTES + 1], [3 * MOST_STEP_BYTES], MOST_STEP_BYTES + 1, 4),
        ([0], [0], 1, 1),
    ],
)
def test_nobody_gives_or_takes_more_than_a_bucket_or_the_largest_step(given, taken, bucket_bytes, expected):
    moved = Traffic({}, dict(enumerate(given)), dict(enumerate(taken)), {})
    assert num_steps(moved, bucket_bytes) == expected
