"""The claim that seconds said on paper are those that benches measured on GPUs, within a quarter, wherever any are said."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlsync.cli import pricing
from rlsync.cli.pricing import Price, Settings, quote
from rlsync.cli.scene import Scene, Sides, set_out

RAW = Path(__file__).resolve().parents[2] / "benchmarks" / "raw"
# Since an engine's part in a sync is one call; what is around the data took longer before.
ONE_CALL = "2026-11-30T05"
# Smaller steps of messages than there are now.
OUTDATED = ("2026-11-21-7b-disaggregated-all-ways", "nccl auto")


def measured_cases() -> list[tuple[str, str]]:
    """Of all benches on GPUs, by file, the syncs of whole weights that went into engines directly: the only ones that are predicted."""
    found = []
    for path in sorted(RAW.glob("*.json")):
        measured = json.loads(path.read_text())
        for case in measured.get("cases", ()) if isinstance(measured, dict) and "floors" in measured else ():
            if case["kind"] == "rlsync" and "lora" not in case["settings"] and case["report"]["sinks"] == ["direct"]:
                found.append((path.stem, case["name"]))
    return found


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    settings = {key: case["settings"][key] for key in ("bucket_bytes", "num_slots", "transport", "staging") if key in case["settings"]}
    return {**settings, "offload_weight": case["name"].startswith("moved")}


def links_of(measured: dict[str, Any]) -> dict[str, float]:
    floors = measured["floors"]
    speeds = {"gpu": min(floors["same_gb_per_s"].values()), "nvlink": max(floors["peer_gb_per_s"].values(), default=0.0)}
    return {name: 1e9 * speed for name, speed in speeds.items() if speed}


@functools.cache
def set_out_once(config: str, axes: str, engines: str, colocated: bool) -> Sides:
    scene = Scene(json.loads(axes), **json.loads(engines), colocated=colocated)
    return set_out(json.loads(config), scene, dtype=None, engine_dtype=None, make_vocab_size_divisible_by=1)


@functools.cache
def drawn_once(*sides: Any, **settings: Any) -> Any:
    return pricing._draw(set_out_once(*sides), Settings(**settings), by_kind=True)


def on_paper(measured: dict[str, Any], *, num_slots: int = 2, **settings: Any) -> Price:
    """As ``quote``, but that benches of one plan, which differ by speeds or slots, share it."""
    of_sides = *(json.dumps(measured[key], sort_keys=True) for key in ("config", "actor", "rollout")), measured["placement"] == "collocated"
    counted = Settings(links=links_of(measured), num_slots=num_slots, **settings)
    return pricing._count("", set_out_once(*of_sides), counted, *drawn_once(*of_sides, **settings), began_s=0.0)


def test_a_plan_that_benches_share_has_the_price_of_one_of_its_own() -> None:
    measured = json.loads((RAW / "2026-11-22-1.5b-collocated-moved.json").read_text())
    for settings in ({"offload_weight": True, "num_slots": 3}, {"bucket_bytes": 2**26}):
        shared = on_paper(measured, **settings)
        scene = Scene(measured["actor"], **measured["rollout"], colocated=True)
        own = quote(measured["config"], scene, Settings(links=links_of(measured), **settings)).price
        assert own is not None and replace(own, architecture="", planning_s=0.0) == replace(shared, planning_s=0.0)


@pytest.mark.parametrize(("name", "case_name"), measured_cases())
def test_what_is_predicted_was_measured_within_a_quarter(name: str, case_name: str) -> None:
    measured = json.loads((RAW / f"{name}.json").read_text())
    (case,) = (case for case in measured["cases"] if case["name"] == case_name)
    price = on_paper(measured, **settings_of(case))
    if price.staging_bytes_per_actor_rank[1]:
        assert price.prediction is None and "staging rings" in price.unpredicted
        return
    assert price.unpredicted == "" and price.prediction is not None
    # Both count the bytes of the same workers; paper looks at what sources give too.
    assert price.prediction.floor_s == pytest.approx(measured["floors"]["floor_s"], rel=0.01)
    assert (0.75 < price.prediction.data_s / case["median"]["data"] < 1.25) is ((name, case_name) != OUTDATED)
    if measured["date"] >= ONE_CALL:
        assert 0.75 < price.prediction.whole_s / case["median"]["whole"] < 1.25


def test_predictions_are_held_to_measurements_of_every_kind() -> None:
    """Nobody lists them, so that a new bench counts; this says that the search finds some."""
    cases = measured_cases()
    assert len(cases) > 50 and OUTDATED in cases
    for part in ("moonlight-16b-disaggregated", "qwen3-30b-a3b-32-layers-disaggregated", "qwen3-30b-a3b-collocated", "4-gpus", "one-call"):
        assert any(part in name for name, _ in cases), part


def test_what_was_not_measured_is_not_predicted_and_says_why() -> None:
    measured = json.loads((RAW / "2026-11-22-7b-collocated-ring.json").read_text())
    for settings, said in (
        ({"staging": "always"}, "staging rings"),
        ({"transport": "shm"}, "here it is shm"),
        ({"transport": "gloo"}, "here it is gloo"),
    ):
        price = on_paper(measured, **settings)
        assert price.prediction is None and said in price.unpredicted
    scene = Scene({"tp_size": 2}, tp_size=2, gpus_per_host=2)
    far = quote(measured["config"], scene, Settings(links={"nvlink": 370e9})).price
    assert far is not None and "(other host): add nic=BYTES_PER_SECOND to --link" in far.unpredicted


def test_a_source_that_gives_to_many_is_the_limit() -> None:
    """Two ranks give to two engines of two on another host: each gives twice what a worker takes."""
    scene = Scene({"tp_size": 2}, tp_size=2, num_engines=2, gpus_per_host=4, actor_hosts=1)
    config = json.loads((RAW / "2026-11-21-0.5b-collocated.json").read_text())["config"]
    price = quote(config, scene, Settings(links={"nvlink": 370e9, "nic": 44e9})).price
    assert price is not None and price.prediction is not None
    assert price.prediction.floor_s == pytest.approx(price.given_bytes_per_actor_rank[1] / 44e9)
    assert price.prediction.limit == f"{price.heaviest_actor_rank} gives"
    assert price.given_bytes_per_actor_rank[1] > 1.9 * price.received_bytes_per_worker[1]
