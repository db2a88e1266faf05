"""``rlsync convert``: a checkpoint of one form and layout made into one of another, without a process group or a GPU.

Owns arguments, progress and output; ``rlsync.convert`` converts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsync.cli.lines import WIDTH, amount
from rlsync.errors import ConfigError
from rlsync.models.base_keys import DTYPES

if TYPE_CHECKING:
    from rlsync.convert.conversion import Converted, Progress, Request
    from rlsync.convert.precision import Precision

# Options of the layout, and their fields of Topology.
_AXES = {
    "tp": "tp_size", "pp": "pp_size", "vpp": "vpp_size", "cp": "cp_size", "ep": "ep_size", "etp": "etp_size",
    "first_stage_layers": "first_stage_layers", "last_stage_layers": "last_stage_layers",
}  # fmt: skip
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_FORMS = {"hf": "Hugging Face", "megatron": "Megatron", "torch_dist": "Megatron's torch_dist"}
# How often a line of progress is drawn.
_DRAW_S = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "stopped at any moment, the same command goes on where it was; TO is there when all of it is; started by torchrun, on one host or "
        "several that see the same folders, its processes share the files"
    )
    parser.add_argument(
        "source",
        metavar="FROM",
        type=Path,
        help="a Hugging Face folder, global_step_N, actor folder, iter_XXXXXXX of Megatron, or a folder with adapters of one of them",
    )
    parser.add_argument("target", metavar="TO", type=Path, help="folder to write: not there, or empty")
    parser.add_argument(
        "--to",
        choices=_FORMS,
        help="form of TO (torch_dist: whole tensors for Megatron under any layout); default: megatron from hf or with a layout, else hf",
    )
    parser.add_argument("--adapter", metavar="DIR", type=Path, help="adapters of FROM: TO gets these in the place of its weights")
    parser.add_argument(
        "--merge-lora", action="store_true", help="TO gets the weights with the adapters merged, which are those of --adapter or FROM"
    )
    layout = parser.add_argument_group("layout of Megatron's shards")
    for option in _AXES:
        layout.add_argument(f"--{option.replace('_', '-')}", type=int, metavar="N")
    layout.add_argument(
        "--spec",
        choices=("local", "te"),
        help="names of the parameters: te with TransformerEngine; default: FROM's, or local, in torch_dist te",
    )
    layout.add_argument("--make-vocab-size-divisible-by", type=int, metavar="N", help="as of the run that will load TO; default: 1")
    parser.add_argument("--dtype", choices=(*DTYPES, *SHORT_DTYPES), help="of the weights in TO; default: FROM's")
    parser.add_argument("--model", type=Path, help="folder of the model, where FROM has no config.json, or is adapters of it")
    parser.add_argument("--workers", type=int, default=1, help="processes that copy")
    parser.add_argument("--bucket-bytes", type=int, default=256 * 2**20, help="memory of each of them, at least the largest tensor")
    parser.add_argument("--max-shard-bytes", type=int, help="most bytes of a file of hf or torch_dist; default: 5 GiB")
    parser.add_argument(
        "--test-precision",
        action="store_true",
        help="then run rlsync compare on both sides, on 2 rows of 32 random tokens, with a picture each where there may be",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def run(arguments: argparse.Namespace) -> int:
    """Convert, with progress on standard error where that is a terminal, and say what was made; of several processes of torchrun the first
    one does. Raises RlsyncError."""
    from rlsync.cli.compare import shown
    from rlsync.convert.conversion import convert
    from rlsync.convert.ranks import Ranks

    request = _request(arguments)
    ranks = Ranks.from_environment()
    hf_folder = _hf_side(request) if arguments.test_precision else None
    begin = time.monotonic()
    bar = _Bar(begin, is_shown=ranks.is_first and sys.stderr.isatty())
    try:
        made = convert(request, workers=arguments.workers, ranks=ranks, report=bar.draw)
    finally:
        bar.end()
    if not ranks.is_first:
        return 0
    said = _said(arguments.target, request.form, made, time.monotonic() - begin)
    if not arguments.json:
        print(_line(said), flush=True)
        for warning in made.warnings:
            print(f"warning: {warning}", flush=True)
    found = None if hf_folder is None else _precision(hf_folder, request, made)
    if found is not None:
        said["precision"] = {"within": found.is_within, **asdict(found)}
        if not arguments.json:
            print(shown(found))
    if arguments.json:
        print(json.dumps(said))
    return 0 if found is None or found.is_within else 1


def _request(arguments: argparse.Namespace) -> Request:
    """What is to be converted into what. Raises ConfigError for options that say nothing about it."""
    from rlsync.convert.conversion import Request, source_of
    from rlsync.convert.sources import smallest_topology

    for name in ("workers", "bucket_bytes", "max_shard_bytes", "make_vocab_size_divisible_by"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    sizes = {field: getattr(arguments, option) for option, field in _AXES.items() if getattr(arguments, option) is not None}
    given = {name: getattr(arguments, name) for name in ("max_shard_bytes", "make_vocab_size_divisible_by")}
    request = Request(
        source=arguments.source,
        target=arguments.target,
        form=arguments.to or "hf",
        model_folder=arguments.model,
        topology=smallest_topology(**sizes),
        dtype=SHORT_DTYPES.get(arguments.dtype, arguments.dtype),
        flavour=arguments.spec,
        bucket_bytes=arguments.bucket_bytes,
        adapter=arguments.adapter,
        merge_lora=arguments.merge_lora,
        **{name: value for name, value in given.items() if value is not None},
    )
    if arguments.to is None and (sizes or (not arguments.merge_lora and source_of(request).form == "hf")):
        request = replace(request, form="megatron")
    if request.form == "hf" and (sizes or arguments.spec is not None or arguments.make_vocab_size_divisible_by is not None):
        raise ConfigError("Hugging Face files have no layout: leave its options out, or say --to megatron")
    if request.form == "torch_dist" and sizes:
        raise ConfigError("torch_dist has whole tensors, which are loaded under any layout: leave the sizes out, or say --to megatron")
    if request.form == "megatron" and arguments.max_shard_bytes is not None:
        raise ConfigError("--max-shard-bytes is of hf and torch_dist: Megatron's shards are a file for each rank; leave it out")
    if arguments.test_precision and (arguments.adapter is not None or arguments.merge_lora):
        raise ConfigError(
            "--test-precision compares FROM with TO, which have the same weights without adapters alone; run rlsync compare TO"
        )
    return request


def _precision(hf_folder: Path, request: Request, made: Converted) -> Precision:
    """What ``rlsync compare`` says of both sides, on random tokens."""
    from rlsync.convert.precision import compare_logits, random_batch

    return compare_logits(
        hf_folder,
        random_batch(made.source.model, rows=2, length=32, seed=0, pictures=int(made.source.model.vision is not None)),
        weights=request.source if request.form == "hf" else request.target,
        dtype=made.output.dtype,
        # So that prompts and what follows are told apart, as pictures and text are.
        prompt_length=8,
    )


def _hf_side(request: Request) -> Path:
    """The folder that transformers loads to test a conversion. Raises ConfigError where there is none, before anything is converted."""
    from rlsync.convert.sources import open_source

    if request.form == "hf":
        return request.target
    source = open_source(request.source, request.model_folder)
    for folder in (source.folder if source.form == "hf" else None, source.model_folder):
        if folder is not None and any(folder.glob("*.safetensors")):
            return folder
    raise ConfigError("--test-precision compares with transformers, and no side is of Hugging Face files; name some by --model")


def _said(target: Path, form: str, made: Converted, seconds: float) -> dict[str, Any]:
    layout = getattr(made.output, "topology", None)
    return {
        "from": {
            "folder": str(made.source.folder),
            "form": made.source.form,
            "architecture": made.source.model.architecture,
            "holds": "weights" if made.source.adapters is None else "adapters",
            "merged": None if made.source.merged is None else str(made.source.merged.folder),
        },
        "to": {
            "folder": str(target),
            "form": form,
            "layout": {} if layout is None else {option: getattr(layout, field) for option, field in _AXES.items()},
            "dtype": made.output.dtype,
            "files": made.num_files,
            "bytes": made.progress.total_bytes,
        },
        "warnings": list(made.warnings),
        "resumed_bytes": made.progress.resumed_bytes,
        "seconds": seconds,
    }


def _line(said: dict[str, Any]) -> str:
    source, target = said["from"], said["to"]
    what = f"adapters of {source['architecture']}" if source["holds"] == "adapters" else source["architecture"]
    what += " with adapters merged" if source["merged"] else ""
    sizes = ", ".join(f"{option} {size}" for option, size in target["layout"].items() if size not in (1, None))
    files = "1 file" if target["files"] == 1 else f"{target['files']} files"
    resumed = f", {amount(said['resumed_bytes'])} of them by an earlier one that was stopped" if said["resumed_bytes"] else ""
    return (
        f"{target['folder']}: {what} from {_FORMS[source['form']]} files in {source['folder']} to "
        f"{_FORMS[target['form']]} {f'({sizes})' if sizes else 'files'}, {target['dtype']}, {files} of weights, "
        f"{amount(target['bytes'])} in {said['seconds']:.1f} s{resumed}"
    )


class _Bar:
    """One line of progress, drawn anew on a terminal."""

    def __init__(self, begin: float, *, is_shown: bool) -> None:
        self._begin, self._drawn, self._is_shown = begin, 0.0, is_shown

    def draw(self, progress: Progress) -> None:
        now = time.monotonic()
        if not self._is_shown or (now - self._drawn < _DRAW_S and progress.done_bytes < progress.total_bytes):
            return
        self._drawn = now
        share = progress.done_bytes / max(1, progress.total_bytes)
        rate = (progress.done_bytes - progress.resumed_bytes) / max(now - self._begin, 1e-3)
        left = f", {(progress.total_bytes - progress.done_bytes) / rate:.0f} s left" if rate else ""
        line = f"[{'#' * int(30 * share):30}] {share:4.0%} of {amount(progress.total_bytes)}, {amount(int(rate))}/s{left}"
        print(f"\r{line:<{WIDTH}}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._drawn:
            print(file=sys.stderr)
