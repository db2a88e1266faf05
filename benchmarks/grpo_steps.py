"""Steps of GRPO with random weights of released shapes: seconds by phase, idle shares, tokens a second, memory.

``python -m benchmarks.grpo_steps --model qwen2.5-1.5b --actor 0 --rollout 1`` runs ``examples/reasoning/main_grpo.py`` on problems of one
sentence made on the spot; ``--model qwen2.5-vl-3b`` asks about drawn pictures. Random weights end an answer next to never, so that each has
``--answer`` tokens. What ``--check`` predicts of the actor's memory stands beside what was measured. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.vlm_sft import REPOSITORY, SIZES, make_folder, make_rows, save_random_model
from rlsync.cli.shapes import SHAPES
from workers.metrics_log import read_metrics
from workers.synthetic import make_byte_tokenizer

_PICTURES = "qwen2.5-vl-"
# The first step compiles, and the second takes the pinned memory for what is offloaded.
_WARM = 2


def text_overrides(a: argparse.Namespace, root: Path) -> list[str]:
    """A folder of ``a.model``'s shapes with a token for each byte, and problems of GSM8K's form."""
    tokenizer = make_byte_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**{**SHAPES[a.model], **ids, **json.loads(a.shape)})
    save_random_model(lambda: AutoModelForCausalLM.from_config(config), root / "model")
    tokenizer.save_pretrained(root / "model")
    problems = root / "problems.jsonl"
    draw = random.Random(0)
    idle = " Then nothing happens." * (a.question // 22)
    with problems.open("w") as file:
        for _ in range(4 * a.prompts):
            x, y = draw.randrange(100), draw.randrange(100)
            row = {"question": f"Ann has {x} apples and buys {y} more.{idle} How many has she?", "answer": f"{x} + {y}\n#### {x + y}"}
            file.write(json.dumps(row) + "\n")
    return [
        "--config-name", "qwen2.5-1.5b-grpo-megatron", f"rollout.model.model_path={root}/model", f"data.train_data_paths=[{problems}]",
        "data.prompt_key=question", "data.answer_key=answer",
        "runner.max_tokens_per_mbs=16384", "algorithm.logprob_forward_max_tokens=32768",
        "actor.model.precision=bf16", "actor.optim.fp16=null", "actor.optim.loss_scale=null",
    ]  # fmt: skip


def picture_overrides(a: argparse.Namespace, root: Path) -> list[str]:
    """A folder of Qwen2.5-VL's shapes with its processor, and square pictures with questions."""
    size = a.model.removeprefix(_PICTURES)
    make_folder(root / "model", size, None)
    rows = make_rows(root / "rows", side=a.side, answer=8, count=4 * a.prompts)
    return [
        "--config-name", "qwen2_5_vl-grpo", f"rollout.model.model_path={root}/model", f"data.train_data_paths=[{rows}]",
        "data.prompt_key=question", "data.answer_key=answer", "data.choice_key=null",
        "algorithm.training_batch_size_per_gpu=8", "algorithm.logprob_forward_max_tokens=16384",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=(*SHAPES, *(_PICTURES + size for size in SIZES)), default="qwen2.5-1.5b")
    parser.add_argument("--shape", default="{}", help="JSON with other values of the model's config.json, as of a smaller one")
    parser.add_argument("--actor", default="0", help="cluster.component_placement of the actor, as 0-1")
    parser.add_argument("--rollout", default="0", help="of the engines")
    parser.add_argument("--tp", type=int, default=1, help="of the actor")
    parser.add_argument("--prompts", type=int, default=64, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--question", type=int, default=0, help="tokens that a question about no pictures has besides its own 60")
    parser.add_argument("--answer", type=int, default=1024, help="tokens of an answer")
    parser.add_argument("--side", type=int, default=448, help="of a picture in pixels; a feature covers 28 x 28")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="that keeps the run and its logs; default: a temporary one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    a = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as name:
        found = _run(a, a.folder or Path(name))
    print(json.dumps(found, indent=1))
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n")


def _run(a: argparse.Namespace, root: Path) -> dict[str, Any]:
    model = picture_overrides(a, root) if a.model.startswith(_PICTURES) else text_overrides(a, root)
    longest_prompt = 128 + (a.side // 28) ** 2 + a.question
    command = [
        sys.executable, str(REPOSITORY / "examples/reasoning/main_grpo.py"), *model,
        "~cluster.component_placement", f"+cluster.component_placement={{actor: '{a.actor}', rollout: '{a.rollout}', reward: '0'}}",
        f"runner.output_dir={root}", "runner.experiment_name=run", f"runner.max_steps={a.steps + _WARM}", "runner.save_interval=-1",
        "runner.max_epochs=1000", "runner.logger.logger_backends=[]", "data.val_data_paths=[]", "runner.val_check_interval=-1",
        f"runner.seq_length={longest_prompt + a.answer}", f"data.max_prompt_length={longest_prompt}",
        f"algorithm.sampling_params.max_new_tokens={a.answer}", f"data.rollout_batch_size={a.prompts}", f"algorithm.group_size={a.group}",
        "algorithm.n_minibatches=2", "algorithm.early_stop_imp_ratio=null",
        f"actor.model.tensor_model_parallel_size={a.tp}", f"actor.model.sequence_parallel={a.tp > 1}",
        "rollout.max_running_requests=512", "rollout.cuda_graph_max_bs=512", "data.num_workers=0", *a.overrides,
    ]  # fmt: skip
    checked = json.loads(subprocess.run([*command, "--check", "--json"], cwd=REPOSITORY, check=False, stdout=subprocess.PIPE).stdout)
    if checked["findings"]:
        raise SystemExit("\n".join(finding["text"] for finding in checked["findings"]))
    print("memory:", json.dumps(checked["memory"]), flush=True)
    if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
        raise SystemExit("".join(path.read_text(errors="replace")[-4000:] for path in sorted((root / "run").rglob("*.log"))))
    lines = read_metrics(root / "run")[_WARM:]
    names = dict.fromkeys(key for line in lines for key in line if key.startswith(("time/", "perf/", "sync/", "rollout/")))
    return {
        "command": " ".join(["python -m benchmarks.grpo_steps", *sys.argv[1:]]),
        "steps": len(lines),
        "predicted_memory": checked["memory"],
        "median": {key: statistics.median(line[key] for line in lines if key in line) for key in names},
        "lines": lines,
    }  # fmt: skip


if __name__ == "__main__":
    main()
