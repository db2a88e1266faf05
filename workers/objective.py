"""The GRPO loss of one optimizer update as Megatron's passes want it, and the metrics that come out of an update.

Owns the bridge between ``algorithms`` (arithmetic) and ``rlsync.megatron.train`` (passes). Knows no configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from rlsync.megatron.scores import TokenScores
from rlsync.megatron.train import StepResult
from workers.algorithms import PolicyLossOptions, policy_loss


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """``TokenLoss`` of one optimizer update.

    Attributes:
        denominator: response tokens or sequences of the update over all replicas, as ``loss_agg_func`` divides.
        report_entropy: compute the entropy also where it has no weight.
    """

    options: PolicyLossOptions
    denominator: int
    report_entropy: bool

    def __call__(self, scores: TokenScores, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        wants_entropy = self.report_entropy or self.options.entropy_bonus != 0
        loss = policy_loss(
            scores.log_probs,
            microbatch["old_logprobs"],
            microbatch["advantages"],
            microbatch["mask"],
            self.options,
            reference_logprobs=microbatch.get("reference_logprobs"),
            entropy=scores.entropy if wants_entropy else None,
        )
        sums = {f"{name}|{part}": pair[i] for name, pair in loss.sums.terms.items() for i, part in enumerate(("sum", "count"))}
        return loss.numerator / max(1, self.denominator), sums


def update_metrics(result: StepResult) -> dict[str, float]:
    """Metrics of an optimizer update, named as under ``actor/training/``; nan where a skipped update has no number."""
    names = sorted({name.split("|")[0] for name in result.metrics if "|" in name})
    counts = {name: result.metrics[f"{name}|count"] for name in names}
    quotients = {name: result.metrics[f"{name}|sum"] / counts[name] if counts[name] else 0.0 for name in names}
    return {
        **{f"actor/{name}": value for name, value in quotients.items()},
        "actor/grad_norm": math.nan if result.grad_norm is None else result.grad_norm,
        "actor/num_zeros_in_grad": math.nan if result.num_zeros_in_grad is None else result.num_zeros_in_grad,
        "actor/lr": result.learning_rate,
        "actor/loss_scale": result.loss_scale,
        "actor/update_success": float(not result.skipped),
    }
