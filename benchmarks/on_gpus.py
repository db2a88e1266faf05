"""Everything of this repository that takes GPUs, as rows of one table: tests that share GPUs, and measurements that have theirs alone.

``python -m benchmarks.on_gpus --seconds 570 --out DIR`` runs rows in their order while there is time, and ends what is not over by then.
``--rows 'transports,experts@1:deepseek or moonlight,train-30b:--set moe_router_fusion=True'`` takes those, in that order, on as many
GPUs as ``@`` says; words behind a colon choose among tests, and are added to any other command. DIR keeps a log a row, what benches
write, and ``passed``: rows that passed are not run again by the next call of the same program, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.vlm_sft import make_outline
from rlsync.cli.shapes import SHAPES

_ROOT = Path(__file__).resolve().parents[1]
# Tests on a GPU at once: engines take a share of its memory each, and processes a core.
_SHARING = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A command, where ``{out}`` is the row's folder and ``{configs}`` one of config.json files of models with fewer layers,
    and folders of models that take pictures, without weights."""

    command: str
    num_gpus: int
    limit_s: float = 400
    # Beside other rows on its GPUs.
    shares: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def _tests(files: str, num_gpus: int, lanes: int = 0) -> Row:
    """``lanes``: tests at a time; what a lane's tests print comes at the end, or not at all where time ends them."""
    shown = f"-v -rP --numprocesses={lanes}" if lanes else "-sv"
    # Where float32 is compared, products must be of float32.
    return Row(f"pytest {shown} {files}", num_gpus, limit_s=900, shares=True, environment={"NVIDIA_TF32_OVERRIDE": "0"})


def _files(*names: str) -> str:
    return " ".join(f"tests/gpu/test_{name}.py" for name in names)


_FUSED = (
    "--set apply_rope_fusion=True --set bias_activation_fusion=True --set bias_dropout_fusion=True --set gradient_accumulation_fusion=True"
)
_BENCH = "rlsync bench --out {out} --model"
_TRAIN_7B = (
    f"{_BENCH} qwen2.5-7b --train --layers te --actor tp=2 --score-micro-batch-tokens 32768 --steps 4 --warmup 2 --profile "
    f"--set sequence_parallel=True {_FUSED} --sequences"
)
_SPREAD = f"{_BENCH} qwen2.5-1.5b --train --layers te --sequences 64 --lengths spread --sequence-length 4096 --steps 4 --warmup 2 {_FUSED}"
_EXPERTS = (
    f"rlsync bench --out {{out}} --train --layers te --sequences 16 --micro-batch-tokens 16384 --score-micro-batch-tokens 32768 --steps 4 "
    f"--warmup 2 --profile {_FUSED} --set moe_permute_fusion=True --model {{configs}}/qwen3-30b-a3b"
)
_RECOMPUTED = "--set recompute_granularity=full --set recompute_method=uniform --set recompute_num_layers=1"
_STEPS = "benchmarks.grpo_steps --answer 512 --steps 2 --folder {out} --out {out}/found.json"
# What fits beside engines: all but gradients.
_BESIDE = "actor.offload_weight=False actor.offload_optimizer=False rollout.gpu_memory_utilization=0.4"
_STEPS_7B = (
    "benchmarks.grpo_steps --model qwen2.5-7b --answer 512 --steps 1 --folder {out} --out {out}/found.json "
    "actor.model.recompute_granularity=full actor.model.recompute_method=uniform actor.model.recompute_num_layers=1"
)
_PICTURES = "benchmarks.vlm_sft --out {out}/found.json --tp 2 --rows 16 --steps 4 data.num_workers=8"
_KEPT = "actor.model.recompute_granularity=null actor.model.recompute_method=null actor.model.recompute_num_layers=null"
_STAYS = "actor.offload_weight=False actor.offload_grad=False actor.offload_optimizer=False"

