"""``qwen2.5-1.5b-grpo-megatron`` on four GPUs, or on two, collocated and disaggregated: steps, agreement of engines and actor, resume.

Each run is a process of its own and takes one to four minutes. ``RLSYNC_RUNS_DIR`` names a folder that keeps finished runs: tests may then
be run one at a time, or side by side in several processes, and shared runs are made once. GSM8K lies in ``RLSYNC_GSM8K_DIR``; where that is
not set, problems of its form are written on the spot.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.metrics_log import read_metrics
from workers.synthetic import alone

pytestmark = [pytest.mark.gpu(2), pytest.mark.timeout(900)]

REPO = Path(__file__).resolve().parents[2]
# What the configuration is made for, and what shows the same with less.
NUM_GPUS = 4 if torch.cuda.device_count() >= 4 else 2


def placed(actor: str, rollout: str) -> tuple[str, ...]:
    places = {"actor": actor, "rollout": rollout, "reward": "0"}
    return tuple(f"cluster.component_placement.{who}={gpus}" for who, gpus in places.items())


if NUM_GPUS == 4:
    COLLOCATED, DISAGGREGATED = placed("0-3", "0-3"), placed("0-1", "2-3")
else:
    ONE_GPU = ("actor.model.tensor_model_parallel_size=1", "actor.model.sequence_parallel=False")
    COLLOCATED, DISAGGREGATED = placed("0-1", "0-1"), (*placed("0", "1"), *ONE_GPU)
# Short prompts and answers; without recomputation, which this length does not need.
SMALL = (
    "actor.model.precision=bf16", "actor.optim.fp16=null", "actor.optim.loss_scale=null", "actor.optim.lr=5e-5", "actor.optim.min_lr=0",
    "actor.model.recompute_granularity=null", "actor.model.recompute_method=null", "actor.model.recompute_num_layers=null",
    "actor.optim.overlap_grad_reduce=True", "actor.optim.overlap_param_gather=True",
    "runner.seq_length=320", "data.max_prompt_length=288", "algorithm.sampling_params.max_new_tokens=24", "runner.val_check_interval=-1",
    "data.rollout_batch_size=32", "algorithm.group_size=8", "algorithm.n_minibatches=2",
    "runner.enable_dynamic_batch_size=False", "algorithm.training_batch_size_per_gpu=16",
    "algorithm.logprob_forward_micro_batch_size=16", "algorithm.early_stop_imp_ratio=null", "data.num_workers=0", "reward.num_processes=4",
    "rollout.gpu_memory_utilization=0.2", "rollout.vllm.kv_cache_memory_bytes=8589934592",
    "rollout.max_running_requests=128", "rollout.cuda_graph_max_bs=64", "weight_sync.timeout_s=120",
    "weight_sync.verify=full",
)  # fmt: skip
STEPS = 3
# Mean differences of log-probabilities over a step's samples, of runs that differ in nothing but the order of sums: other samples, as
# the first token that differs changes all after it. The control was 88 times away, and more.
SAME_VERSION, OTHER_VERSION, CONTROL = 2.0, 2.5, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    named = os.environ.get("RLSYNC_RUNS_DIR")
    folder = tmp_path_factory.mktemp("runs") if named is None else Path(named, f"on_{NUM_GPUS}_gpus")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "problems.lock"):
        _write_problems(folder)
    return folder


def run(root: Path, name: str, *overrides: str, fault: str = "none", timeout_s: float = 420) -> list[dict[str, Any]]:
    """The metrics of a run, made unless it is there already."""
    done = root / name / "done"
    with alone(root / f"{name}.lock"):
        if not done.exists():
            _run(root, name, overrides, fault, timeout_s)
            done.touch()
    lines = read_metrics(root / name)
    print(f"{name}: logprob_diff_mean {[line['rollout/logprob_diff_mean'] for line in lines]}", flush=True)
    return lines


def _run(root: Path, name: str, overrides: tuple[str, ...], fault: str, timeout_s: float) -> None:
    command = [
        sys.executable, "-m", "tests.integration.grpo_run", fault, "--config", "qwen2.5-1.5b-grpo-megatron", *SMALL,
        f"runner.output_dir={root}", f"runner.experiment_name={name}", f"seeded_model.path={root}/model",
        f"data.train_data_paths=[{root}/problems.jsonl]", "data.val_data_paths=[]", f"runner.max_steps={STEPS}",
        f"warm_start.data_paths=[{root}/supervised.jsonl]", "warm_start.num_steps=40", "warm_start.batch_size=32", "warm_start.lr=2e-4",
        *overrides,
    ]  # fmt: skip
    began = time.monotonic()
    said = []
    with (root / f"{name}.stderr").open("w+") as errors:
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        limit = threading.Timer(timeout_s, process.terminate)
        limit.start()
        try:
            for line in process.stdout:
                said.append(line)
                print(f"{name} {time.monotonic() - began:5.0f} s: {line}", end="", flush=True)
            returncode = process.wait()
        finally:
            limit.cancel()
        errors.seek(0)
        assert returncode == 0, "".join(said)[-3000:] + errors.read()[-6000:] + _logs(root / name)


def collocated(root: Path) -> list[dict[str, Any]]:
    """Three steps with a checkpoint after the second."""
    return run(root, "collocated", *COLLOCATED, "runner.save_interval=2", fault="saved-once")


def fresh_difference(root: Path) -> float:
    """What engines that read ``hf_model/`` of step 2 themselves differ by from an actor that has these weights."""
    collocated(root)
    checkpoint = root / "collocated" / "checkpoints" / "global_step_2"
    lines = run(
        root, "fresh", *COLLOCATED, f"runner.resume_dir={checkpoint}", f"rollout.model.model_path={checkpoint}/actor/hf_model",
        "rollout.validate_weight=True", "rollout.sleep_level=1", "runner.max_steps=3", "runner.save_interval=-1",
        fault="never-synced",
    )  # fmt: skip
    assert [line["step"] for line in lines] == [3]
    return lines[0]["rollout/logprob_diff_mean"]


def test_a_collocated_run_agrees_as_fresh_engines_do(root):
    lines = collocated(root)
    check_steps(lines, fresh_difference(root))
    for line in lines:
        # Each engine reads half of its weights from another GPU, and they leave between steps.
        assert 0.4 < line["sync/staged_bytes"] / line["sync/bytes"] < 0.6, line
        moves = {name: round(line[name], 3) for name in line if name.startswith(("time/engine_", "time/actor/o"))}
        assert len(moves) == 4 and all(moves.values()), moves
    print(moves)


def test_a_disaggregated_run_agrees_as_fresh_engines_do(root):
    """The actor on half of the GPUs, engines of TP=1 on the others."""
    check_steps(run(root, "disaggregated", *DISAGGREGATED, "runner.save_interval=-1"), fresh_difference(root))


def test_engines_generate_a_step_ahead_while_the_actor_trains(root):
    """Only the first step's samples are of the weights that train on them. Sides work at once, which shows in their idle shares."""
    lines = run(root, "ahead", *DISAGGREGATED, "runner.save_interval=-1", "runner.async_steps=1")
    assert [line["rollout/version_lag"] for line in lines] == [0, 1, 1]
    assert [line["sync/version"] for line in lines] == list(range(STEPS))
    assert lines[0]["rollout/logprob_diff_mean"] <= OTHER_VERSION * fresh_difference(root)
    for name in ("disaggregated", "ahead"):
        shares = [
            {part: round(line[f"perf/{part}"], 2) for part in ("idle", "actor_idle", "engine_idle")} for line in read_metrics(root / name)
        ]
        print(f"{name}: {shares}", flush=True)
    both = lines[1]["time/rollout"] + lines[1]["time/actor/inference"] + lines[1]["time/actor/training"]
    print(f"step 2: {lines[1]['time/step']:.2f} s, one after the other {both:.2f} s", flush=True)


