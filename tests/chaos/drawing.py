"""What a seed stands for: an endless sequence of faults, each with everything that is left to chance in it. Pure.

Every fault comes in every phase before one comes twice. Draw ``k`` of a seed is the same however many are used, so that it can be repeated
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.chaos.faults import FAULTS, Fault
from tests.chaos.tap import Moment


@dataclass(frozen=True, slots=True)
class Draw:
    """One fault to cause.

    Attributes:
        moment: when in its phase, or None where the fault is there from the start.
        engine, worker: whom it hits, as fractions of those that there are.
        settings: of the connection, where one is made.
        reuses_connection, syncs_before: whether a connection that is there is kept, and whether it has a sync behind it.
        heals_by_sync: whether the next sync goes over the same connection, where that can be.
        heals_to_other: whether it brings the weights of the sync that failed, and not those from before.
        revives_after: when what was stopped goes on, in deadlines after the actor gave up.
    """

    number: int
    fault: Fault
    phase: str
    moment: Moment | None
    engine: float
    worker: float
    settings: dict[str, Any]
    reuses_connection: bool
    syncs_before: bool
    heals_by_sync: bool
    heals_to_other: bool
    revives_after: float

    def __str__(self) -> str:
        return f"{self.fault.name}, {self.moment or self.phase}"


def draws(seed: int) -> Iterator[Draw]:
    """All draws of a seed, from number 0 on."""
    pairs = [(fault, phase) for fault in FAULTS for phase in fault.phases]
    number = 0
    while True:
        order = list(pairs)
        Random(f"{seed} from {number}").shuffle(order)
        for fault, phase in order:
            yield _draw(number, fault, phase, Random(f"{seed} {number}"))
            number += 1


def _draw(number: int, fault: Fault, phase: str, rng: Random) -> Draw:
    moments = fault.moments_in(phase)
    return Draw(
        number=number,
        fault=fault,
        phase=phase,
        moment=rng.choice(moments) if moments else None,
        engine=rng.random(),
        worker=rng.random(),
        settings={
            "bucket_bytes": rng.choice((60_000, 100_000, 250_000)),
            "num_slots": rng.choice((1, 2, 3)),
            "verify": "full",
            "sink": rng.choice(("auto", "auto", "loaders")),
            "transport": rng.choice(("shm", "shm", "gloo")),
            "pause_mode": rng.choice(("abort", "wait", "keep")),
        },
        reuses_connection=rng.random() < 0.5,
        syncs_before=fault.untouched or rng.random() < 0.3,
        heals_by_sync=rng.random() < 0.5,
        heals_to_other=rng.random() < 0.7,
        revives_after=rng.choice((0.0, 0.0, 0.1, 0.5, 1.5)),
    )