ROWS: dict[str, Row] = {
    # Tests.
    "transports": _tests(_files("ipc_sync"), 2),
    "messages": _tests(_files("nccl_sync", "nccl_communicators"), 2),
    "adapters": _tests(_files("adapters_cuda"), 2, lanes=2),
    "lora": _tests(_files("lora_cuda"), 2),
    "merge": _tests(_files("merge_cuda"), 1),
    "packing": _tests(_files("layers_cuda", "packing_cuda"), 2),
    "freshness": _tests(_files("freshness_cuda", "offload_cuda"), 2),
    "pictures": _tests(_files("pictures_cuda"), 1),
    "sinks": _tests(_files("sinks_cuda", "copy_cuda"), 2),
    "experts": _tests(_files("families_cuda"), 2, lanes=12),
    "engines": _tests(_files("engines_cuda"), 2),
    "oracle": _tests(_files("engine_cuda"), 2, lanes=2),
    "logits": _tests(_files("bridge_nccl"), 2),
    "replay": _tests(_files("router_replay_cuda"), 1),
    "balance": _tests(_files("balance_cuda"), 1),
    "shared-experts": _tests(_files("shared_experts_cuda"), 2),
    "placement": _tests(_files("grpo_placement_cuda"), 2),
    "faults": Row(f"pytest -sv {_files('faults_cuda')}", 2),
    "peers": Row(f"pytest -sv {_files('bench_cuda')}", 2),
    # Syncs.
    "sync-7b": Row(f"{_BENCH} qwen2.5-7b --actor tp=1 --rollout tp=1 --steps 10 --peers none", 1),
    "sync-30b": Row(f"{_BENCH} qwen3-30b-a3b --actor tp=2,ep=2 --rollout tp=2 --steps 5 --peers none", 2),
    "sync-30b-apart": Row(
        f"{_BENCH} {{configs}}/qwen3-30b-a3b-32.json --placement disaggregated --transport ipc,nccl "
        "--steps 3 --warmup 2 --peers vllm-nccl",
        2,
    ),
    "sync-moonlight": Row(f"{_BENCH} moonlight-16b --actor tp=1,dp=2,ep=2 --rollout tp=2 --steps 4 --warmup 2 --peers none", 2),
    "sync-vlm-7b": Row(f"{_BENCH} {{configs}}/qwen2.5-vl-7b --actor tp=2 --rollout tp=2 --steps 10 --peers none", 2),
    "lora-7b": Row(f"{_BENCH} qwen2.5-7b --lora 32 --steps 10 --warmup 3", 1),
    "lora-30b": Row(f"{_BENCH} {{configs}}/qwen3-30b-a3b-16.json --lora 32 --steps 5 --warmup 2", 1),
    "lora-30b-whole": Row(
        f"{_BENCH} qwen3-30b-a3b --lora 32 --actor tp=2,ep=2 --rollout tp=2 --steps 4 --warmup 2 --peers none "
        f"--bucket-bytes {2**28},{2**30}",
        2,
    ),
    "merging-7b": Row("benchmarks.merging", 1),
    "merging-30b": Row("benchmarks.merging --shapes '30B-A3B, experts of 16 layers'", 1),
    # Training.
    "train-7b": Row(f"{_TRAIN_7B} 8", 2),
    "train-7b-pairs": Row(f"{_TRAIN_7B} 16 --micro-batch-tokens 8192", 2),
    "train-30b": Row(f"{_EXPERTS}-12.json --actor dp=2,ep=2", 2),
    "train-30b-one": Row(f"{_EXPERTS}-8.json", 1),
    "train-30b-one-by-expert": Row(f"{_EXPERTS}-8.json", 1, environment={"NVTE_USE_CUTLASS_GROUPED_GEMM": "0"}),
    "padded-16k": Row(f"{_SPREAD} --micro-batch-tokens 16384 --score-micro-batch-tokens 32768", 1),
    "packed-16k": Row(f"{_SPREAD} --micro-batch-tokens 16384 --score-micro-batch-tokens 32768 --packing", 1),
    "long-7b": Row(
        f"{_BENCH} qwen2.5-7b --train --layers te --actor cp=2 --sequence-length 131072 --sequences 1 --steps 2 --warmup 1 "
        f"--chunk-tokens 4096 {_FUSED} {_RECOMPUTED}",
        2,
    ),
    "vlm-3b": Row(f"{_PICTURES} --size 3b --micro 8", 2),
    "vlm-7b": Row(f"{_PICTURES} --size 7b --micro 2 --engine 0-1", 2),
    "steps-apart": Row(f"{_STEPS} --actor 0 --rollout 1 {_STAYS} {_KEPT}", 2),
    "steps-ahead": Row(f"{_STEPS} --actor 0 --rollout 1 {_STAYS} {_KEPT} runner.async_steps=1", 2),
    "steps-collocated": Row(f"{_STEPS} --actor 0-1 --rollout 0-1 {_KEPT}", 2),
    "generation": Row("benchmarks.generation --out {out}/found.json", 1),
    # Answers are what takes time, so that questions make rows long; memory is the same.
    "steps-7b": Row(f"{_STEPS_7B} --actor 0-1 --rollout 0-1 {_BESIDE}", 2),
    # An optimizer of 7B has no room beside the gradients of one GPU.
    "steps-7b-apart": Row(
        f"{_STEPS_7B} --prompts 32 --actor 0 --rollout 1 {_STAYS} actor.optim.optimizer_cpu_offload=True "
        "actor.optim.optimizer_offload_fraction=0.5",
        2,
    ),
    "steps-7b-long": Row(
        f"{_STEPS_7B} --actor 0-1 --rollout 0-1 {_BESIDE} --question 31872 --prompts 2 --group 2 runner.max_tokens_per_mbs=32768", 2
    ),
    "steps-pictures": Row(f"{_STEPS} --model qwen2.5-vl-3b --actor 0 --rollout 1 --prompts 32 {_STAYS} {_KEPT}", 2),
    "steps-pictures-collocated": Row(
        f"{_STEPS} --steps 1 --model qwen2.5-vl-3b --actor 0-1 --rollout 0-1 --prompts 16 {_KEPT} {_BESIDE}", 2
    ),
    "saves-7b": Row(
        "benchmarks.checkpoint --model qwen2.5-7b --rounds 1 --without-waiting --folder {out} --json {out}/found.json", 2
    ),
    "saves": Row("benchmarks.checkpoint --model qwen2.5-1.5b --rounds 2 --folder {out} --json {out}/found.json", 2),
}  # fmt: skip
_LAYERS = {"qwen3-30b-a3b": (8, 12, 16, 32)}


