"""A run of supervised fine-tuning itself, shortened: script in, files out. Real Megatron ranks, real vLLM, real Ray."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.integration.script_runs import REPO, by_itself, environment, exit_code, output_of, run, started, strike, title
from workers.metrics_log import read_metrics

# A run takes a minute, or several beside others.
pytestmark = pytest.mark.slow

# Pictures of 84 pixels are made smaller, for the actor as for the engine.
MAX_PIXELS = 56 * 56
SMALL = [
    "pictures.path=${runner.output_dir}/world", "pictures.num_train=24", "pictures.num_held_out=8",
    "pictures.hidden_size=64", "pictures.num_layers=1", "pictures.vision_hidden_size=64", "pictures.vision_depth=1",
    "cluster.component_placement.actor=0-1", "runner.max_epochs=100", "actor.global_batch_size=8", "actor.micro_batch_size=4",
    "actor.lr_sched.lr_warmup_iters=2", "weight_sync.timeout_s=40", "runner.save_interval=30", "runner.val_check_interval=30",
    "data.val_data_paths=[${pictures.path}/held_out.jsonl,${pictures.path}/train.jsonl]", "data.val_data_size=24",
    f"data.max_pixels={MAX_PIXELS}", "data.num_workers=0", "runner.keep_last_n=4",
]  # fmt: skip
SCRIPT = ["bash", "examples/sft/run_vlm_sft.sh", *SMALL]
MAIN = [*by_itself("examples/sft/main_sft.py", "configs/sft", "pictures_sft_vlm"), *SMALL]
WITH_ENGINE = (
    "validation.generate=True",
    "validation.max_new_tokens=8",
    "cluster.component_placement.rollout=2",
    "rollout.enforce_eager=True",
    "rollout.vllm.num_gpu_blocks_override=256",
)
# What a resumed run has to the last bit.
SAME = ("train/loss", "train/lm_loss", "train/grad_norm", "train/learning_rate", "train/num_tokens", "val/loss")
LAST = 60


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Sixty steps with a checkpoint and a validation after the thirtieth and at the end, and a validation before the first. Checkpoints are
    written while training goes on."""
    folder = tmp_path_factory.mktemp("sft")
    return folder, run(SCRIPT, folder, *WITH_ENGINE, f"runner.max_steps={LAST}", "actor.megatron.async_save=True")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "run" / "checkpoints" / f"global_step_{step}"


def test_the_loss_falls_and_everything_is_where_users_look_for_it(finished: tuple[Path, str]) -> None:
    folder, output = finished
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(LAST + 1))
    assert lines[-1]["train/lm_loss"] < lines[1]["train/lm_loss"] / 4 and lines[-1]["val/loss"] < lines[0]["val/loss"]
    assert all(line["train/loss"] == line["train/lm_loss"] and line["train/update_success"] == 1 for line in lines[1:])
    assert all(line[name] > 0 for line in lines[1:] for name in ("time/training", "time/data_wait", "time/memory", "perf/throughput"))
    assert all(line["time/step"] > line["time/training"] + line["time/memory"] for line in lines[1:])
    assert all(line["train/vision_lr"] == line["train/projection_lr"] == line["train/learning_rate"] for line in lines[1:])
    made = {"metrics.jsonl", "config.yaml", "losses.png", "contact_sheet.png", "tensorboard", "worker_logs"}
    assert made <= {p.name for p in (folder / "run").iterdir()}
    assert (checkpoint(folder, LAST) / "data" / "data.pt").is_file() and (checkpoint(folder, LAST) / "actor" / "hf_model").is_dir()
    assert "starting 2 actor ranks (DP 2) and 1 engine" in output and f"validation after step {LAST}: loss" in output
    assert f"what the saved model answers to held-out pictures: {folder}/run/contact_sheet.png" in " ".join(output.split())


