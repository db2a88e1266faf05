"""GRPO's arithmetic: advantages, the clipped policy loss, KL, entropy, and their exact aggregation.

Torch only: no Megatron, no process group, no configuration. Token tensors have shape (B, T): B samples, T response
positions, float32; masks are bool or 0/1 of the same shape, 1 at the tokens the policy generated (end-of-sequence
included).

A loss over a mini-batch is a quotient of two sums. Both are computed per micro-batch and per data-parallel rank and
may be added in any grouping, so the result does not depend on how the samples were split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossAggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
KlPenalty = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]

_ADVANTAGE_EPS = 1e-6
_WHITEN_EPS = 1e-8
# Bounds that keep exp() finite where the policies differ wildly; inside them they change nothing.
_LOG_RATIO_LIMIT = 20.0
_K3_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class PolicyLossOptions:
    """The ``algorithm`` keys of the same names; ``clip_ratio_low`` / ``high`` already resolved to numbers."""

    loss_agg_func: LossAggregation = "token-mean"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None
    clip_log_ratio_min: float | None = None
    clip_log_ratio_max: float | None = None
    early_stop_imp_ratio: float | None = None
    kl_beta: float = 0.0
    kl_penalty_type: KlPenalty = "low_var_kl"
    entropy_bonus: float = 0.0


@dataclass(frozen=True, slots=True)
class Sums:
    """Named quotients as (numerator, denominator) pairs: add freely, divide once.

    ``terms`` maps a metric name to a float64 tensor of shape (2,) on any device, detached.
    """

    terms: Mapping[str, Tensor]

    @staticmethod
    def of(**pairs: tuple[Tensor, Tensor]) -> Sums:
        """Sums of named (numerator, denominator) pairs of scalars, on the device that they are on: nothing waits for a GPU."""
        values = torch.stack([value.detach().double() for pair in pairs.values() for value in pair])
        return Sums(dict(zip(pairs, values.view(-1, 2), strict=True)))

    def means(self) -> dict[str, float]:
        """Each quotient; 0.0 where nothing was counted."""
        return {name: (pair[0] / pair[1]).item() if pair[1] != 0 else 0.0 for name, pair in self.terms.items()}


@dataclass(frozen=True, slots=True)
class MicroBatchLoss:
    """Loss of one micro-batch.

    Attributes:
        numerator: scalar with gradient. Backpropagate ``numerator / denominator`` of the *whole* mini-batch (see
            ``aggregation_denominator``); times the data-parallel size where gradients are averaged over ranks.
        sums: the metrics ``actor/training/actor/*``.
    """

    numerator: Tensor
    sums: Sums


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Group-relative advantages: (reward - mean) / (std + 1e-6) within each prompt's responses.

    Source: DeepSeekMath (arXiv:2402.03300), section 4.1.2, outcome supervision. The standard deviation is the
    unbiased one; a group with equal rewards gets exactly 0.

    Args:
        rewards: (B,), the ``group_size`` responses of a prompt next to each other.

    Returns:
        (B,) float32.
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards cannot form groups of {group_size}; groups need at least 2 members each")
    groups = rewards.double().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    advantages = torch.where(equal, 0.0, centred / (groups.std(dim=1, keepdim=True) + _ADVANTAGE_EPS))
    return advantages.view(-1).float()


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """Float64 (3,): count, sum and sum of squares of the masked values. Additive over ranks."""
    weights, values = mask.double(), values.double()
    return torch.stack((weights.sum(), (values * weights).sum(), (values.square() * weights).sum()))


def whiten(values: Tensor, mask: Tensor, totals: Tensor) -> Tensor:
    """(values - mean) / std over all valid tokens whose ``moments`` add up to ``totals``; 0 outside the mask.

    The variance is the unbiased one; with fewer than two tokens the values are only centred.
    """
    count, total, squares = totals.double().unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    scale = torch.where(count > 1, torch.rsqrt(variance + _WHITEN_EPS), torch.ones_like(variance))
    return ((values.double() - mean) * scale * mask.double()).float()


def correct_importance(advantages: Tensor, recomputed_logprobs: Tensor, rollout_logprobs: Tensor, clip: float) -> Tensor:
    """Advantages times min(exp(recomputed - engine log-probability), clip): samples came from the engine's policy.

    Source: truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training". Shapes (B, T); advantages may be (B, 1).
    """
    return advantages * torch.exp((recomputed_logprobs - rollout_logprobs).clamp(max=_LOG_RATIO_LIMIT)).clamp(max=clip)


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, kind: KlPenalty) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled token's log-probabilities. Shape as given.

    Source: Schulman 2020, "Approximating KL divergence": k1 ``-log r``, k2 ``(log r)^2 / 2``, k3 ``r - 1 - log r``
    with r = reference / policy; ``abs`` is ``|log r|``. k3 is clamped to [-10, 10].
    """
    difference = logprobs - reference_logprobs
    if kind in ("kl", "k1"):
        return difference
    if kind == "abs":
        return difference.abs()
    if kind in ("mse", "k2"):
        return 0.5 * difference.square()
    if kind in ("low_var_kl", "k3"):
        log_r = (-difference).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        return (log_r.exp() - 1 - log_r).clamp(-_K3_LIMIT, _K3_LIMIT)
    raise ValueError(f"kl_penalty_type {kind!r}: known are kl, k1, abs, mse, k2, low_var_kl, k3")


def aggregation_numerator(token_values: Tensor, mask: Tensor, how: LossAggregation) -> Tensor:
    """Scalar sum whose quotient with the summed ``aggregation_denominator`` is the aggregated value.

    token-mean: mean over all valid tokens (DAPO, arXiv:2503.14476). seq-mean-token-sum: mean over samples of token
    sums (Dr. GRPO, arXiv:2503.20783). seq-mean-token-mean: mean over samples of token means (DeepSeekMath).
    """
    weights = mask.to(token_values.dtype)
    # where, not a product: a value outside the mask may be inf or nan.
    per_sample = torch.where(mask.bool(), token_values, 0.0).sum(dim=1)
    if how == "seq-mean-token-mean":
        per_sample = per_sample / weights.sum(dim=1).clamp(min=1)
    elif how not in ("token-mean", "seq-mean-token-sum"):
        raise ValueError(f"loss_agg_func {how!r}: known are token-mean, seq-mean-token-sum, seq-mean-token-mean")
    return per_sample.sum()


def aggregation_denominator(mask: Tensor, how: LossAggregation) -> Tensor:
    """Scalar: valid tokens, or samples with at least one valid token. Additive; known before any forward."""
    return mask.sum() if how == "token-mean" else mask.bool().any(dim=1).sum()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: PolicyLossOptions,
    *,
    reference_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> MicroBatchLoss:
    """The GRPO loss of one micro-batch: clipped policy loss + kl_beta * KL - entropy_bonus * entropy.

    Source: PPO's clipped surrogate (arXiv:1707.06347) with asymmetric bounds (DAPO) and the dual clip for negative
    advantages (arXiv:1912.09729); KL and group advantages as in DeepSeekMath.

    Args:
        logprobs: (B, T) of the policy, with gradient.
        old_logprobs: (B, T) of the policy that is improved upon.
        advantages: (B, T) or (B, 1).
        mask: (B, T).
        reference_logprobs: (B, T); required when ``options.kl_beta`` is not 0.
        entropy: (B, T) of the policy's token distributions; required when ``options.entropy_bonus`` is not 0.
    """
    if options.kl_beta != 0 and reference_logprobs is None:
        raise ValueError("kl_beta is not 0: reference_logprobs are required")
    if options.entropy_bonus != 0 and entropy is None:
        raise ValueError("entropy_bonus is not 0: entropy is required")
    mask = mask.bool()

    def valid(values: Tensor) -> Tensor:
        # Before anything else: a nan outside the mask would come back as a nan gradient.
        return torch.where(mask, values, 0.0)

    logprobs, old_logprobs, advantages = valid(logprobs), valid(old_logprobs), valid(advantages)
    ratio = _ratio(logprobs, old_logprobs, options)
    clipped = ratio.clamp(1 - options.clip_ratio_low, 1 + options.clip_ratio_high)
    token_loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    dual = torch.zeros_like(mask)
    if options.clip_ratio_c is not None:
        bound = -advantages * options.clip_ratio_c
        dual = (advantages < 0) & (token_loss > bound) & mask
        token_loss = torch.where(dual, bound, token_loss)

    def sum_of(values: Tensor) -> Tensor:
        return aggregation_numerator(values, mask, options.loss_agg_func)

    numerator = sum_of(token_loss)
    terms = {"policy_loss": numerator}
    if entropy is not None:
        terms["entropy_loss"] = sum_of(valid(entropy))
        numerator = numerator - options.entropy_bonus * terms["entropy_loss"]
    if reference_logprobs is not None:
        terms["kl_loss"] = sum_of(kl_penalty(logprobs, valid(reference_logprobs), options.kl_penalty_type))
        numerator = numerator + options.kl_beta * terms["kl_loss"]
    stopped = _exceeds(ratio, mask, options.early_stop_imp_ratio)
    # A choice of the device: a host that asked for it would wait. Every rank runs the same backward pass in either case.
    numerator = torch.where(stopped, 0.0, numerator)
    denominator = aggregation_denominator(mask, options.loss_agg_func)
    quotients = {name: (value, denominator) for name, value in {**terms, "final_loss": numerator}.items()}
    log_ratio = (logprobs - old_logprobs).detach()
    metrics = _token_metrics(ratio.detach(), clipped.detach(), dual, token_loss.detach(), log_ratio, mask)
    stops = {"early_stopped": (stopped, torch.ones_like(numerator))}
    return MicroBatchLoss(numerator=numerator, sums=Sums.of(**quotients, **metrics, **stops))


def _ratio(logprobs: Tensor, old_logprobs: Tensor, options: PolicyLossOptions) -> Tensor:
    """(B, T): exp of the (clamped) log ratio."""
    log_ratio = (logprobs - old_logprobs).clamp(-_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    if options.clip_log_ratio_min is not None or options.clip_log_ratio_max is not None:
        log_ratio = log_ratio.clamp(min=options.clip_log_ratio_min, max=options.clip_log_ratio_max)
    return log_ratio.exp()


def _exceeds(ratio: Tensor, mask: Tensor, limit: float | None) -> Tensor:
    """Whether the mean ratio over the micro-batch's valid tokens is above the limit: a scalar bool on their device."""
    if limit is None:
        return mask.new_zeros(())
    return torch.where(mask, ratio.detach(), 0.0).sum() > limit * mask.sum()


def _token_metrics(
    ratio: Tensor, clipped: Tensor, dual: Tensor, token_loss: Tensor, log_ratio: Tensor, mask: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means over valid tokens. ``ratio_abs`` is |ratio - 1|; ``approx_kl`` is k1 of old to new policy."""
    values = {
        "policy_loss_abs": token_loss.abs(),
        "ratio": ratio,
        "ratio_abs": (ratio - 1).abs(),
        "clipped_ratio": clipped,
        "dual_cliped_ratio": torch.where(dual, ratio, 0.0),
        "approx_kl": -log_ratio,
        "clip_fraction": (ratio != clipped).float(),
    }
    return {name: (torch.where(mask, value, 0.0).double().sum(), mask.sum()) for name, value in values.items()}
