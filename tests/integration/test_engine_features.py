"""Claims about features of a vLLM configuration that a sync would get wrong: refused by name, before the engine and at connect."""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import vllm.config
from vllm.config import CompilationConfig, KVTransferConfig, SpeculativeConfig
from vllm.config.lora import MaxLoRARanks
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM

from rlsync.engine.compat import features
from rlsync.engine.compat.features import CONSIDERED, REFUSALS, against_adapters, check, refusals, unconsidered
from rlsync.engine.handles import local
from rlsync.engine.handles.adapters import MAX_LORA_RANKS, lora_arguments
from rlsync.errors import ConfigError, WeightSyncError
from tests.integration.engine_source import ENGINE_ENV
from tests.integration.tiny_engines import one_rank, start
from tests.models import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("features") / "qwen2", "qwen2", seed=1)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)


def config_of(folder: Path, **changes: Any) -> Any:
    args: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
    return AsyncEngineArgs(**args | {"enforce_eager": True} | changes).create_engine_config()


def changed(config: Any, path: str, value: Any) -> Any:
    """What vLLM itself does not let a CPU engine ask for is put into its configuration afterwards."""
    *owners, name = path.split(".")
    object.__setattr__(functools.reduce(getattr, owners, config), name, value)
    return config


def kv(connector: str, **extra: Any) -> dict[str, Any]:
    """Arguments of an engine that keeps keys and values elsewhere too."""
    transfer = KVTransferConfig(kv_connector=connector, kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": 10**6, **extra})
    return {"kv_transfer_config": transfer}


@pytest.mark.parametrize("connector", ["OffloadingConnector", "SimpleCPUOffloadConnector"])
def test_connectors_that_forget_when_vllm_resets_them_are_taken_and_only_these(folder: Path, connector: str) -> None:
    """Those that inherit vLLM's default do nothing, which the scheduler counts as success."""
    assert refusals(config_of(folder, **kv(connector))) == ()
    made = KVConnectorFactory.get_connector_class(kv(connector)["kv_transfer_config"])
    assert made.reset_cache is not KVConnectorBase_V1.reset_cache
    assert ExampleConnector.reset_cache is KVConnectorBase_V1.reset_cache
    scheduler = SimpleNamespace(connector=ExampleConnector.__new__(ExampleConnector), log_stats=False)
    assert Scheduler.reset_connector_cache(scheduler) is True, "or vLLM says itself that nothing was forgotten"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "path", "remedy"),
    [
        ({"cpu_offload_gb": 1}, "offload_config.uva.cpu_offload_gb=1", "set cpu_offload_gb to 0"),
        ({"offload_group_size": 2}, "offload_config.prefetch.offload_group_size=2", "set offload_group_size to 0"),
        ({"load_format": "sharded_state"}, "load_config.load_format=sharded_state", "one of auto, dummy,"),
        ({"hf_overrides": {"rope_theta": 7.0}}, "model_config.hf_overrides={'rope_theta': 7.0}", "config.json of the folder"),
        ({"compilation_config": {"inductor_compile_config": {"max_autotune": True}}}, "max_autotune=True", "set max_autotune to False"),
        ({"compilation_config": {"inductor_compile_config": {"freezing": True}}}, "freezing=True", "set freezing to False"),
        ({"quantization": "int8_per_channel_weight_only", "dtype": "bfloat16"}, "model_config.quantization=", "unquantised"),
        (kv("ExampleConnector"), "kv_connector=ExampleConnector", "or with OffloadingConnector or SimpleCPUOffloadConnector"),
        (kv("LMCacheConnectorV1"), "kv_connector=LMCacheConnectorV1", "without kv_transfer_config"),
        (kv("MultiConnector"), "kv_connector=MultiConnector", "without kv_transfer_config"),
        (kv("OffloadingConnector", spec_name="TieringOffloadingSpec", secondary_tiers=[]), "TieringOffloadingSpec", "CPUOffloadingSpec"),
        ({"runner": "pooling", "convert": "embed"}, "model_config.runner_type=pooling", "runner=generate"),
    ],
)  # fmt: skip
def test_what_vllm_can_be_asked_for_and_a_sync_would_get_wrong_is_refused(
    folder: Path, arguments: dict[str, Any], path: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config_of(folder, **arguments))
    assert path in str(caught.value) and remedy in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("parallel_config.enable_eplb", True),
        ("parallel_config.eplb_config.num_redundant_experts", 4),
        ("parallel_config.enable_elastic_ep", True),
        ("parallel_config.enable_fault_tolerance", True),
        ("model_config.sleep_mode_backend", "criu"),
        ("model_config.quantization", "fp8"),
        ("model_config.quantization", "compressed-tensors"),
        ("model_config.hf_config_path", "/elsewhere"),
        ("engram_config", SimpleNamespace()),
        ("ec_transfer_config", SimpleNamespace()),
        ("cache_config.calculate_kv_scales", True),  # vLLM 0.25
        ("cache_config.cpu_offload_gb", 1.0),
        ("kv_transfer_config", KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both")),
    ],
)
def test_what_a_cpu_engine_cannot_be_asked_for_is_refused_too(folder: Path, path: str, value: Any) -> None:
    config = config_of(folder)
    assert refusals(config) == ()
    (found,) = refusals(changed(config, path, value))
    assert found.startswith(path)


LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


@pytest.mark.parametrize(
    ("arguments", "r", "serves", "words"),
    [
        ({}, None, True, ()),
        (LORA, 8, True, ()),
        (LORA, None, True, ("without enable_lora",)),
        ({}, 8, True, ("enable_lora=True, max_loras=2, max_lora_rank=8",)),
        (LORA, 9, True, ("max_lora_rank=8 is less than the adapters' rank 9; start the engine with max_lora_rank=16",)),
        (LORA, 8, False, ("VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",)),
        (
            {**LORA, "max_loras": 1, "fully_sharded_loras": True, "enable_moe_shared_loras": True, "enable_mixed_moe_lora_format": True},
            8, True, ("with max_loras=2", "without fully_sharded", "without enable_moe_shared", "without enable_mixed_moe"),
        ),
    ],
)  # fmt: skip
def test_engines_with_slots_take_adapters_and_all_others_weights(
    folder: Path, arguments: dict[str, Any], r: int | None, serves: bool, words: tuple[str, ...]
) -> None:
    config = config_of(folder, **arguments)
    assert refusals(config) == ()
    found = against_adapters(config, r, serves_adapters=serves)
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True)), found


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("lora_config.default_mm_loras", {"image": "/nowhere"}, "without default_mm_loras"),
        ("parallel_config._api_process_count", 2, "several processes that take requests.* with --api-server-count=1"),
    ],
)
def test_all_requests_run_on_the_adapters_of_their_version(folder: Path, path: str, value: Any, words: str) -> None:
    """Not on those of pictures, nor on the base for a process of a server that has not heard of them."""
    config = config_of(folder, **LORA)
    assert against_adapters(config, 8, serves_adapters=True) == ()
    (found,) = against_adapters(changed(config, path, value), 8, serves_adapters=True)
    assert re.search(words, found)


def test_ranks_that_slots_have_are_those_of_the_installed_vllm(folder: Path) -> None:
    assert get_args(MaxLoRARanks) == MAX_LORA_RANKS
    assert config_of(folder, **lora_arguments(9)).lora_config.max_lora_rank == 16
    with pytest.raises(ConfigError, match="up to rank 512, these have 513"):
        lora_arguments(513)


