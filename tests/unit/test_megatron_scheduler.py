"""Learning-rate schedules: the value at each step, and options that contradict each other."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from rlsync.errors import ConfigError
from rlsync.megatron.optimizer import SchedulerOptions, build_scheduler


def rates(steps: int, **options) -> list[float]:
    """Learning rate of each of the first steps; the optimizer is only a place for it."""
    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = build_scheduler(optimizer, SchedulerOptions(max_lr=1.0, **options))
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return values


def test_constant_stays_at_the_maximum_from_the_first_step():
    assert rates(4) == [1.0] * 4


def test_warm_up_rises_linearly_from_its_initial_value():
    assert rates(6, lr_warmup_iters=4, lr_warmup_init=0.2) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_warm_up_may_be_a_fraction_of_the_decay():
    assert rates(4, lr_warmup_fraction=0.2, lr_decay_iters=10) == rates(4, lr_warmup_iters=2, lr_decay_iters=10)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", [1.0 - 0.9 * t / 4 for t in range(5)]),
        ("cosine", [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]),
        ("inverse-square-root", [1.0, 1.0, 2**-0.5, 3**-0.5, 0.5]),
    ],
)
def test_decay_ends_at_the_minimum(style, expected):
    assert rates(6, lr_decay_style=style, lr_decay_iters=4, min_lr=0.1) == pytest.approx([*expected, 0.1])


def test_wsd_is_stable_until_its_last_phase():
    values = rates(9, lr_decay_style="WSD", lr_decay_iters=8, lr_wsd_decay_iters=4, lr_wsd_decay_style="linear")
    assert values == pytest.approx([1.0] * 5 + [0.75, 0.5, 0.25, 0.0])


def test_weight_decay_follows_its_own_style():
    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])
    decay = {"start_weight_decay": 0.0, "end_weight_decay": 0.4, "weight_decay_incr_style": "linear"}
    scheduler = build_scheduler(optimizer, SchedulerOptions(max_lr=1.0, lr_decay_style="cosine", lr_decay_iters=4, **decay))
    scheduler.step(2)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_lr": 2.0}, "min_lr 2.0 is above max_lr 1.0"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}, "not both"),
        ({"lr_decay_style": "WSD", "lr_decay_iters": 10}, "needs lr_wsd_decay_iters"),
        ({"lr_decay_style": "cosine", "lr_decay_iters": 3, "lr_warmup_iters": 3}, "leaves nothing of lr_decay_iters 3"),
        ({"start_weight_decay": 0.1, "end_weight_decay": 0.2}, "weight_decay_incr_style is constant"),
    ],
)
def test_options_that_contradict_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        rates(1, **options)
