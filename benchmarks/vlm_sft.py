"""Steps of supervised fine-tuning of a vision-language model with random weights: tokens a second, share of the peak, waits for data.

``python -m benchmarks.vlm_sft --size 3b --gpus 2 --tp 2 --layers te`` makes a folder of Qwen2.5-VL's shapes with a processor and drawn
pictures, and trains it with ``examples/sft/main_sft.py`` on ``configs/sft/qwen2_5_vl_megatron_sft_vlm.yaml``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rlsync.bench.floors import gb_per_s
from workers.metrics_log import read_metrics
from workers.picture_world import image_settings, make_vision_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
# Operations of dense bf16 arithmetic of an H200 in a second.
PEAK_FLOPS = 989e12
_MERGE, _PATCH = 2, 14
# Language model: hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied; the tower: hidden, feed-forward, depth, heads.
SIZES: dict[str, tuple[tuple[int, int, int, int, int, int, bool], tuple[int, int, int, int]]] = {
    "tiny": ((256, 512, 2, 2, 1, 256, True), (160, 320, 2, 2)),
    "3b": ((2048, 11008, 36, 16, 2, 151936, True), (1280, 3420, 32, 16)),
    "7b": ((3584, 18944, 28, 28, 4, 152064, False), (1280, 3420, 32, 16)),
}


def make_config(size: str, tokenizer: Any, num_layers: int | None) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL's shapes, with ``num_layers`` language layers (None: all), and the token ids of the tokenizer of drawn pictures."""
    (hidden, ffn, whole, heads, groups, vocabulary, tied), (width, tower_ffn, depth, tower_heads) = SIZES[size]
    layers = whole if num_layers is None else num_layers
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 32768, "initializer_range": 0.02,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": depth, "hidden_size": width, "intermediate_size": tower_ffn, "num_heads": tower_heads, "out_hidden_size": hidden,
            "patch_size": _PATCH, "spatial_merge_size": _MERGE, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": [i for i in range(depth) if i % 8 == 7] or [depth - 1], "initializer_range": 0.02,
        },
        tie_word_embeddings=tied, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="bfloat16", **ids,
    )  # fmt: skip


