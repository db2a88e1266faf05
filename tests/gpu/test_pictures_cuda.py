"""Pictures on one GPU that actor and engine share: a frozen tower and engines that really sleep, and a GRPO run that ends early."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
import torch

from rlsync.bridge.folder_source import FolderSource
from rlsync.engine.state import state_difference
from rlsync.errors import WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from tests.gpu.engines import KV_CACHE_BYTES, start, state
from tests.integration.script_runs import engine_core, exit_code, run, started, strike
from tests.integration.test_vision import BATCHES, expectations
from tests.ranks import run_ranks
from tests.vision_models import FAMILIES, row, save_tiny_vision_model, tiny_vision_config
from workers.metrics_log import read_metrics

pytest.importorskip("torchvision", reason="transformers' processors need it")

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(450)]

TOWER = "model.visual."
_CALL_S = 60.0
# Mean difference of log-probabilities that bf16 kernels of two programs make.
SAME, OTHER = 3e-2, 0.1


def test_a_gpu_computes_of_pictures_what_transformers_does_on_a_cpu(tmp_path, exact_products):
    """Logits and the gradient of every parameter in fp32, by TransformerEngine's layers where they are installed."""
    models = {family: expectations(tmp_path / family, family=family) for family in FAMILIES}
    cases = [
        {"model": "qwen2_5_vl", "topology": {}, "cut": [1]},
        {"model": "qwen2_5_vl", "topology": {}, "cut": [3, 5]},
        {"model": "qwen3_vl", "topology": {}, "cut": [2, 6]},
    ]
    outputs = run_ranks(1, "tests.integration.vision_ranks", "compute_as_huggingface", cases=cases, models=models)
    print(*[line for line in outputs[0].splitlines() if line.startswith("COMPUTED")], sep="\n")
    assert outputs[0].count("COMPUTED") == len(cases), outputs[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_with_pictures_are_computed_as_padded_ones(tmp_path, exact_products, family):
    """In bf16, by the attention of TransformerEngine where it is installed."""
    # Heads of 64, which flash and cuDNN attention take.
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    if family == "qwen3_vl":
        rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
        sizes["head_dim"] = 64
    folder = save_tiny_vision_model(tmp_path / "hf", family, **sizes)
    rows = [row(tiny_vision_config(family), parts, seed=seed) for seed, parts in enumerate(BATCHES["mixed"])]
    share = 1 / sum(len(found["tokens"]) for found in rows)
    torch.save({"rows": [{**found, "weights": torch.full((len(found["tokens"]),), share)} for found in rows]}, tmp_path / "rows.pt")
    cases = [{"how": {"packing": True}}, {"how": {"packing": True, "chunk_tokens": 16}, "ddp": {"use_distributed_optimizer": True}}]
    outputs = run_ranks(
        1,
        "tests.integration.megatron_ranks",
        "agree_in_half_precision",
        cases=cases,
        folder=str(folder),
        pictures=str(tmp_path / "rows.pt"),
    )
    print(outputs[0])
    assert outputs[0].count("AGREED") == len(cases), outputs[0]


def test_a_frozen_tower_is_sent_again_to_an_engine_whose_sleep_dropped_it_and_to_no_other(tmp_path, monkeypatch):
    """Level 1 keeps weights in host memory, level 2 drops them. The control: a handle that takes level 2 for level 1 is found out by
    checksums of what the engine holds, and the next sync sends all."""
    from tests.vision_folders import PROMPTS, save_vision_folder

    folder = save_vision_folder(tmp_path / "hf", "qwen2_5_vl")
    source = FolderSource(folder)
    source.frozen = frozenset(t.name for t in source.tensors if t.name.startswith(TOWER))
    # Initializes CUDA's driver in this process, of which torch says nothing: an engine forked from it would have no GPU.
    torch.ones(1, requires_grad=True).backward()
    engine = start(
        "sees", folder, "0", dtype="bfloat16", max_model_len=256, enforce_eager=True, enable_sleep_mode=True, skip_tokenizer_init=False
    )
    greedy = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}

    def found() -> tuple[Any, Any]:
        return state(engine), [engine.generate([prompt], greedy, timeout_s=_CALL_S)[0][0].token_ids for prompt in PROMPTS]

    def sleep(level: int) -> None:
        engine.sleep(level, _CALL_S)
        engine.wake(["weights"], _CALL_S)

    try:
        (fresh,), wanted = found()
        with WeightSyncer(source, [engine], SyncConfig(bucket_bytes=100_000, timeout_s=_CALL_S)) as syncer:
            syncer.connect()
            reports = {"first": syncer.sync(1), "second": syncer.sync(2)}
            for version, level in ((3, 1), (4, 2), (5, 1)):
                sleep(level)
                assert (engine.state == "dirty") == (level == 2)
                reports[f"level {level} before {version}"] = syncer.sync(version)
                engine.wake(["kv_cache"], _CALL_S)
                (held,), answered = found()
                assert state_difference(held, fresh) == () and answered == wanted, level
            tower_bytes = reports["first"].bytes - reports["second"].bytes
            assert tower_bytes > 0
            assert [report.held_bytes for report in reports.values()] == [0, tower_bytes, tower_bytes, 0, tower_bytes], reports
            with monkeypatch.context() as patch:
                patch.setattr(engine, "mark_dirty", lambda *_: None)
                sleep(2)
            with pytest.raises(WeightSyncError, match=TOWER.removeprefix("model.")):
                syncer.sync(6)
            assert syncer.sync(7).held_bytes == 0
            engine.wake(["kv_cache"], _CALL_S)
            (held,), answered = found()
            assert state_difference(held, fresh) == () and answered == wanted
        print(f"\nFROZEN {tower_bytes} of {reports['first'].bytes} B held, {reports['first'].transport} {reports['first'].sinks}")
    finally:
        engine.close()