@dataclass(slots=True)
class Running:
    """A row at work."""

    name: str
    row: Row
    gpus: tuple[int, ...]
    process: subprocess.Popen[bytes]
    began_s: float

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.began_s + self.row.limit_s


def _gpus_for(row: Row, num_gpus: int, running: list[Running]) -> tuple[int, ...] | None:
    """Devices that the row may start on now: those with the fewest rows."""
    rows = {gpu: [one.row for one in running if gpu in one.gpus] for gpu in range(num_gpus)}
    free = [
        gpu for gpu, others in rows.items()
        if not others or (row.shares and len(others) < _SHARING and all(other.shares for other in others))
    ]  # fmt: skip
    chosen = sorted(free, key=lambda gpu: len(rows[gpu]))[: row.num_gpus]
    return tuple(sorted(chosen)) if len(chosen) == row.num_gpus else None


def _row(name: str) -> Row:
    """The row of ``NAME``, ``NAME:WORDS``, ``NAME@GPUS`` or ``NAME@GPUS:WORDS``. Raises KeyError and ValueError."""
    place, _, words = name.partition(":")
    base, _, count = place.partition("@")
    row = ROWS[base]
    if words:
        words = f" -k {shlex.quote(words)}" if row.command.startswith("pytest ") else f" {words}"
    command = row.command + words
    return replace(row, command=command, num_gpus=int(count) if count else row.num_gpus)


