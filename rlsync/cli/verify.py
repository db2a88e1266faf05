"""``rlsync verify``: do two Hugging Face folders hold the same weights, bit for bit, or does an engine hold those of a folder?

Owns arguments, output and exit codes. Changes nothing: a folder is read, and an engine is paused for as long as a sync would take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlsync.cli.shapes import model_below
from rlsync.errors import ConfigError, EngineDirtyError, RlsyncError
from rlsync.layout.safetensors import StoredTensor, read_checkpoint

# Where `vllm serve` itself takes its key from, so that no key stands on a command line.
KEY_VARIABLE = "VLLM_API_KEY"
# Last part of a path that stands for a module instead of a tensor (``rlsync.engine.state``).
PROBE = "#probe"
# Exit codes, those of cmp and diff.
EQUAL, DIFFERENT, UNREADABLE = 0, 1, 2
# Elements compared at once; as float64, the memory of a comparison is about 32 times that.
_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that two folders hold unlike each other.

    Attributes:
        kind: ``values`` where dtype and shape agree. With ``dtype`` the numbers say whether the values differ beyond it.
        first, second: dtype and shape, or None where a folder lacks the tensor.
        elements: how many differ: in any bit, or in value where the dtypes differ; None where there is nothing to compare.
        size: elements of the tensor.
        max_abs, mean_abs: of the differences between finite numbers, the mean over all elements of the tensor; None where there are none.
        not_finite: elements that differ and are infinite or no number in one of the two.
        first_index: of the first element that differs.
    """

    tensor: str
    kind: Literal["only in the first", "only in the second", "shape", "dtype", "values"]
    first: dict[str, Any] | None
    second: dict[str, Any] | None
    elements: int | None = None
    size: int | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    not_finite: int = 0
    first_index: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.first is None or self.second is None:
            return f"{self.tensor}: {self.kind}"
        sides = " against ".join(f"{side['shape']} {side['dtype']}" for side in (self.first, self.second))
        if self.elements is None:
            return f"{self.tensor}: {sides}"
        if not self.elements:
            return f"{self.tensor}: {sides}, the values are equal"
        how_far = "" if self.max_abs is None else f" by at most {self.max_abs:.3g}, {self.mean_abs:.3g} on average"
        lost = f", {self.not_finite} of them infinite or no number" if self.not_finite else ""
        where = f"{self.elements} of {self.size} elements differ{how_far}{lost}, first at {list(self.first_index or ())}"
        return f"{self.tensor}: {where}" if self.kind == "values" else f"{self.tensor}: {sides}, {where}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "exit code: 0 equal, 1 different, 2 something cannot be read or compared"
    parser.add_argument("first", type=Path, help="folder with safetensors files")
    parser.add_argument("second", type=Path, nargs="?", help="the folder to compare with; file names and cuts may differ")
    parser.add_argument("--engine", metavar="URL", help=f"instead: a running `vllm serve` with backend rlsync; its key from {KEY_VARIABLE}")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="seconds, for each phase of the comparison with an engine")
    parser.add_argument("--bind-host", default="127.0.0.1", help="address of this host that the engine's workers reach")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(arguments: argparse.Namespace) -> int:
    """Print every difference and a closing line, or one JSON object; returns EQUAL, DIFFERENT or UNREADABLE."""
    try:
        if (arguments.second is None) == (arguments.engine is None):
            raise ConfigError("rlsync verify compares a folder with one other thing: a second folder, or --engine URL")
        if not 0 < arguments.timeout_s < math.inf:
            raise ConfigError(f"--timeout-s is {arguments.timeout_s:g}; it must be more than 0 seconds")
        if arguments.engine is not None:
            said = _against_engine(arguments.first, arguments.engine, arguments.timeout_s, arguments.bind_host)
        else:
            said = _against_folder(arguments.first, arguments.second)
    except (RlsyncError, OSError) as error:
        folders = filter(None, (arguments.first, arguments.second))
        said_wrong = f"{error}{''.join(model_below(folder, '*.safetensors') for folder in folders)}"
        if arguments.json:
            print(json.dumps({"verdict": "unreadable", "error": said_wrong}))
        else:
            print(f"error: {said_wrong}", file=sys.stderr)
        return UNREADABLE
    lines, verdict = said
    print(json.dumps(verdict) if arguments.json else "\n".join(lines))
    return EQUAL if verdict["verdict"] == "equal" else DIFFERENT


def _against_folder(first: Path, second: Path) -> tuple[list[str], dict[str, Any]]:
    """Lines for people and an object for programs."""
    ours, theirs = read_checkpoint(first), read_checkpoint(second)
    found = list(differences(ours, theirs))
    verdict = f"{len(found)} {'tensor differs' if len(found) == 1 else 'tensors differ'}" if found else "equal"
    nbytes = sum(t.spec.nbytes for t in ours.values())
    closing = f"{verdict}: {len(ours)} tensors, {nbytes} bytes in {first}; {len(theirs)} tensors in {second}"
    return [*map(str, found), closing], {
        "verdict": "different" if found else "equal",
        "first": {"folder": str(first), "tensors": len(ours)},
        "second": {"folder": str(second), "tensors": len(theirs)},
        "differences": [asdict(difference) for difference in found],
    }