def test_a_run_on_pictures_that_loses_its_engine_goes_on_where_it_was_saved_and_its_reward_rises(tmp_path):
    """Actor and engine on one GPU, in bf16; the tower is frozen. Engines lose it before each step while they sleep at level 2, and keep it
    at level 1. In the ninth step, the control, they are shown other pictures than the actor is."""
    command = [
        "-m", "tests.integration.grpo_run", "other-pictures", "--placement", json.dumps({"actor,rollout,reward": "0"}),
        "--config", "pictures-grpo-megatron",
    ]  # fmt: skip
    options = [
        f"pictures.path={tmp_path}/pictures", "pictures.num_train=512", "pictures.num_held_out=16", "pictures.questions=[colour]",
        "warm_start.num_steps=80", "algorithm.group_size=8", "runner.save_interval=3", "runner.val_check_interval=-1",
        "runner.val_before_train=False", "data.num_workers=0", "actor.model.precision=bf16", "actor.model.freeze_vision_model=True",
        "actor.offload_weight=True", "actor.offload_grad=True", "actor.offload_optimizer=True", "rollout.gpu_memory_utilization=0.2",
        f"rollout.vllm.kv_cache_memory_bytes={KV_CACHE_BYTES}", "weight_sync.timeout_s=60",
    ]  # fmt: skip
    with started(command, tmp_path, *options, "runner.max_steps=3000", "rollout.sleep_level=2") as process:
        assert exit_code(process, strike(process, tmp_path, 4, engine_core, signal.SIGKILL)) == 1
    killed = read_metrics(tmp_path / "run")[:4]
    run(command, tmp_path, *options, "runner.max_steps=9", "rollout.sleep_level=1", "runner.resume_dir=auto")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 10)) and lines[:3] == killed[:3]
    # The step after the saved one again, on the same prompts.
    assert lines[3]["rollout/prompt_length"] == killed[3]["rollout/prompt_length"]
    assert [line["sync/version"] for line in lines] == list(range(9))
    assert {line["sync/held_bytes"] for line in lines[:4]} == {0} and min(line["sync/held_bytes"] for line in lines[4:]) > 0
    seen, blind = lines[:8], lines[8]
    differences = [line["rollout/logprob_diff_mean"] for line in seen]
    rewards = [line["rollout/reward_scores"] for line in seen]
    print(f"\nPICTURES rewards {rewards}, log-probabilities apart {differences}, blind {blind['rollout/logprob_diff_mean']}")
    assert max(differences) <= SAME < OTHER < blind["rollout/logprob_diff_mean"]
    assert sum(rewards[-2:]) / 2 - sum(rewards[:2]) / 2 >= 0.1, rewards