def save_random_model(make: Callable[[], Any], folder: Path) -> None:
    """A model of transformers with random bf16 weights, made on a GPU where there is one: a CPU takes a minute for billions of them."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = make()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    # The run wants all of a GPU's memory.
    torch.cuda.empty_cache()


def make_folder(folder: Path, size: str, num_layers: int | None) -> Qwen2_5_VLConfig:
    """config.json, random bf16 weights, tokenizer and processor."""
    config = make_outline(folder, size, num_layers)
    save_random_model(lambda: Qwen2_5_VLForConditionalGeneration(config), folder)
    return config


def make_outline(folder: Path, size: str, num_layers: int | None) -> Qwen2_5_VLConfig:
    """The same without weights."""
    tokenizer = make_vision_tokenizer()
    config = make_config(size, tokenizer, num_layers)
    config.architectures = [Qwen2_5_VLForConditionalGeneration.__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {**image_settings(), "min_pixels": 28 * 28, "max_pixels": 1280 * 28 * 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return config


def make_rows(folder: Path, *, side: int, answer: int, count: int) -> Path:
    """Square pictures of ``side`` pixels with a question and an answer of ``answer`` tokens each."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    rows = []
    for i in range(count):
        noise = Image.frombytes("RGB", (32, 32), draw.randbytes(32 * 32 * 3))
        noise.resize((side, side)).save(folder / f"{i}.jpg")
        text = "".join(draw.choice("abcdefgh ") for _ in range(answer))
        rows.append({"question": "What is in the picture?", "image": f"{i}.jpg", "answer": text})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flops_a_row(config: Qwen2_5_VLConfig, tokens: float, side: int) -> float:
    """Of a training step: 6 x parameters x tokens of the language model, and of the tower by patches, and the causal half of attention."""
    text, tower = config.text_config, config.vision_config
    head = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * head * 2 * (text.num_attention_heads + text.num_key_value_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    language = text.num_hidden_layers * layer + text.vocab_size * text.hidden_size
    block = 4 * tower.hidden_size**2 + 3 * tower.hidden_size * tower.intermediate_size
    patches = (side // _PATCH) ** 2
    causal = 6 * text.num_hidden_layers * text.hidden_size * tokens**2
    return 6 * language * tokens + 6 * tower.depth * block * patches + causal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--num-layers", type=int, help="of the language model, where the whole has no room")
    parser.add_argument("--gpus", type=int, default=2, help="0: one process on the CPU")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--layers", choices=("te", "local"), default="te")
    parser.add_argument("--side", type=int, default=896, help="of a picture in pixels; a feature covers 28 x 28")
    parser.add_argument("--answer", type=int, default=200, help="tokens of an answer")
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--engine", metavar="GPUS", help="an engine on these, as 0 or 0-1, is synced every second step, and answers 16 questions"
    )
    parser.add_argument("--folder", type=Path, help="that keeps model and pictures for the next run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value of the configuration")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = a.folder or Path(name)
        model = root / f"model-{a.size}{'' if a.num_layers is None else f'-{a.num_layers}'}"
        data = root / f"rows-{a.side}-{a.answer}"
        if not model.exists():
            began = time.monotonic()
            make_folder(model, a.size, a.num_layers)
            print(f"model made in {time.monotonic() - began:.0f} s", flush=True)
        rows = data / "rows.jsonl" if data.exists() else make_rows(data, side=a.side, answer=a.answer, count=max(64, 2 * a.rows))
        found = _run(a, model, rows, Path(name))
    print(json.dumps(found, indent=1))
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n")


def _beside_floor(syncs: list[dict[str, Any]], a: argparse.Namespace) -> None:
    """Into each sync to an engine on a GPU: seconds of a plain torch copy of its bytes, and the time of its copies over that."""
    if not syncs or not a.gpus:
        return
    workers = _gpus_of(a.engine)
    same = gb_per_s(workers[0], workers[0])
    others = [gb_per_s(source, workers[0]) for source in range(a.gpus) if source != workers[0]]
    for sync in syncs:
        # Workers take equal shares, each over links of its own.
        near, far = (sync[f"sync/bytes_same_{where}"] / 1e9 / len(workers) for where in ("device", "host"))
        floor_s = near / same + (far / max(others) if far else 0.0)
        sync |= {"floor_s": floor_s, "data_over_floor": sync["sync/pull_s"] / floor_s}


def _gpus_of(words: str) -> Sequence[int]:
    """Those of ``0`` or ``0-1``."""
    first, _, last = words.partition("-")
    return range(int(first), int(last or first) + 1)


def _engine(a: argparse.Namespace, rows: Path) -> tuple[str, ...]:
    return (
        f"+cluster.component_placement.rollout='{a.engine}'", f"rollout.tensor_parallel_size={len(_gpus_of(a.engine))}",
        f"data.val_data_paths=[{rows}]", "data.val_data_size=16",
        "validation.generate=True", "validation.max_new_tokens=32",
        "rollout.gpu_memory_utilization=0.25", "rollout.enforce_eager=True",
        "rollout.vllm.kv_cache_memory_bytes=4294967296", "weight_sync.timeout_s=120", "weight_sync.verify=full",
    )  # fmt: skip


def _run(a: argparse.Namespace, model: Path, rows: Path, root: Path) -> dict[str, Any]:
    warm = 3
    command = [
        sys.executable, str(REPOSITORY / "examples/sft/main_sft.py"), "--config-name", "qwen2_5_vl_megatron_sft_vlm",
        f"runner.output_dir={root}", "runner.experiment_name=run", f"runner.max_steps={a.steps + warm}", "runner.save_interval=-1",
        f"runner.val_check_interval={2 if a.engine else -1}", "runner.max_epochs=1000", "runner.logger.logger_backends=[]",
        f"data.train_data_paths=[{rows}]", *([] if a.engine else ["data.val_data_paths=[]"]), "data.answer_key=answer",
        "data.choice_key=null", "data.prompt_key=question",
        f"actor.model.model_path={model}", f"actor.micro_batch_size={a.micro}", f"actor.global_batch_size={a.rows}",
        f"actor.model.tensor_model_parallel_size={a.tp}", f"actor.spec_name={'te_gpt' if a.layers == 'te' else 'local_gpt'}",
        *(["actor.model.precision=fp32", "actor.optim.bf16=False", "data.num_workers=1"] if a.gpus == 0 else []),
        f"cluster.component_placement.actor='0-{max(1, a.gpus) - 1}'", *(_engine(a, rows) if a.engine else ()), *a.overrides,
    ]  # fmt: skip
    if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
        raise SystemExit("".join(path.read_text(errors="replace")[-4000:] for path in sorted((root / "run").rglob("*.log"))))
    read = read_metrics(root / "run")
    lines = [line for line in read if line["step"]][warm:]
    syncs = [{key: line[key] for key in line if key.startswith(("sync/", "val/"))} for line in read if "sync/seconds" in line]
    # Steps without a sync or a validation have no time of it.
    names = {key: None for line in lines for key in line if key.startswith(("time/", "perf/"))}
    median = {key: statistics.median(line[key] for line in lines if key in line) for key in names}
    step_s = median["time/training"] + median["time/data_wait"]
    tokens = median["perf/total_num_tokens"]
    _beside_floor(syncs, a)
    config = Qwen2_5_VLConfig.from_pretrained(model)
    flops = a.rows * flops_a_row(config, tokens / a.rows, a.side)
    return {
        "command": " ".join(["python -m benchmarks.vlm_sft", *sys.argv[1:]]),
        "size": a.size, "num_layers": config.text_config.num_hidden_layers,
        "layers": a.layers, "gpus": a.gpus, "steps": len(lines), "step_s": step_s,
        "tokens_a_row": tokens / a.rows, "tokens_a_second": tokens / step_s, "tokens_a_second_and_gpu": tokens / step_s / max(1, a.gpus),
        "share_of_peak": flops / step_s / (max(1, a.gpus) * PEAK_FLOPS), "data_wait_share": median["time/data_wait"] / step_s,
        "syncs": syncs,
        "losses": [line.get("train/loss", line.get("actor/training/loss")) for line in lines], "median": median,
    }  # fmt: skip


if __name__ == "__main__":
    main()