def test_without_a_sync_engines_and_actor_part(root):
    """The negative control: synced before the first step alone. A sleep would drop the weights, so the engines keep theirs."""
    lines = run(root, "unsynced", *DISAGGREGATED, "runner.save_interval=-1", fault="no-sync")
    differences, expected = [line["rollout/logprob_diff_mean"] for line in lines], fresh_difference(root)
    assert differences[0] <= OTHER_VERSION * expected, (differences, expected)
    assert min(differences[1:]) > CONTROL * expected, (differences, expected)


def test_a_resumed_run_goes_on_where_it_stopped(root):
    """The order of sums on GPUs differs from run to run, so numbers are close and not equal; prompts and their order are equal."""
    whole, checkpoint = collocated(root), root / "collocated" / "checkpoints" / "global_step_2"
    resumed = run(root, "resumed", *COLLOCATED, f"runner.resume_dir={checkpoint}", "runner.save_interval=-1")
    assert [line["step"] for line in resumed] == [3]
    check_steps(resumed, fresh_difference(root), first_version=2)
    first, same = resumed[0], whole[2]
    assert first["rollout/prompt_length"] == same["rollout/prompt_length"]
    assert first["actor/training/actor/lr"] == pytest.approx(same["actor/training/actor/lr"], rel=1e-6)
    for name in ("rollout/reward_scores", "rollout/response_length", "actor/training/actor/grad_norm"):
        assert first[name] == pytest.approx(same[name], rel=0.1, abs=1e-3), (name, first[name], same[name])