def test_a_validation_is_what_transformers_says_of_the_checkpoint_of_its_step(finished: tuple[Path, str]) -> None:
    """Loss by the actor, answers by the engine, of pictures within the limit of pixels."""
    folder, _ = finished
    world = folder / "world"
    rows = [json.loads(line) for name in ("held_out", "train") for line in (world / f"{name}.jsonl").read_text().splitlines()][:24]
    found = {line["step"]: line for line in read_metrics(folder / "run") if "val/loss" in line}
    assert sorted(found) == [0, LAST // 2, LAST] and len(rows) == 24
    assert all(line["sync/version"] == step and line["sync/bytes"] > 0 for step, line in found.items()), "the syncs of validations are told"
    assert found[0]["val/exact_match"] == 0 and 0.4 < found[LAST]["val/exact_match"] < 1, "the later rows were taught"
    models = {0: world / "model", LAST: checkpoint(folder, LAST) / "actor" / "hf_model"}
    for step, model in models.items():
        loss, share = transformers_validation(model, rows, world, max_pixels=MAX_PIXELS)
        assert found[step]["val/loss"] == pytest.approx(loss, rel=1e-5)
        assert found[step]["val/exact_match"] == found[step]["val/accuracy"] == share
    # The negative control: other pixels have another loss.
    assert transformers_validation(models[LAST], rows[:8], world)[0] != pytest.approx(
        transformers_validation(models[LAST], rows[:8], world, max_pixels=MAX_PIXELS)[0], rel=1e-3
    )


def transformers_validation(folder: Path, rows: list[dict[str, str]], pictures: Path, **limits: int) -> tuple[float, float]:
    """Mean loss of the answers' tokens, and the share of rows that are answered exactly, by the folder's own processor; a row at a time."""
    processor = AutoProcessor.from_pretrained(folder, **limits)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    losses, right = [], 0
    for row in rows:
        with Image.open(pictures / row["image"]) as image:
            asked = {"role": "user", "content": [{"type": "image", "image": image.copy()}, {"type": "text", "text": row["question"]}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
        prompt = processor.apply_chat_template([asked], add_generation_prompt=True, **options)
        whole = processor.apply_chat_template([asked, said], **options)
        begin = prompt["input_ids"].shape[1]
        # Behind the end of the answer's turn there is a line break.
        answer = whole["input_ids"][0, begin:-1]
        with torch.no_grad():
            logits = model(**whole).logits[0, begin - 1 : -2]
            tokens = model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, begin:]
        losses += torch.nn.functional.cross_entropy(logits, answer, reduction="none").tolist()
        right += processor.decode(tokens, skip_special_tokens=True).strip() == row["answer"]
    return sum(losses) / len(losses), right / len(rows)


def test_the_script_of_text_teaches_additions_without_an_engine(tmp_path: Path) -> None:
    output = run(
        by_itself("examples/sft/main_sft.py", "configs/sft", "arithmetic_sft_llm"), tmp_path,
        "arithmetic.path=${runner.output_dir}/world", "arithmetic.num_supervised=1024", "arithmetic.num_held_out=60",
        "arithmetic.max_operand=9", "actor.global_batch_size=32", "actor.micro_batch_size=16",
        "actor.lr_sched.lr_warmup_iters=2", "runner.max_steps=20", "runner.save_interval=-1", "runner.val_check_interval=20",
        "validation.generate=False", "~cluster.component_placement.rollout", "cluster.component_placement.actor=0",
    )  # fmt: skip
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["step"] == 20 and lines[-1]["train/lm_loss"] < lines[1]["train/lm_loss"] / 1.5
    assert lines[-1]["val/loss"] < lines[0]["val/loss"] and "val/exact_match" not in lines[-1] and "engine" not in output


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit_and_can_be_resumed_when_it_has_lost_a_rank(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """No engine is started, and pictures are decoded ahead, which changes nothing for the training."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("output.log", f"global_step_{LAST}"))
    resume = f"runner.resume_dir={checkpoint(tmp_path, LAST // 2)}"
    with started(MAIN, tmp_path, "runner.max_steps=3000", "data.num_workers=1", resume) as process:
        family = strike(process, tmp_path, LAST + 5, rank_one, signal.SIGKILL)
        assert not any("EngineCore" in title(p) for p in family)
        assert exit_code(process, family) == 1
    output = (tmp_path / "output.log").read_text()
    assert "error: actor rank 1" in output and "Traceback" not in output, output[-3000:]
    assert f"metrics of steps {LAST // 2 + 1} to {LAST}, which this run" in " ".join(output.split())
    checked = run(MAIN, tmp_path, "--check", "runner.max_steps=3000", "runner.resume_dir=auto")
    named = re.findall(rf"after step (\d+) of {re.escape(str(tmp_path))}", " ".join(checked.split()))
    assert any(int(step) >= LAST and int(step) % 30 == 0 for step in named), checked
    whole, resumed = read_metrics(finished[0] / "run"), read_metrics(tmp_path / "run")[: LAST + 1]
    assert [line["step"] for line in resumed] == list(range(LAST + 1))
    assert [[line.get(name) for name in SAME] for line in resumed] == [[line.get(name) for name in SAME] for line in whole]
    wanted, found = (load_file(checkpoint(f, LAST) / "actor" / "hf_model" / "model.safetensors") for f in (finished[0], tmp_path))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def rank_one(family: list[psutil.Process]) -> psutil.Process:
    return next(p for p in family if output_of(p).endswith("ActorGroup-1.log"))


RECIPES = ["bash", "examples/recipes/run.sh"]


def without_script(*flags: str) -> list[str]:
    """What a way to pretrain starts, by its own word."""
    printed = subprocess.run([*RECIPES, *flags, "--print"], cwd=REPO, env=environment(), check=True, capture_output=True, text=True).stdout
    shell, script, config, *keys = printed.split()
    assert (shell, script) == ("bash", "examples/sft/run_llm_sft.sh")
    return [*by_itself("examples/sft/main_sft.py", "configs/sft", config), *keys]


def test_each_way_to_pretrain_runs(tmp_path: Path) -> None:
    """A recipe, with a layout and a precision of one's own, becomes Hugging Face files and goes on with them; and a plain configuration.

    The loss of the recipe's last validation is transformers' of the converted checkpoint, and that of the first one of who goes on.
    Scripts check here; what they start is run without them.
    """
    flags = ["--recipe", "qwen3_30b_a3b", "--twin", "--ep", "2", "--devices", "0-1", "--precision", "bf16"]
    checked = run([*RECIPES, *flags, "--check"], tmp_path, "actor.megatron.mbridge=False")
    assert "2 ranks (DP 2 EP 2)" in checked, checked
    output = run(without_script(*flags), tmp_path, "actor.megatron.mbridge=False")
    assert "starting 2 actor ranks (DP 2)" in output
    losses = [line["val/loss"] for line in read_metrics(tmp_path / "run") if "val/loss" in line]
    made = tmp_path / "converted"
    subprocess.run(
        [*RECIPES, "--to-hf", str(checkpoint(tmp_path, 4)), str(made), "--model", str(tmp_path / "run" / "model")],
        cwd=REPO,
        env=environment(),
        check=True,
    )
    tokenizer, model = AutoTokenizer.from_pretrained(made), AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    lines = (tmp_path / "run" / "world" / "documents.jsonl").read_text().splitlines()
    ids = [token for line in lines for token in (*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id)]
    rows = torch.tensor(ids[: 8 * 64]).view(8, 64)
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item()
    assert found == pytest.approx(losses[-1], rel=5e-3) and losses[-1] < losses[0] - 0.3
    for way, first in ((["--recipe", "qwen3_30b_a3b", "--twin", "--hf", str(made)], found), (["--plain"], math.log(512))):
        folder = tmp_path / way[0].strip("-")
        run(
            without_script(*way),
            folder,
            "runner.max_steps=2",
            "runner.val_check_interval=2",
            "runner.save_interval=-1",
            "data.val_data_size=8",
        )
        before, after = (line["val/loss"] for line in read_metrics(folder / "run") if "val/loss" in line)
        assert before == pytest.approx(first, rel=5e-3 if "--hf" in way else 2e-2) and after != before
