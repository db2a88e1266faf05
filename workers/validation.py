"""Validation: whether a run has some, the numbers of one of GRPO, and what a user should know of it beforehand.

Knows configuration and numbers, no engine, tokenizer or file, and imports no torch: ``workers.check`` uses it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from workers.config import AnyConfig, RunConfig
from workers.judges import Verdict


def validates(config: AnyConfig) -> bool:
    """Whether the run validates at all."""
    return bool(config.data.val_data_paths) and (config.runner.val_check_interval > 0 or config.runner.val_before_train)


def validation_metrics(verdicts: Sequence[Verdict], *, response_lengths: Sequence[int], properly_ended: Sequence[bool]) -> dict[str, float]:
    """``val/*`` metrics of the greedy responses to all validation problems, one each; lengths in tokens."""
    count, correct = len(verdicts), [verdict.correct for verdict in verdicts if verdict.correct is not None]
    return {
        "val/reward": sum(verdict.reward for verdict in verdicts) / count,
        **({"val/fraction_correct": sum(correct) / count} if len(correct) == count else {}),
        "val/response_length": sum(response_lengths) / count,
        "val/fraction_of_samples_properly_ended": sum(properly_ended) / count,
        "val/num_problems": float(count),
    }


def unread_validation(config: AnyConfig) -> Iterator[str]:
    """Which of its keys have no effect, and files that validation shares with training."""
    data, interval = config.data, config.runner.val_check_interval
    if not data.val_data_paths:
        if interval > 0:
            yield f"runner.val_check_interval ({interval}) has no effect: data.val_data_paths names no file, so no validation is run"
        return
    if not validates(config):
        yield f"data.val_data_paths has no effect: no validation is run with runner.val_check_interval {interval}"
        return
    for path in sorted({*data.val_data_paths} & {*data.train_data_paths}):
        yield f"{path} is among both data.train_data_paths and data.val_data_paths: validation sees rows that are trained on"


def validation_notes(config: RunConfig, num_problems: int | None) -> Iterator[str]:
    """What has no effect, or another one than the user may think. ``num_problems`` None: not known yet."""
    yield from unread_validation(config)
    runner, data = config.runner, config.data
    interval = runner.val_check_interval
    samples = data.rollout_batch_size * config.algorithm.group_size
    if num_problems is not None and validates(config) and interval > 0 and num_problems > interval * samples:
        yield (
            f"the validation after every {'step' if interval == 1 else f'{interval} steps'} generates {num_problems} responses, more than "
            f"the training between two of them ({interval * samples}); set data.val_data_size, or raise runner.val_check_interval"
        )