def differences(first: Mapping[str, StoredTensor], second: Mapping[str, StoredTensor]) -> Iterator[Difference]:
    """Each tensor that is in one checkpoint only, or whose dtype, shape or bytes differ, by name."""
    # Not at the top: `rlsync doctor` must run where torch cannot be imported.
    from rlsync.copy.files import MappedTensors

    ours, theirs = MappedTensors(first), MappedTensors(second)
    for name in sorted(first.keys() | second.keys()):
        a, b = (_described(side.get(name)) for side in (first, second))
        if a is None or b is None:
            yield Difference(name, "only in the first" if b is None else "only in the second", a, b)
        elif a["shape"] != b["shape"]:
            yield Difference(name, "shape", a, b)
        elif a["dtype"] != b["dtype"]:
            yield Difference(name, "dtype", a, b, **distance(ours[name], theirs[name]))
        elif (far := distance(ours[name], theirs[name]))["elements"]:
            yield Difference(name, "values", a, b, **far)


def _described(stored: StoredTensor | None) -> dict[str, Any] | None:
    return None if stored is None else {"dtype": stored.spec.dtype, "shape": list(stored.spec.shape)}


def distance(first: Any, second: Any) -> dict[str, Any]:
    """How far two tensors of one shape are from each other: the numbers of a :class:`Difference`.

    Of one dtype, elements are compared as bytes: a NaN equals itself there, and 0.0 differs from -0.0. Of two, as float64.
    """
    import torch

    is_bitwise, a, b = first.dtype == second.dtype, first.reshape(-1), second.reshape(-1)
    count, not_finite, largest, total, begin_of_first = 0, 0, 0.0, 0.0, None
    for begin in range(0, a.numel(), _CHUNK):
        x, y = a[begin : begin + _CHUNK], b[begin : begin + _CHUNK]
        if is_bitwise:
            unequal = (x.view(torch.uint8) != y.view(torch.uint8)).view(x.numel(), -1).any(dim=1)
        else:
            x, y = x.double(), y.double()
            unequal = (x != y) & ~(x.isnan() & y.isnan())
        where = unequal.nonzero().reshape(-1)
        if not where.numel():
            continue
        begin_of_first = begin + int(where[0]) if begin_of_first is None else begin_of_first
        far = (x.double()[where] - y.double()[where]).abs()
        finite = far[far.isfinite()]
        count, not_finite = count + where.numel(), not_finite + where.numel() - finite.numel()
        total += float(finite.sum())
        largest = max(largest, float(finite.max()) if finite.numel() else 0.0)
    return {
        "elements": count,
        "size": a.numel(),
        "max_abs": largest if count > not_finite else None,
        "mean_abs": total / a.numel() if count > not_finite else None,
        "not_finite": not_finite,
        "first_index": None if begin_of_first is None else _index(begin_of_first, first.shape),
    }


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        index.append(at)
    return tuple(reversed(index))


def _against_engine(folder: Path, url: str, timeout_s: float, bind_host: str) -> tuple[list[str], dict[str, Any]]:
    """The folder dials the engine's workers as an actor would, and they compare instead of loading."""
    from rlsync.bridge.folder_source import FolderSource
    from rlsync.engine.handles.http import HttpEngine
    from rlsync.sync import SyncConfig
    from rlsync.sync.comparison import compare_engines

    source = FolderSource(folder)
    try:
        engine = HttpEngine(url, engine_id=url, api_key=os.environ.get(KEY_VARIABLE), timeout_s=timeout_s, may_start_later=False)
    except TimeoutError as error:
        raise RlsyncError(str(error)) from None
    try:
        if engine.state != "clean":
            # To compare is to pause and to let go, and this one must not be let go.
            raise EngineDirtyError(f"engine {url} serves no committed version, so it cannot be compared; sync it or restart it first")
        found = compare_engines(source, [engine], SyncConfig(timeout_s=timeout_s, bind_host=bind_host))
    finally:
        engine.close()
    return report(source.tensors, folder, url, found, has_adapter_slots=engine.has_adapter_slots)


def report(
    tensors: Sequence[object], folder: Path, url: str, found: Sequence[Sequence[str]], *, has_adapter_slots: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """What workers hold unlike a folder, by worker: lines for people and an object for programs. Of an engine with slots for adapters the
    base was compared, and both say so."""
    from rlsync.bridge.folder_source import layer_order

    ordered = [sorted(paths, key=layer_order) for paths in found]
    lines = []
    for worker, paths in enumerate(ordered):
        for path in paths:
            module, _, kind = path.rpartition(".")
            # Kernels of CPUs keep weights where nobody can look; they are told by what comes out.
            lines.append(f"worker {worker}: {f'{module}, by what it makes of a fixed input' if kind == PROBE else path}")
    verdict = f"{len(lines)} {'tensor of the engine differs' if len(lines) == 1 else 'tensors of the engine differ'}" if lines else "equal"
    closing = f"{verdict}: {len(tensors)} tensors in {folder}; {len(found)} workers of {url}"
    base = ", of whose weights the base was compared and not the adapters in its slots" if has_adapter_slots else ""
    return [*lines, f"{closing}{base}"], {
        "verdict": "different" if lines else "equal",
        "first": {"folder": str(folder), "tensors": len(tensors)},
        "second": {"engine": url, "workers": len(found), "compared": "base" if has_adapter_slots else "all"},
        "differences": [{"worker": worker, "tensor": path} for worker, paths in enumerate(ordered) for path in paths],
    }
