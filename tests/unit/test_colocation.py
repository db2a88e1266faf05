"""Claims about who has the GPUs when: the order of a collocated step, and what no order is needed for."""

from __future__ import annotations

from typing import Any

import pytest

from rlsync.errors import ConfigError
from tests.unit.test_config import minimal
from workers.colocation import Colocation, ColocationPlan, plan_colocation
from workers.config import load_config
from workers.placement import PlacementMode

COLLOCATED, DISAGGREGATED = PlacementMode.COLLOCATED, PlacementMode.DISAGGREGATED
ALL = {"offload_weight": True, "offload_grad": True, "offload_optimizer": True}


def plan(mode: PlacementMode, *, on_gpu: bool = True, actor: dict[str, Any] | None = None, **rollout: Any) -> ColocationPlan:
    return plan_colocation(load_config(minimal(actor=actor or {}, rollout=rollout)), mode, on_gpu=on_gpu)


class Devices:
    """What lies on the shared device, and that nothing of it is used while it is away."""

    def __init__(self) -> None:
        self.engine, self.actor, self.log = {"weights", "kv_cache"}, {"weights", "grads", "optimizer"}, []

    def sleep_engines(self, level: int) -> None:
        self.engine = set()
        self.log.append(f"sleep {level}")

    def wake_engines(self, tag: str) -> None:
        self.engine.add(tag)
        self.log.append(f"wake {tag}")

    def offload_actor(self, parts: tuple[str, ...]) -> None:
        self.actor -= set(parts)
        self.log.append(f"offload {'+'.join(parts)}")

    def onload_actor(self, parts: tuple[str, ...]) -> None:
        self.actor |= set(parts)


def test_a_collocated_step_has_each_memory_when_it_needs_it_and_only_then() -> None:
    devices = Devices()
    turns = Colocation(plan(COLLOCATED, actor=ALL), devices)
    turns.first_sleep()
    for _ in range(2):
        turns.before_sync()
        assert devices.actor == {"weights"} and devices.engine == {"weights"}
        turns.after_sync()
        assert devices.actor == set() and devices.engine == {"weights", "kv_cache"}
        turns.after_rollout()
        assert devices.actor == {"weights", "grads", "optimizer"} and devices.engine == set()
    once = ["offload grads+optimizer", "wake weights", "offload weights", "wake kv_cache", "sleep 2"]
    assert devices.log == ["sleep 2", *once, *once]
    assert set(turns.take_seconds()) == {"time/engine_sleep", "time/engine_wake", "time/actor/offload", "time/actor/onload"}
    assert turns.take_seconds() == {}


def test_a_sync_after_a_failed_rollout_has_the_weights_again() -> None:
    devices = Devices()
    turns = Colocation(plan(COLLOCATED, actor=ALL), devices)
    turns.before_sync()
    turns.after_sync()
    turns.before_sync()
    assert "weights" in devices.actor


def test_switches_decide_what_goes() -> None:
    beside = load_config(minimal(actor={"lora": {"r": 4}, "megatron": {"mbridge": True}}, weight_sync={"lora": "adapter"}))
    assert plan_colocation(beside, COLLOCATED, on_gpu=True).sleep_level == 1, "their base is sent once"
    only = plan(COLLOCATED, actor={"offload_optimizer": True}, sleep_level=1)
    assert only == ColocationPlan(1, ("optimizer",)) and Colocation(only, Devices()).alternate
    devices = Devices()
    turns = Colocation(plan(COLLOCATED, sleep_level=0), devices)
    for moment in (turns.before_sync, turns.after_sync, turns.after_rollout):
        moment()
    assert devices.log == [] and not turns.alternate


@pytest.mark.parametrize(("mode", "on_gpu", "why"), [(DISAGGREGATED, True, "GPUs of their own"), (COLLOCATED, False, "there are no GPUs")])
def test_without_shared_gpus_nothing_moves_which_is_said(mode: PlacementMode, on_gpu: bool, why: str) -> None:
    idle = plan(mode, on_gpu=on_gpu, actor=ALL)
    assert idle.sleep_level == 0 and idle.parts == () and why in idle.notes[0] and "offload_grad" in idle.notes[0]
    assert plan(mode, on_gpu=on_gpu, sleep_level=0).notes == ()
    with pytest.raises(ConfigError, match=f"sleep_level \\(2\\) is for engines on the actor's GPUs, but .*{why}"):
        plan(mode, on_gpu=on_gpu, sleep_level=2)