def _start(name: str, row: Row, gpus: tuple[int, ...], out: Path, configs: Path) -> Running:
    folder = out / _file_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **row.environment, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONUNBUFFERED": "1"}
    environment |= {"RLSYNC_RUNS_DIR": str(out / "runs")}
    # A row starts many processes, each of which would compile all sources of its own that it imports: twenty seconds for vLLM's.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    words = row.command.format(out=folder, configs=configs)
    with (out / f"{_file_name(name)}.log").open("wb") as log:
        # A group of its own, so that all of it can be ended.
        process = subprocess.Popen(
            f"exec {sys.executable} -m {words}", shell=True, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Running(name, row, gpus, process, time.monotonic())


def _file_name(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name)


def _end(one: Running) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(one.process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(1)


def run(names: list[str], seconds: float, out: Path, num_gpus: int) -> bool:
    """Whether all passed. A row waits for GPUs; while one waits for GPUs of its own, no later one starts."""
    configs = out / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    for model, depths in _LAYERS.items():
        for depth in depths:
            (configs / f"{model}-{depth}.json").write_text(json.dumps({**SHAPES[model], "num_hidden_layers": depth}))
    make_outline(configs / "qwen2.5-vl-7b", "7b", None)
    deadline_s = time.monotonic() + seconds
    waiting, running, is_right = list(names), list[Running](), True
    try:
        while (waiting or running) and time.monotonic() < deadline_s:
            for one in [one for one in running if one.is_over]:
                running.remove(one)
                is_right &= _ended(one, out)
            while waiting and (gpus := _gpus_for(row := _row(waiting[0]), num_gpus, running)) is not None:
                running.append(_start(waiting.pop(0), row, gpus, out, configs))
            time.sleep(0.5)
    finally:
        # Also where the user interrupts: rows are sessions of their own.
        for one in running:
            is_right &= _ended(one, out)
    for name in waiting:
        print(f"unstarted        {name}", flush=True)
    return is_right and not waiting


def _ended(one: Running, out: Path) -> bool:
    """Whether a row has passed, which its mark says from then on. Ends it where it has not ended by itself."""
    code = one.process.poll()
    _end(one)
    how = "no time" if code is None else "passed" if code == 0 else "failed"
    print(f"{how:8} {time.monotonic() - one.began_s:5.0f} s  {one.name} on {one.gpus}", flush=True)
    if code == 0:
        _mark(one.name, out).write_text(_sources())
    return code == 0


def _mark(name: str, out: Path) -> Path:
    return out / "passed" / _file_name(name)


@cache
def _sources() -> str:
    """A digest of the program: what passed before it was changed has not passed."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for top in ("rlsync", "workers", "benchmarks", "tests", "configs") for path in (_ROOT / top).rglob("*.[py]*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", help=f"of {', '.join(ROWS)}; default: all")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=Path("on-gpus"))
    parser.add_argument("--again", action="store_true", help="also rows that passed before")
    a = parser.parse_args()
    names = list(ROWS) if a.rows is None else a.rows.split(",")
    if unknown := [name for name in names if re.split("[:@]", name)[0] not in ROWS]:
        parser.error(f"no such rows: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    num_gpus = torch.cuda.device_count()
    for name in names:
        if (wanted := _row(name).num_gpus) > num_gpus:
            parser.error(f"{name} takes {wanted} GPUs, and there are {num_gpus}; leave it out with --rows")
    (a.out / "passed").mkdir(parents=True, exist_ok=True)
    if not a.again:
        names = [name for name in names if not (mark := _mark(name, a.out)).exists() or mark.read_text() != _sources()]
    return 0 if run(names, a.seconds, a.out.resolve(), num_gpus) else 1


if __name__ == "__main__":
    sys.exit(main())
