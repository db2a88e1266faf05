"""What a step's samples say about generation and reward: the ``rollout/*`` metrics. Torch only, no process group."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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
