"""Numbers of a step: generation and reward of its samples, tokens per second, memory of the workers. Knows no process group and no file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch

from rlsync.models import Part
from workers.config.schema import PART_RATES
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


def sample_metrics(samples: Sequence[Sample], group_size: int, version: int) -> dict[str, float]:
    """``rollout/*`` metrics of one step's samples; the samples of a group are adjacent. ``version``: of the weights that train on them."""
    rewards = [s.reward for s in samples]
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    advantages = [s.advantage for s in samples if s.response_ids]
    tokens = [len(s.response_ids) for s in samples if s.response_ids]
    lags = [version - s.version for s in samples if s.version is not None]
    return {
        **rollout_metrics(
            prompt_lengths=[len(s.prompt_ids) for s in samples],
            response_lengths=[len(s.response_ids) for s in samples],
            rewards=rewards,
            properly_ended=[s.finished for s in samples],
        ),
        # A group whose rewards are all the same has advantages of zero, and gives no gradient.
        "rollout/fraction_of_groups_with_equal_rewards": sum(len(set(group)) == 1 for group in groups) / len(groups),
        **({"rollout/version_lag": sum(lags) / len(lags)} if lags else {}),
        "perf/total_num_tokens": float(sum(s.length for s in samples)),
        "rollout/advantages_mean": sum(a * n for a, n in zip(advantages, tokens, strict=True)) / max(1, sum(tokens)),
        "rollout/advantages_max": max(advantages, default=0.0),
        "rollout/advantages_min": min(advantages, default=0.0),
    }


def speed_metrics(metrics: Mapping[str, float], seconds: Mapping[str, float], num_devices: int) -> dict[str, float]:
    """Tokens per second: prompts and responses of the whole step per device, and responses of the rollout over all engines."""
    responses = metrics["rollout/response_length"] * metrics["rollout/total_num_sequence"]
    return {
        "perf/throughput": metrics["perf/total_num_tokens"] / seconds["time/step"] / num_devices,
        "rollout/tokens_per_s": responses / seconds["time/rollout"],
    }


def idle_metrics(*, step_s: float, actor_s: float, generating_s: float, sync_s: float, actor_share: float | None) -> dict[str, float]:
    """Shares of a step in which actor and engines had nothing to do, 0 to 1.

    Args:
        step_s: of the whole step.
        actor_s: in which actor ranks score or train.
        generating_s: in which an engine has prompts to answer, mean over the engines.
        sync_s: in which both sync.
        actor_share: of the devices; None where actor and engines have the same ones.
    """
    actor, engines = 1 - (actor_s + sync_s) / step_s, 1 - (generating_s + sync_s) / step_s
    both = actor + engines - 1 + sync_s / step_s if actor_share is None else actor_share * actor + (1 - actor_share) * engines
    return {"perf/idle": both, "perf/actor_idle": actor, "perf/engine_idle": engines}


def difference_metrics(differences: Sequence[LogprobDifference | None]) -> Mapping[str, float]:
    """Differences over all replicas; empty where engines or actor gave no log-probabilities."""
    seen = [d for d in differences if d is not None]
    count = sum(d.count for d in seen)
    if not count:
        return {}
    return {
        "rollout/logprob_diff_mean": sum(d.total for d in seen) / count,
        "rollout/logprob_diff_max": max(d.largest for d in seen),
    }


def part_rates(rates: Mapping[Part, float]) -> dict[str, float]:
    """Learning rates of what a vision-language model has beside its language model, where it is trained; named as in ``actor.optim``."""
    return {name: rates[part] for name, part in PART_RATES.items() if part in rates}


_GB = 1e9


def host_memory_gb(others: Sequence[int] = ()) -> float:
    """Resident memory of this process, of ``others`` (process ids) and of all their children in 10^9 bytes; shared pages count once per
    process."""
    counted: dict[psutil.Process, int] = {}
    for pid in (os.getpid(), *others):
        with suppress(psutil.NoSuchProcess):  # ended since
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    counted[process] = process.memory_info().rss
    return sum(counted.values()) / _GB


def largest(reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The maximum of each metric over the reports."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in report.items():
            found[name] = max(value, found.get(name, value))
    return found
