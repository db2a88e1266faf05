"""``rlsync verify``: do two Hugging Face folders hold the same weights, bit for bit, or does an engine hold those of a folder?

Owns arguments and output. Changes nothing: a folder is read, and an engine is paused for as long as a sync would take.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlsync.errors import ConfigError, EngineDirtyError, RlsyncError
from rlsync.layout.safetensors import StoredTensor, read_checkpoint

# Where `vllm serve` itself takes its key from, so that no key stands on a command line.
KEY_VARIABLE = "VLLM_API_KEY"
# Last part of a path that stands for a module instead of a tensor (``rlsync.engine.state``).
PROBE = "#probe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="folder with safetensors files")
    parser.add_argument("second", type=Path, nargs="?", help="the folder to compare with; file names and cuts may differ")
    parser.add_argument("--engine", metavar="URL", help=f"instead: a running `vllm serve` with backend rlsync; its key from {KEY_VARIABLE}")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of each phase of the comparison with an engine")
    parser.add_argument("--bind-host", default="127.0.0.1", help="address of this host that the engine's workers reach")


def run(arguments: argparse.Namespace) -> int:
    """Print every difference and a closing line; 0 when there is none."""
    if (arguments.second is None) == (arguments.engine is None):
        raise ConfigError("rlsync verify compares a folder with one other thing: a second folder, or --engine URL")
    if arguments.engine is not None:
        return _against_engine(arguments.first, arguments.engine, arguments.timeout_s, arguments.bind_host)
    first, second = read_checkpoint(arguments.first), read_checkpoint(arguments.second)
    count = 0
    for difference in differences(first, second):
        count += 1
        print(difference)
    nbytes = sum(t.spec.nbytes for t in first.values())
    verdict = "equal" if not count else f"{count} tensors differ"
    print(f"{verdict}: {len(first)} tensors, {nbytes} bytes in {arguments.first}; {len(second)} tensors in {arguments.second}")
    return 1 if count else 0


def differences(first: dict[str, StoredTensor], second: dict[str, StoredTensor]) -> Iterator[str]:
    """One line for each tensor that is in one checkpoint only, or whose dtype, shape or bytes differ."""
    # Not at the top: `rlsync doctor` must run where torch cannot be imported.
    from rlsync.copy.files import MappedTensors

    ours, theirs = MappedTensors(first), MappedTensors(second)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield f"{name}: only in the {'first' if name in first else 'second'}"
            continue
        a, b = first[name].spec, second[name].spec
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{name}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
            continue
        # As bytes: a NaN equals itself here, and 0.0 differs from -0.0.
        unequal = ours.raw(name) != theirs.raw(name)
        if unequal.any():
            elements = int(unequal.view(-1, max(1, unequal.numel() // max(1, a.size))).any(dim=1).sum())
            yield f"{name}: {elements} of {a.size} elements differ"


def _against_engine(folder: Path, url: str, timeout_s: float, bind_host: str) -> int:
    """The folder dials the engine's workers as an actor would, and they compare instead of loading."""
    from rlsync.engine.http import HttpEngine
    from rlsync.folder_source import FolderSource
    from rlsync.sync import SyncConfig
    from rlsync.sync.comparison import compare_engines

    source = FolderSource(folder)
    try:
        engine = HttpEngine(url, engine_id=url, api_key=os.environ.get(KEY_VARIABLE), timeout_s=timeout_s)
    except TimeoutError as error:
        raise RlsyncError(str(error)) from None
    try:
        if engine.state != "clean":
            # To compare is to pause and to let go, and this one must not be let go.
            raise EngineDirtyError(f"engine {url} serves no committed version, so it cannot be compared; sync it or restart it first")
        found = compare_engines(source, [engine], SyncConfig(timeout_s=timeout_s, bind_host=bind_host))
    finally:
        engine.close()
    return report(source.tensors, folder, url, found)


def report(tensors: Sequence[object], folder: Path, url: str, found: Sequence[Sequence[str]]) -> int:
    """Print what workers hold unlike a folder, by worker, and a closing line; the exit code."""
    from rlsync.folder_source import layer_order

    for worker, paths in enumerate(found):
        for path in sorted(paths, key=layer_order):
            module, _, kind = path.rpartition(".")
            # Kernels of CPUs keep weights where nobody can look; they are told by what comes out.
            print(f"worker {worker}: {f'{module}, by what it makes of a fixed input' if kind == PROBE else path}")
    count = sum(map(len, found))
    verdict = "equal" if not count else f"{count} tensors of the engine differ"
    print(f"{verdict}: {len(tensors)} tensors in {folder}; {len(found)} workers of {url}")
    return 1 if count else 0
