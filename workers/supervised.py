"""The supervised step: the examples of text pairs, and the loss of their answers' tokens.

Pure torch; knows no Ray, no process group and no loader. SFT and the warm start of GRPO train by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rlsync.megatron.scores import TokenScores
from workers.sft_data import SftExample


def answered(prompt_ids: tuple[int, ...], answer_ids: tuple[int, ...], where: str = "an example") -> SftExample:
    """The example of a text prompt and its answer, whose tokens are the ones to be predicted."""
    mask = (False,) * len(prompt_ids) + (True,) * len(answer_ids)
    return SftExample(prompt_ids + answer_ids, (False, *mask[1:]), None, None, where)


def num_targets(examples: Sequence[SftExample]) -> int:
    """Tokens of the examples that are in the loss."""
    return sum(example.num_targets for example in examples)


@dataclass(frozen=True, slots=True)
class SupervisedObjective:
    """``TokenLoss`` of an optimizer step: the negative log-likelihood of the masked tokens.

    Attributes:
        num_tokens: masked tokens of the step over all microbatches and replicas.
        num_microbatches: of the step over all replicas, for the mean of the microbatches' means; None for the mean over ``num_tokens``.
    """

    num_tokens: int
    num_microbatches: int | None = None

    def __call__(self, scores: TokenScores, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss, and ``lm_loss``, its mean over the tokens in either case."""
        total = -(scores.log_probs * microbatch["mask"]).sum()
        mean = total / max(1, self.num_tokens)
        if self.num_microbatches is None:
            return mean, {"lm_loss": mean}
        return total / microbatch["mask"].sum().clamp(min=1) / self.num_microbatches, {"lm_loss": mean}