@pytest.mark.parametrize(("method", "refused"), [("ngram", 0), ("suffix", 0), ("eagle3", 1), ("deepseek_mtp", 1), ("draft_model", 1)])
def test_drafters_with_weights_are_refused_and_those_without_are_not(folder: Path, method: str, refused: int) -> None:
    config = config_of(folder, speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
    assert isinstance(config.speculative_config, SpeculativeConfig)
    config.speculative_config.method = method
    assert len(refusals(config)) == refused


def test_every_finding_is_in_one_error(folder: Path) -> None:
    config = changed(config_of(folder, enable_lora=True, hf_overrides={"rope_theta": 7.0}), "parallel_config.enable_eplb", True)
    with pytest.raises(ConfigError) as caught:
        check(config, against_adapters(config, None, serves_adapters=True))
    assert all(word in str(caught.value) for word in ("enable_eplb", "lora_config", "hf_overrides"))


def configs(folder: Path) -> Iterator[tuple[str, Any]]:
    """The config objects of an engine by path; what is not there by default is asked for."""
    whole = config_of(folder)
    for path in CONSIDERED:
        found = functools.reduce(getattr, filter(None, path.split(".")), whole)
        yield path, vllm.config.WeightTransferConfig() if path == "weight_transfer_config" else found


def test_every_setting_of_the_installed_vllm_that_decides_about_weights_was_considered(folder: Path) -> None:
    """Red for a new field of a new version: read what it does, then refuse or honour it in the table."""
    found = {path: {f.name for f in dataclasses.fields(config) if not f.name.startswith("_")} for path, config in configs(folder)}
    assert {path: sorted(names - CONSIDERED[path]) for path, names in found.items() if names - CONSIDERED[path]} == {}


def test_every_refusal_names_a_setting_that_was_considered() -> None:
    for row in REFUSALS:
        owner, _, name = row.path.rpartition(".")
        derived = {"model_config.runner_type": "runner", "speculative_config.method": "speculative_config"}
        if owner.startswith("kv_transfer_config"):
            # One of the caches, whose own fields say what is kept where; none of them changes a weight.
            assert row.path.split(".")[1] in {f.name for f in dataclasses.fields(KVTransferConfig)}, row.path
        elif owner == "compilation_config.inductor_compile_config":
            assert isinstance(CompilationConfig().inductor_compile_config, dict)
        elif row.path in derived:
            assert derived[row.path] in CONSIDERED["" if owner == "speculative_config" else owner]
        else:
            assert name in CONSIDERED[owner], row.path


def test_a_setting_that_nobody_considered_is_told_when_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder)
    assert unconsidered(config) == ()
    monkeypatch.setattr(features, "CONSIDERED", {**CONSIDERED, "load_config": CONSIDERED["load_config"] - {"device", "ignore_patterns"}})
    assert unconsidered(config) == ()
    changed(config, "load_config.device", "cpu")
    assert unconsidered(config) == ("load_config.device='cpu'",)


@pytest.mark.slow
def test_an_engine_is_refused_before_it_starts_and_at_connect(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``vllm serve`` comes by the second way. With the actor's weights it would be another model: the rope's base differs."""
    wanted = {**LORA, "hf_overrides": {"rope_theta": 3.0}}
    with pytest.raises(ConfigError, match="hf_overrides"):
        start("early", folder, **wanted)
    monkeypatch.setattr(local, "check_features", lambda config: None)
    engine = start("late", folder, **wanted)
    try:
        with (
            one_rank([engine], folder) as syncer,
            pytest.raises(WeightSyncError, match=r"(?s)engine late.*hf_overrides.*lora_config") as caught,
        ):
            syncer.connect()
        assert caught.value.phase == "connect"
    finally:
        engine.close()


@pytest.mark.parametrize("counts", [True, False])
def test_engines_that_count_statistics_start_one_after_the_other(counts: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, whose registry of metrics refuses what is in it. vLLM's own start is replaced by one that takes down its overlaps."""
    starting, most, both = 0, 0, threading.Barrier(2)

    def started(*_: object, **__: object) -> None:
        nonlocal starting, most
        starting += 1
        most = max(most, starting)
        if not counts:
            both.wait(60)  # both are here
        time.sleep(0.2)
        starting -= 1
        raise RuntimeError("started")

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", started)
    args = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    with ThreadPoolExecutor(2) as pool:
        starts = [pool.submit(local.Engine(name, {**args, "disable_log_stats": not counts}).start) for name in ("left", "right")]
        for start_of in starts:
            with pytest.raises(RuntimeError, match="started"):
                start_of.result(120)
    assert most == (1 if counts else 2)


def test_an_engine_schedules_as_much_as_vllms_class_for_throughput(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its arguments name no numbers; vLLM's own start is replaced by one that looks at what it is given."""
    given: list[Any] = []

    def started(config: Any, **_: object) -> None:
        given.append(config.scheduler_config)
        raise RuntimeError("started")

    monkeypatch.setattr(AsyncLLM, "from_vllm_config", started)
    named = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    for chosen in ({}, named):
        with pytest.raises(RuntimeError, match="started"):
            local.Engine("left", {"model": str(folder), "skip_tokenizer_init": True, "max_model_len": 128, **chosen}).start()
    tokens, requests = (numbers[UsageContext.LLM_CLASS] for numbers in AsyncEngineArgs.get_batch_defaults(1))
    assert [(one.max_num_batched_tokens, one.max_num_seqs) for one in given] == [(tokens, requests), (64, 8)]
