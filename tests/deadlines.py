"""How long what a test waits for may take, on a machine that has other things to do. What takes longer hangs.

A claim about speed is counted in work, or measured by a bench; here are claims about what ends a wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# A busy machine takes so many times as long.
SLACK = 10
# After so many seconds a process that a test started hangs. No claim: it only ends the test before pytest's own limit does.
HANG_S = 800


@contextlib.contextmanager
def ended_by(deadline_s: float) -> Iterator[None]:
    """What the block waits for is ended by a deadline of so many seconds, at the latest."""
    begin_s = time.monotonic()
    yield
    took_s = time.monotonic() - begin_s
    assert took_s < SLACK * deadline_s, f"took {took_s:.1f} s, with a deadline of {deadline_s:g} s"


@contextlib.contextmanager
def ended_before(deadline_s: float) -> Iterator[None]:
    """What the block waits for is ended by something else than its deadline, which is ``SLACK`` times as long as that takes, or more."""
    begin_s = time.monotonic()
    yield
    took_s = time.monotonic() - begin_s
    assert took_s < deadline_s, f"took {took_s:.1f} s, which is the deadline of {deadline_s:g} s"
