"""Log-probabilities of samples that have ended while engines generate others (``algorithm.early_scoring_prompts``).

Samples of consecutive prompts are scored together, when the last of them has ended: what shares a micro-batch, and with it every digit,
does not depend on which engine was faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from workers.routes import RoutingCounts
from workers.samples import Sample

# Of some samples: theirs, in their order, and what each rank says of its routing.
Score = Callable[[Sequence[Sample]], tuple[list[Tensor], list[RoutingCounts | None]]]


class EarlyScores:
    """Early log-probabilities of the samples of one rollout.

    Attributes:
        counts: what ranks have said of their routing.
        seconds: of scoring.
    """

    def __init__(self, groups: Sequence[Sequence[Sample]], prompts_at_once: int, score: Score) -> None:
        """``groups``: of the samples of each prompt, which are there when ``ended`` names it."""
        self.counts: list[RoutingCounts | None] = []
        self.seconds = 0.0
        self._groups, self._score = groups, score
        self._found: dict[int, Sequence[Tensor | None]] = {}
        starts = range(0, len(groups), prompts_at_once) if prompts_at_once else ()
        self._left = {range(i, i + prompts_at_once): {*range(i, i + prompts_at_once)} for i in starts}

    def ended(self, numbers: Sequence[int]) -> None:
        """Score what is complete with the prompts of these numbers."""
        for part, left in self._left.items():
            if not left:
                continue
            left.difference_update(numbers)
            if not left:
                began_s = time.monotonic()
                scored, counts = self._score([sample for number in part for sample in self._groups[number]])
                self.seconds += time.monotonic() - began_s
                self.counts += counts
                found = iter(scored)
                self._found.update({number: [next(found) for _ in self._groups[number]] for number in part})

    def attached(self) -> tuple[Sample, ...]:
        """All samples, with their log-probabilities where they were scored."""
        return tuple(
            replace(sample, old_logprobs=scores)
            for number, group in enumerate(self._groups)
            for sample, scores in zip(group, self._found.get(number, [None] * len(group)), strict=True)
        )
