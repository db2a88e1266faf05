"""A run of supervised fine-tuning itself, shortened: script in, files out. Real Megatron ranks, real vLLM, real Ray."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.greedy import greedy
from tests.integration.script_runs import exit_code, run, started, strike, title
from workers.metrics_log import read_metrics

# A run takes a minute, or several beside others.
pytestmark = pytest.mark.slow

SCRIPT = [
    "bash", "examples/sft/run_llm_sft.sh", "arithmetic.num_supervised=4096", "arithmetic.num_held_out=60", "arithmetic.max_operand=9",
    "runner.max_epochs=100", "actor.global_batch_size=32", "actor.micro_batch_size=8", "actor.lr_sched.lr_warmup_iters=2",
    "weight_sync.timeout_s=40", "runner.save_interval=30", "runner.val_check_interval=30", "data.val_data_size=120",
    "data.val_data_paths=[${arithmetic.path}/held_out.jsonl,${arithmetic.path}/supervised.jsonl]",
]  # fmt: skip
WITHOUT_ENGINES = ("validation.generate=False", "~cluster.component_placement.rollout")
# What a resumed run has to the last bit.
SAME = ("train/loss", "train/lm_loss", "train/grad_norm", "train/learning_rate", "train/num_tokens", "val/loss")
LAST = 60


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Sixty steps with a checkpoint and a validation after the thirtieth and at the end, and a validation before the first."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, run(SCRIPT, folder, f"runner.max_steps={LAST}")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"global_step_{step}"


def test_the_loss_falls_and_everything_is_where_users_look_for_it(finished: tuple[Path, str]) -> None:
    folder, output = finished
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(LAST + 1))
    assert lines[-1]["train/lm_loss"] < lines[1]["train/lm_loss"] / 4 and lines[-1]["val/loss"] < lines[0]["val/loss"]
    assert all(line["train/loss"] == line["train/lm_loss"] and line["train/update_success"] == 1 for line in lines[1:])
    assert all(line[name] > 0 for line in lines[1:] for name in ("time/step", "time/training", "time/data_wait", "perf/throughput"))
    assert {"metrics.jsonl", "config.yaml", "losses.png", "tensorboard", "worker_logs"} <= {p.name for p in (folder / "run").iterdir()}
    assert (checkpoint(folder, LAST) / "data" / "data.pt").is_file() and (checkpoint(folder, LAST) / "actor" / "hf_model").is_dir()
    assert "starting 2 actor ranks (DP 2) and 1 engine" in output and f"validation after step {LAST}: loss" in output


def test_a_validation_is_what_transformers_says_of_the_checkpoint_of_its_step(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    files = [folder / "world" / name for name in ("held_out.jsonl", "supervised.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()][:120]
    found = {line["step"]: (line["val/loss"], line["val/exact_match"]) for line in read_metrics(folder / "run") if "val/loss" in line}
    assert sorted(found) == [0, LAST // 2, LAST]
    models = {0: folder / "world" / "model", LAST: checkpoint(folder, LAST) / "actor" / "hf_model"}
    assert found[0][1] == 0 and 0.4 < found[LAST][1] < 1, "half of the problems were taught"
    for step, model in models.items():
        assert found[step] == pytest.approx(transformers_validation(model, rows), rel=1e-5), step


def transformers_validation(folder: Path, rows: list[dict[str, str]]) -> tuple[float, float]:
    """Mean loss of the answers' tokens, and the share of rows that are answered exactly; a row at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses, right, end = [], 0, tokenizer.eos_token_id
    for row in rows:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["response"])["input_ids"], end]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
        said = greedy(folder, tuple(prompt), 4).token_ids
        said = said[: said.index(end)] if end in said else said
        right += tokenizer.decode(list(said), skip_special_tokens=True).strip() == row["response"]
    return sum(losses) / len(losses), right / len(rows)


def test_a_run_that_lost_a_rank_and_was_resumed_is_the_uninterrupted_one_bit_for_bit(finished: tuple[Path, str], tmp_path: Path) -> None:
    """No engine is started for either half, and the second reads ahead, which changes nothing for the training."""
    shutil.copytree(finished[0] / "world", tmp_path / "world")
    with started(SCRIPT, tmp_path, *WITHOUT_ENGINES, "runner.max_steps=3000") as process:
        family = strike(process, tmp_path, LAST // 2 + 5, rank_one, signal.SIGKILL)
        assert not any("EngineCore" in title(p) for p in family)
        assert exit_code(process, family) == 1
    output = (tmp_path / "output.log").read_text()
    assert "error: actor rank 1" in output and "Traceback" not in output, output[-3000:]
    resume = f"runner.resume_dir={checkpoint(tmp_path, LAST // 2)}"
    came_to = max(line["step"] for line in read_metrics(tmp_path / "run"))
    output = run(SCRIPT, tmp_path, *WITHOUT_ENGINES, f"runner.max_steps={LAST}", "data.num_workers=1", resume)
    assert f"metrics of steps {LAST // 2 + 1} to {came_to}, which this run" in " ".join(output.split())
    whole, resumed = read_metrics(finished[0] / "run"), read_metrics(tmp_path / "run")
    assert [line["step"] for line in resumed] == list(range(LAST + 1))
    assert [[line.get(name) for name in SAME] for line in resumed] == [[line.get(name) for name in SAME] for line in whole]
    wanted, found = (load_file(checkpoint(f, LAST) / "actor" / "hf_model" / "model.safetensors") for f in (finished[0], tmp_path))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def rank_one(family: list[psutil.Process]) -> psutil.Process:
    return next(p for p in family if "SftRank" in title(p) and p.environ().get("RANK") == "1")
