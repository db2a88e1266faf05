"""What a step's samples say about generation and reward: the ``rollout/*`` metrics. Torch only, no process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from workers.samples import Sample


@dataclass(frozen=True, slots=True)
class LogprobDifference:
    """|engine - actor| over the response tokens of one replica: sum, largest, and how many tokens."""

    total: float
    largest: float
    count: int


def rollout_metrics(
    *, prompt_lengths: Sequence[int], response_lengths: Sequence[int], rewards: Sequence[float], properly_ended: Sequence[bool]
) -> dict[str, float]:
    """Metrics of the B samples of a step.

    Args:
        prompt_lengths: tokens of each prompt.
        response_lengths: tokens of each response, end-of-sequence included.
        rewards: reward of each response, scaled.
        properly_ended: whether the response ended by itself rather than by its length limit.
    """
    prompts, responses = (torch.tensor(lengths, dtype=torch.float64) for lengths in (prompt_lengths, response_lengths))
    return {
        "rollout/total_num_sequence": float(len(rewards)),
        "rollout/prompt_length": prompts.mean().item(),
        "rollout/response_length": responses.mean().item(),
        "rollout/average_response_length": responses.mean().item(),
        "rollout/variance_of_response_length": responses.var(correction=0).item(),
        "rollout/max_of_response_length": responses.max().item(),
        "rollout/min_of_response_length": responses.min().item(),
        "rollout/total_length": (prompts + responses).mean().item(),
        "rollout/reward_scores": torch.tensor(rewards, dtype=torch.float64).mean().item(),
        "rollout/fraction_of_samples_properly_ended": sum(properly_ended) / len(properly_ended),
    }


def sample_metrics(samples: Sequence[Sample], group_size: int) -> dict[str, float]:
    """Of one step's samples, groups next to each other."""
    rewards = [s.reward for s in samples]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    advantages = [s.advantage for s in samples if s.response_ids]
    tokens = [len(s.response_ids) for s in samples if s.response_ids]
    return {
        **rollout_metrics(
            prompt_lengths=[len(s.prompt_ids) for s in samples],
            response_lengths=[len(s.response_ids) for s in samples],
            rewards=rewards,
            properly_ended=[s.finished for s in samples],
        ),
        # A group whose rewards are all the same has advantages of zero, and gives no gradient.
        "rollout/fraction_of_groups_with_equal_rewards": sum(len(set(group)) == 1 for group in groups) / len(groups),
        "perf/total_num_tokens": float(sum(s.length for s in samples)),
        "rollout/advantages_mean": sum(a * n for a, n in zip(advantages, tokens, strict=True)) / max(1, sum(tokens)),
        "rollout/advantages_max": max(advantages, default=0.0),
        "rollout/advantages_min": min(advantages, default=0.0),
    }


def speed_metrics(metrics: Mapping[str, float], seconds: Mapping[str, float], num_devices: int) -> dict[str, float]:
    """Tokens a second, of the whole step (prompts included, per device) and of its rollout (responses, all engines together)."""
    responses = metrics["rollout/response_length"] * metrics["rollout/total_num_sequence"]
    return {
        "perf/throughput": metrics["perf/total_num_tokens"] / seconds["time/step"] / num_devices,
        "rollout/tokens_per_s": responses / seconds["time/rollout"],
    }


def difference_metrics(differences: Sequence[LogprobDifference | None]) -> Mapping[str, float]:
    """Over all replicas; empty where engines or actor gave no log-probabilities."""
    seen = [d for d in differences if d is not None]
    count = sum(d.count for d in seen)
    if not count:
        return {}
    return {
        "rollout/logprob_diff_mean": sum(d.total for d in seen) / count,
        "rollout/logprob_diff_max": max(d.largest for d in seen),
    }