def check_steps(lines: list[dict[str, Any]], fresh_difference: float, *, first_version: int = 0) -> None:
    assert [line["sync/version"] for line in lines] == list(range(first_version, STEPS))
    trained = [line["actor/training/actor/grad_norm"] for line in lines[: STEPS - first_version - 1]]
    assert all(norm > 0 for norm in trained), f"weights that stay cannot show a missing sync: {trained}"
    differences = [line["rollout/logprob_diff_mean"] for line in lines]
    assert max(differences) <= OTHER_VERSION * fresh_difference, (differences, fresh_difference)
    # Of the version, and for the prompts, that the fresh engines had, if trained by other sums where the placement is another.
    assert differences[-1] <= SAME_VERSION * fresh_difference, (differences, fresh_difference)


def _write_problems(folder: Path) -> None:
    """Problems whose answer is one digit, so that a model that answers with some digit is right now and then; and such answers."""
    if (folder / "supervised.jsonl").exists():
        return
    gsm8k = os.environ.get("RLSYNC_GSM8K_DIR")
    lines = _made_up() if gsm8k is None else [json.loads(line) for line in Path(gsm8k, "train.jsonl").open(encoding="utf-8")]
    kept = [line for line in lines if len(line["answer"].rsplit("#### ", 1)[-1]) == 1 and len(line["question"].encode()) <= 288]
    assert len(kept) >= 256, len(kept)
    print(f"{len(kept)} problems of {'GSM8K' if gsm8k else 'its form'}")
    (folder / "problems.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    digits = random.Random(0)
    supervised = [{"prompt": line["question"], "response": f"#### {digits.randrange(10)}"} for line in kept]
    (folder / "supervised.jsonl").write_text("".join(json.dumps(line) + "\n" for line in supervised))


def _made_up() -> list[dict[str, str]]:
    draw = random.Random(0)
    question = "Ann has {} apples and buys {} more. How many apples does Ann have now?"
    pairs = [(draw.randrange(5), draw.randrange(5)) for _ in range(1024)]
    return [{"question": question.format(a, b), "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in pairs]


def _logs(folder: Path) -> str:
    """The ends of the workers' logs, where a run failed."""
    return "".join(f"\n--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(folder.glob("worker_logs/*.log")))
