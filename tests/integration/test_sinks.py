"""Claims about the sinks, on real engines in a process of their own: a synced engine is a fresh one, whatever came in between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine_source import ENGINE_ENV
from tests.ranks import run_ranks

# qwen2 has biases, qwen3 a tied head over a padded vocabulary. oneDNN packs fp32 everywhere, bf16 on newer CPUs only.
CASES = ("qwen2-float32", "qwen3-float32", "qwen3-bfloat16")
SINKS = ("placed", "layerwise", "loaders")
# The first test waits for the engines; other work on the machine may take most of it.


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    return run_cases(tmp_path_factory.mktemp("sinks"), CASES, patched=True)


def run_cases(root: Path, cases: tuple[str, ...], *, patched: bool) -> Mapping[str, Any]:
    """What ``sink_engines`` found out about each case."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            patch.setenv(name, value)
        run_ranks(1, "tests.integration.sink_engines", "run", cases=cases, root=str(root), patched=patched)
    return json.loads((root / "report.json").read_text())


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("case", CASES)
def test_a_synced_engine_hashes_and_answers_like_a_fresh_one(reports: Mapping[str, Any], case: str, sink: str) -> None:
    got = reports[case][sink]
    assert got["fresh"] == [] and got["back"] == []
    assert got["answers"]
    assert got["num_buckets"] > 8


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("case", CASES)
def test_syncing_what_an_engine_has_changes_no_hash(reports: Mapping[str, Any], case: str, sink: str) -> None:
    assert reports[case][sink]["identity"] == []


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("case", CASES)
def test_plain_attention_is_left_out_of_what_follows_the_last_bucket(reports: Mapping[str, Any], case: str, sink: str) -> None:
    resting, layers = reports[case][sink]["resting"]
    assert resting == layers > 0


@pytest.mark.parametrize("case", CASES)
def test_the_two_versions_part_in_every_weight_and_in_the_answers(reports: Mapping[str, Any], case: str) -> None:
    report = reports[case]
    assert_all_weights_part(report)
    assert report["answers_part"] and report["again"] == []


def assert_all_weights_part(report: Mapping[str, Any]) -> None:
    """Without this the comparisons would show nothing: every buffer is hashed, as bytes or by its probe, and differs."""
    seen = {path.removesuffix("#probe") for path in report["parted"]}
    seen |= {path.removesuffix(".weight") for path in seen}
    aliases = report["choice"]["aliases"]
    for name in report["bytes"]:
        names = {name, *aliases.get(name, ())}
        assert names & seen or {n.removesuffix(".weight") for n in names} & seen, name


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("case", CASES)
def test_an_abandoned_sync_leaves_nothing_and_the_next_is_right(reports: Mapping[str, Any], case: str, sink: str) -> None:
    got = reports[case][sink]
    after = {name: difference for name, difference in got.items() if name.startswith("fresh_after_")}
    assert len(after) == 4 and not any(after.values())
    assert got["left"] == []


@pytest.mark.parametrize("case", CASES)
def test_direct_writes_into_a_plain_model_are_what_the_loaders_put_there(reports: Mapping[str, Any], case: str) -> None:
    assert reports[case]["placed_direct"] == []


@pytest.mark.parametrize("case", CASES)
def test_loaders_write_plain_layers_where_they_live_and_rebuild_all_others(reports: Mapping[str, Any], case: str) -> None:
    got = reports[case]["loaded_in_place"]
    assert got["rebuilt"] == got["differ"] == got["left"] == got["kept"] == []
    assert got["computed"] == ["model.norm"]
    assert got["forgotten"] == ["model.layers.0.self_attn.o_proj"]


@pytest.mark.parametrize("case", CASES)
def test_loaders_that_a_reload_of_somebody_else_has_left_deaf_are_not_used_in_place(reports: Mapping[str, Any], case: str) -> None:
    """vLLM >= 0.32 leaves the loaders of live biases wrapped, where none of a layer's tensors came; what they are given is lost."""
    got = reports[case]["after_another_reload"]
    assert got["rebuilt"] == [name.rpartition(".")[0] for name in got["lost"]]
    assert all(name.endswith("qkv_proj.bias") for name in got["lost"])
    assert len(got["lost"]) == (2 if case.startswith("qwen2-") else 0)


@pytest.mark.parametrize("case", CASES)
def test_buffers_that_no_checkpoint_fills_keep_their_values(reports: Mapping[str, Any], case: str) -> None:
    """vLLM's reload, of a layer that is not written where it lives, writes uninitialised memory into one: the claim can fail."""
    report = reports[case]
    assert report["placed"]["unfilled"] == report["layerwise"]["unfilled"] == []
    rebuilt = report["choice"]["auto"]["model.layers.0.self_attn.o_proj.weight"] == "layerwise"
    assert [name.rpartition(".")[2] for name in report["loaders"]["unfilled"]] == ["calibration"] * rebuilt


@pytest.mark.parametrize("case", CASES)
def test_only_modules_in_progress_take_memory(reports: Mapping[str, Any], case: str) -> None:
    report = reports[case]
    sizes = sorted(report["bytes"].values())
    assert sizes[-1] <= report["layerwise"]["peak_extra_bytes"] <= sizes[-1] + sizes[-2]
    layerwise = [size for name, size in report["bytes"].items() if report["choice"]["auto"][name] == "layerwise"]
    assert (report["placed"]["peak_extra_bytes"] > 0) == bool(layerwise)


@pytest.mark.parametrize("case", CASES[:2])
def test_packed_layers_are_layerwise_and_norms_direct(reports: Mapping[str, Any], case: str) -> None:
    choice = reports[case]["choice"]
    direct = {name for name, sink in choice["auto"].items() if sink == "direct"}
    assert direct == {name for name in choice["auto"] if name.endswith("norm.weight")}
    assert {n for reason in choice["auto_reasons"] for n in reason.split(" not direct")[0].replace(",", "").split()[:-1]} == {
        name for name, sink in choice["auto"].items() if sink == "layerwise"
    }


@pytest.mark.parametrize("case", CASES[:2])
def test_direct_is_refused_in_one_error_that_names_every_parameter(reports: Mapping[str, Any], case: str) -> None:
    choice = reports[case]["choice"]
    for name, sink in choice["auto"].items():
        assert (name in choice["direct"]) == (sink == "layerwise"), name
    assert "model.layers.0.mlp.down_proj.weight is (0,) torch.float32" in choice["direct"]
    assert choice["direct"].endswith("Use auto or layerwise")


def test_what_is_requested_is_chosen_and_anything_else_refused(reports: Mapping[str, Any]) -> None:
    for case in CASES:
        choice = reports[case]["choice"]
        assert set(choice["layerwise"].values()) == {"layerwise"} and choice["layerwise"].keys() == choice["auto"].keys()
        assert set(choice["loaders"].values()) == {"loaders"}
        assert choice["nonsense"].startswith("weight_sync.sink is 'nonsense'")


def test_a_tied_head_is_one_buffer(reports: Mapping[str, Any]) -> None:
    choice = reports["qwen3-float32"]["choice"]
    assert choice["aliases"] == {"model.embed_tokens.weight": ["lm_head.weight"]}
    assert "lm_head.weight" not in choice["auto"]
    # Both are packed, each for itself.
    assert {"model.embed_tokens#probe", "lm_head#probe"} <= set(reports["qwen3-float32"]["parted"])


def test_a_copy_that_no_reload_renews_is_found(reports: Mapping[str, Any]) -> None:
    (finding,) = reports["qwen2-float32"]["choice"]["stale"]
    assert finding.startswith("model.layers.0.self_attn.attn computes with a copy of its sinks")
