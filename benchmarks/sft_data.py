"""Memory and speed of the loader of supervised fine-tuning over many rows, in one process without a model.

    python -m benchmarks.sft_data [--rows 1000000] [--batches 200] [--batch 64] [--workers 0] [--folder DIR]
    python -m benchmarks.sft_data --step 0.18 --batches 100 --batch 32 --workers 1      # rows with pictures

Writes a JSON lines file of prompts and answers (about 350 bytes a row), opens it, draws batches in a shuffled order, and resumes at the
end of them in a second loader. Prints seconds and resident memory after each, as ``VmRSS`` and ``VmHWM`` of /proc say, less what the
process has before it opens the data.

With ``--step`` the rows are those of the tiny default with pictures, and a step that sleeps as long follows each batch: what this process
waits for, as ``time/data_wait`` of a run, and the processor time that it spends on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoTokenizer

from workers.config.schema import PictureRecipe
from workers.picture_world import build_picture_world
from workers.pictures import load_picture_processor
from workers.row_files import RowFiles
from workers.row_loader import RowLoader
from workers.sft_data import ExampleEncoder, ExampleForm, RowExamples, SftExample
from workers.sft_rows import RowForm
from workers.synthetic import make_byte_tokenizer


def resident(field: str) -> float:
    """MiB of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--batches", type=int, default=200)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--workers", type=int, default=0)
    options.add_argument("--folder", type=Path)
    options.add_argument("--step", type=float, help="seconds")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        if chosen.step is None:
            measure(Path(folder) / "rows.jsonl", chosen)
        else:
            measure_waiting(Path(folder) / "world", chosen)


def measure_waiting(path: Path, chosen: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    world = build_picture_world(path, PictureRecipe(num_train=64 * chosen.batch, num_held_out=1))
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pictures = load_picture_processor(world.model_path, token, min_pixels=None, max_pixels=None)
    encode = ExampleEncoder(tokenizer, ExampleForm(96), pictures)
    form = RowForm("vlm", "question", "answer", image_keys=("image",))
    source = RowExamples(RowFiles([str(world.train_path)]), form, encode, on_bad_sample="error", on_too_long="error")
    batches = iter(RowLoader(source, chosen.batch, num_epochs=1 + chosen.batches // 64, num_workers=chosen.workers))
    waits, spent = [], []
    for _ in range(chosen.batches):
        began, used = time.perf_counter(), time.thread_time()
        next(batches)
        waits.append(time.perf_counter() - began)
        spent.append(time.thread_time() - used)
        time.sleep(chosen.step)
    # Processes start for the first.
    mean, median = (of(waits[1:]) for of in (statistics.mean, statistics.median))
    print(
        f"{chosen.batch} pictures a batch, {chosen.workers} processes, steps of {chosen.step} s: waits {1e3 * mean:.2f} ms (median "
        f"{1e3 * median:.2f}), {mean / chosen.step:.1%} of a step; {1e3 * statistics.mean(spent[1:]):.2f} ms of processor time"
    )


def measure(path: Path, chosen: argparse.Namespace) -> None:
    with path.open("w") as stream:
        for row in range(chosen.rows):
            stream.write(json.dumps({"prompt": f"{row}: {'what? ' * 40}", "response": "so it is. " * 5}) + "\n")
    tokenizer = make_byte_tokenizer()
    before, began = resident("VmRSS"), time.perf_counter()

    def told(what: str) -> None:
        nonlocal began
        now = time.perf_counter()
        print(f"{what:<32} {now - began:7.2f} s   {resident('VmRSS') - before:7.1f} MiB, at most {resident('VmHWM') - before:7.1f}")
        began = now

    def loader() -> RowLoader[SftExample]:
        encode = ExampleEncoder(tokenizer, ExampleForm(1024, apply_chat_template=False))
        form = RowForm("llm", "prompt", "response")
        source = RowExamples(RowFiles([str(path)]), form, encode, on_bad_sample="error", on_too_long="error")
        return RowLoader(source, chosen.batch, num_epochs=2, num_workers=chosen.workers)

    print(f"{chosen.rows} rows, {path.stat().st_size / 2**20:.0f} MiB; above the {before:.0f} MiB of the process")
    first = loader()
    told("opened")
    next(iter(first))
    told("first batch, order of the epoch")
    for _ in islice(first, chosen.batches):
        pass
    told(f"{chosen.batches} batches of {chosen.batch}")
    second = loader()
    second.load_state_dict({**first.state_dict(), "handed_out": len(second) - chosen.batches})
    next(iter(second))
    told("opened anew, at the end")


if __name__ == "__main__":
    main()
