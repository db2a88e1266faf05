"""What log-probabilities cost an engine: seconds and tokens a second of the same prompts, asked of all, of every eighth, and of none.

``python -m benchmarks.generation --model qwen2.5-1.5b --out found.json`` starts one engine with random weights of released shapes, which
end an answer next to never, and has it answer in turns; the first round warms up and is not counted. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.vlm_sft import save_random_model
from rlsync.cli.shapes import SHAPES
from rlsync.engine import Engine
from workers.rollout import some_with_logprobs

_ASKED = ("all", "every eighth", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--shape", default="{}", help="JSON with other values of the model's config.json, as of a smaller one")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--prompt", type=int, default=60, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON with other fields of vllm.AsyncEngineArgs")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = _run(a, Path(name))
    print(json.dumps(found, indent=1))
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n")


def _run(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = AutoConfig.for_model(**{**SHAPES[a.model], **json.loads(a.shape)})
    save_random_model(lambda: AutoModelForCausalLM.from_config(config), folder)
    total = a.prompts * a.group
    args = {
        "model": str(folder), "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": a.prompt + a.answer, "max_num_seqs": total,
        "logprobs_mode": "processed_logprobs", "disable_log_stats": True, "seed": 0,
    }  # fmt: skip
    engine = Engine("engine", {**args, **a.engine})
    engine.start()
    try:
        rounds = [{asked: _seconds(engine, a, asked, number) for asked in _ASKED} for number in range(a.rounds + 1)][1:]
    finally:
        engine.close()
    median = {asked: statistics.median(each[asked] for each in rounds) for asked in _ASKED}
    return {
        "command": shlex.join(["python", "-m", "benchmarks.generation", *sys.argv[1:]]),
        "seconds": rounds,
        "median": median,
        "tokens_per_s": {asked: total * a.answer / seconds for asked, seconds in median.items()},
        "times_as_long_as_none": {asked: seconds / median["none"] for asked, seconds in median.items()},
    }


def _seconds(engine: Engine, a: argparse.Namespace, asked: str, number: int) -> float:
    """Of prompts that the engine has not seen."""
    draw = random.Random(f"{asked} {number}")
    prompts = [[draw.randrange(256, 4096) for _ in range(a.prompt)] for _ in range(a.prompts)]
    fields = {"n": a.group, "temperature": 1.0, "max_tokens": a.answer, "ignore_eos": True, "logprobs": 0 if asked == "all" else None}
    begun_s = time.monotonic()
    groups = engine.generate(prompts, some_with_logprobs(fields, a.prompts) if asked == "every eighth" else fields)
    took_s = time.monotonic() - begun_s
    assert all(len(answer.token_ids) == a.answer for group in groups for answer in group)
    return took_s


if __name__ == "__main__":
    main()
