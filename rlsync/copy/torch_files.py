"""Files of ``torch.save`` whose tensors are written later, in place, by several processes.

CRCs of the tensors in them are not right, as of files that torch writes without any (``torch.serialization.set_crc32_options``); torch
looks at none. What was written is summed up in :mod:`rlsync.copy.writes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rlsync.layout.torch_files import TensorView, read_torch_file


def create_torch_file(path: Path, content: Any) -> None:
    """Write what ``torch.save`` would of ``content``, but for the bytes of tensors, which are zero and take no room on the disk yet.

    Every tensor gets a place of its own, in order, on the CPU. Raises OSError.
    """
    # torch names no errno of what it cannot open.
    path.open("wb").close()
    with torch.serialization.skip_data():
        torch.save(_empty(content), path)


def _empty(content: Any) -> Any:
    """``content`` with new tensors in the place of those in it. They are never touched, so they take no memory."""
    if isinstance(content, torch.Tensor):
        return torch.empty(content.shape, dtype=content.dtype)
    if isinstance(content, Mapping):
        return {key: _empty(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(_empty, content))
    return content


def tensors_in(content: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every tensor in nested mappings and sequences, or TensorView in those of a file, with the keys and numbers that lead to it."""
    if isinstance(content, torch.Tensor | TensorView):
        yield where, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from tensors_in(value, (*where, str(key)))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from tensors_in(value, (*where, str(number)))


def places_of(path: Path) -> dict[tuple[str, ...], TensorView]:
    """The tensors of a file by the keys that lead to them, with where each lies, in file order. Raises CheckpointError."""
    return dict(tensors_in(read_torch_file(path)))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor in order as bytes, 1-D uint8; a view where they lie so."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
