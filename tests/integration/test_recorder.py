"""Claims about what is recorded from vLLM's real loaders, on CPU: one worker, two real ones, four virtual ones.

All claims about one number of workers are tried in the same processes, because their start takes longer than all claims together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine_source import ENGINE_ENV
from tests.integration.recorder_checkpoints import MODELS, save_random
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

TIMEOUT_S = 500
Report = dict[str, dict[str, Any]]


class Reports:
    """What the claims in the child processes found, one report for each rank."""

    def __init__(self, futures: dict[str, Future[list[Report]]]) -> None:
        self._futures = futures

    def found(self, ranks: str, claim: str) -> list[Any]:
        """What a claim found on each rank; fails with the traceback of a rank on which it does not hold."""
        reports = self._futures[ranks].result()
        for rank, report in enumerate(reports):
            assert "error" not in report[claim], f"rank {rank}: {report[claim]['error']}"
        return [report[claim]["found"] for report in reports]

    def names(self, ranks: str, prefix: str) -> list[str]:
        return [name for name in self._futures[ranks].result()[0] if name.startswith(prefix)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reports]:
    root = tmp_path_factory.mktemp("recorder")
    folders = {name: str(save_random(root / name, name)) for name in MODELS}

    def run(world_size: int, function: str) -> list[Report]:
        report = root / function
        run_ranks(world_size, "tests.integration.recorder_claims", function, timeout_s=TIMEOUT_S, folders=folders, report=str(report))
        files = [report] if world_size == 1 else [Path(f"{report}.{rank}") for rank in range(world_size)]
        return [json.loads(file.read_text()) for file in files]

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        for name, value in ENGINE_ENV.items():
            patch.setenv(name, value)
        yield Reports({"one": pool.submit(run, 1, "one_rank"), "two": pool.submit(run, 2, "two_ranks")})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_recorded_placement_gives_what_vllms_loaders_give(reports: Reports, ranks: str, model: str) -> None:
    """And loaders that are given nothing but what they were seen to read leave the same."""
    for found in reports.found(ranks, f"placement {model}"):
        assert not found["unused"]
        assert bool(found["gaping"]) == (ranks == "two")
        if ranks == "two":
            assert {"model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight"} <= set(found["gaping"])
            assert "model.norm.weight" not in found["gaping"]


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_with_expert_parallelism_each_worker_records_its_own_experts(reports: Reports, model: str) -> None:
    one, other = reports.found("two", f"experts {model}")
    assert set(one["unused"]) and set(one["unused"]) <= set(other["read"])
    assert set(other["unused"]) and set(other["unused"]) <= set(one["read"])
    assert all(".mlp.experts." in name for name in (*one["unused"], *other["unused"]))


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe", "deepseek_v3"])
def test_four_virtual_workers_record_what_their_loaders_do(reports: Reports, model: str) -> None:
    """Two of them hold the same key-value head, and one alone has padding and tokens of the vocabulary."""
    digests = {reports.found("one", f"virtual {model} {rank}/4")[0]["digest"] for rank in range(4)}
    assert len(digests) == 4


def test_virtual_workers_record_what_real_ones_do(reports: Reports) -> None:
    real = reports.found("two", "placement qwen2")
    for rank in range(2):
        assert reports.found("one", f"virtual qwen2 {rank}/2")[0]["digest"] == real[rank]["digest"]


@pytest.mark.parametrize("model", MODELS)
def test_recording_leaves_no_trace_and_is_repeatable(reports: Reports, model: str) -> None:
    reports.found("one", f"trace {model}")
    reports.found("two", f"trace placement {model}")


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_recording_leaves_no_trace_under_expert_parallelism(reports: Reports, model: str) -> None:
    reports.found("two", f"trace experts {model}")


def test_adapters_of_experts_are_recorded_as_vllm_loads_them(reports: Reports) -> None:
    """Whole, cut over two workers, and shared out to two."""
    for claim in ("adapters of experts", "adapters of cut experts 0", "adapters of cut experts 1"):
        assert reports.found("one", claim) == [[]]
    mine, others = (reports.found("one", f"adapters of shared experts {rank}")[0] for rank in range(2))
    assert mine and not set(mine) & set(others), "those of other workers' experts are not read"


def test_a_trace_would_be_seen(reports: Reports) -> None:
    reports.found("one", "trace is seen")


@pytest.mark.parametrize("model", ["qwen2", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_recording_works_after_reloads_and_is_refused_during_one(reports: Reports, model: str) -> None:
    reports.found("one", f"reload {model}")


def test_a_worker_that_connects_again_runs_its_loaders_only_where_something_has_changed(reports):
    reports.found("one", "again")


def test_a_loader_that_swaps_two_shards_is_seen(reports: Reports) -> None:
    reports.found("one", "swapped")


def test_a_loader_that_computes_is_a_finding_and_the_rest_is_described(reports: Reports) -> None:
    reports.found("one", "computed")


def test_all_that_does_not_fit_is_found_together(reports: Reports) -> None:
    reports.found("one", "misfits")


def test_every_idiom_of_copying_keeps_its_source(reports: Reports) -> None:
    names = reports.names("one", "copies: ")
    assert len(names) > 15
    for name in names:
        reports.found("one", name)


def test_every_idiom_of_computing_is_a_finding_and_nothing_is_executed(reports: Reports) -> None:
    names = reports.names("one", "computes: ")
    assert len(names) > 10
    for name in names:
        reports.found("one", name)


def test_a_loader_that_writes_beside_the_model_is_a_finding(reports: Reports) -> None:
    reports.found("one", "foreign")


def test_a_live_tensor_of_two_layers_keeps_what_a_reload_left_on_it(reports: Reports) -> None:
    reports.found("one", "shared live")
