"""Claims about an actor and engines on two hosts, which are two sets of namespaces of this machine with a cable between them.

One run of ``gloo_hosts`` makes all the facts.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.deadlines import SLACK
from tests.integration import hosts
from tests.integration.engine_source import ENGINE_ENV
from tests.integration.gloo_hosts import FAR, NEAR, TIMEOUT_S
from tests.models import save_tiny_model
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

LOGPROB_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    refusal = hosts.refusal()
    if refusal is not None:
        pytest.skip(f"NOT RUN: no second host can be made here: {refusal}")
    root = tmp_path_factory.mktemp("hosts")
    folders = [str(save_tiny_model(root / name, "qwen2", seed=seed)) for name, seed in (("first", 1), ("second", 2))]
    result = root / "facts.json"
    with pytest.MonkeyPatch.context() as patch:
        # Without an address vLLM asks for that of a host that no server knows.
        for name, value in {**ENGINE_ENV, "VLLM_HOST_IP": "127.0.0.1"}.items():
            patch.setenv(name, value)
        run_ranks(1, "tests.integration.gloo_hosts", "near", result=str(result), first=folders[0], second=folders[1])
    return json.loads(result.read_text())


def same(found: Any, wanted: Any) -> bool:
    pairs = [(f, w) for fs, ws in zip(found, wanted, strict=True) for f, w in zip(fs, ws, strict=True)]
    return all(
        f["token_ids"] == w["token_ids"] and max(abs(x - y) for x, y in zip(f["logprobs"], w["logprobs"], strict=True)) <= LOGPROB_TOLERANCE
        for f, w in pairs
    )


def test_engines_here_and_there_answer_like_a_fresh_one(facts: dict[str, Any]) -> None:
    assert not same(facts["fresh first"], facts["fresh second"]), "without a sync they differ"
    for version in (1, 2):
        sync = facts[f"sync {version}"]
        assert same(sync["near"], facts["fresh second"])
        assert same(sync["far"], facts["fresh second"])
        assert sync["transport"] == "gloo+shm"


def test_the_cable_carries_each_byte_once(facts: dict[str, Any]) -> None:
    sync, held = facts["sync 2"], facts["held bytes"]
    assert sync["links"]["other host"] == held
    assert sync["redundancy"] == 1.0
    assert held <= sync["sent"] < 1.03 * held, "headers and the channel come on top"
    assert sync["received"] < 0.03 * held


def test_nothing_listens_on_an_address_that_nobody_named(facts: dict[str, Any]) -> None:
    assert facts["near listeners"], "the channel, the store, the group"
    assert {address for address, _ in facts["near listeners"]} == {NEAR}
    assert {address for address, _ in facts["far listeners"]} == {FAR}
    assert facts["listeners after close"] == []


@pytest.mark.parametrize("fault", ["cut", "stopped", "killed"])
def test_a_fault_between_hosts_is_one_error_within_the_deadline_on_both(facts: dict[str, Any], fault: str) -> None:
    told = facts[fault]
    assert told["error"] is not None, "it did not fail"
    assert told["seconds"] < SLACK * TIMEOUT_S
    assert told["error"]["engine"] == "far"
    assert told["error"]["text"] in told["refusal"]
    # A stopped worker leaves when it runs again.
    assert told["far seconds"] < (2 if fault == "stopped" else 1) * SLACK * TIMEOUT_S


@pytest.mark.parametrize("fault", ["cut", "stop"])
def test_the_sync_after_a_fault_is_right_in_the_same_connection(facts: dict[str, Any], fault: str) -> None:
    after = facts[f"after the {fault}"]
    assert after["connected anew because"] == ""
    assert same(after["near"], facts["fresh first"])
    assert same(after["far"], facts["fresh first"])


def test_nothing_is_left_behind(facts: dict[str, Any]) -> None:
    assert facts["processes left"] == 0
    assert facts["rings left"] == facts["threads left"] == []
