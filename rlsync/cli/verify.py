"""``rlsync verify``: do two Hugging Face checkpoint folders hold the same weights, bit for bit? Starts no engine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rlsync.placement.safetensors import StoredTensor, read_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="folder with safetensors files")
    parser.add_argument("second", type=Path, help="the folder to compare with; file names and cuts may differ")


def run(arguments: argparse.Namespace) -> int:
    """Print every difference and a closing line; 0 when there is none."""
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
