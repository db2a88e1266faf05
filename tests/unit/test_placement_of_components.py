"""Claims about ``cluster.component_placement``: syntax, modes, engines, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rlsync.errors import ConfigError
from workers.placement import PlacementMode, resolve_placement


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        ("all", (0, 1, 2, 3, 4, 5, 6, 7)),
        (3, (3,)),
        ("3", (3,)),
        ("0,1,2", (0, 1, 2)),
        ("0-3", (0, 1, 2, 3)),
        ("0-1,2,3-4", (0, 1, 2, 3, 4)),
        ([2, 3], (2, 3)),
    ],
)
def test_every_way_to_write_devices_is_read(value: Any, devices: tuple[int, ...]) -> None:
    placement = resolve_placement({"actor,rollout,reward": value}, num_devices=8)
    assert placement.actor == placement.rollout == placement.reward == devices
    assert placement.mode is PlacementMode.COLLOCATED


def test_disjoint_devices_are_disaggregated_and_reward_may_lie_anywhere() -> None:
    placement = resolve_placement({"actor": "0-1", "rollout, reward": "2-5"}, num_devices=8)
    assert placement.mode is PlacementMode.DISAGGREGATED
    assert placement.engines(2) == ((2, 3), (4, 5)) and placement.engines(4) == ((2, 3, 4, 5),)


def test_a_key_of_its_own_moves_a_component_out_of_a_shared_one() -> None:
    placement = resolve_placement({"actor": "0-1", "actor,rollout,reward": "all", "rollout": "2-3"}, num_devices=4)
    assert placement.actor == (0, 1) and placement.rollout == (2, 3) and placement.reward == (0, 1, 2, 3)
    assert placement.mode is PlacementMode.DISAGGREGATED
    own = {"actor": "0-1", "actor,rollout,reward": "all", "rollout": 2, "reward": 2}
    assert resolve_placement(own, num_devices=None).rollout == (2,), "nothing is left for `all`, which needs GPUs"


def test_process_slots_need_no_devices() -> None:
    assert resolve_placement({"actor": "0-1", "rollout,reward": 2}, num_devices=None).rollout == (2,)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"actor": "0-3", "rollout": "2-5", "reward": 0},
            "actor on 0-3 and rollout on 2-5 share only 2-3",
        ),
        ({"actor": "0-3", "rollout": "0-1", "reward": 0}, "they must share all devices or none"),
        ({"actor": "0"}, "must place rollout, reward"),
        ({"actor,rollout": "0", "actor,reward": "1"}, "names actor twice"),
        ({"aktor,rollout,reward": "0"}, "unknown component 'aktor'; did you mean 'actor'"),
        ({"actor,rollout,reward": "all", "inference": 0}, "remove inference"),
        ({"actor,rollout,reward": "0,2"}, "has a gap"),
        ({"actor,rollout,reward": "0,0"}, "names a device twice"),
        ({"actor,rollout,reward": "7-8"}, "device 8 does not exist; the cluster has 8"),
        ({"actor,rollout,reward": "3-1"}, "runs backwards"),
        ({"actor,rollout,reward": "one"}, "cannot read 'one'"),
        ({"actor,rollout,reward": "0-3:0-3"}, "is not supported"),
        ({"actor,rollout,reward": {"node_group": "a", "placement": 0}}, "is not supported"),
        ({"actor,rollout,reward": []}, "names no device"),
    ],
)
def test_placements_that_cannot_work_are_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_placement(spec, num_devices=8)
    assert isinstance(caught.value, ValueError) and message in str(caught.value)


def test_all_without_gpus_asks_for_process_slots() -> None:
    with pytest.raises(ConfigError, match="name process slots"):
        resolve_placement({"actor,rollout,reward": "all"}, num_devices=None)


def test_engines_must_divide_the_devices() -> None:
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel_size \(2\) must divide"):
        resolve_placement({"actor,rollout,reward": "0-2"}, num_devices=8).engines(2)
