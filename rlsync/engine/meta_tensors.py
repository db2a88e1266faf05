"""Tensors like given ones on meta, one behind the other in a piece of memory. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# As torch aligns what it allocates on a GPU.
ALIGNMENT = 512


def room(metas: Iterable[torch.Tensor]) -> int:
    """Bytes that they take together."""
    return sum(_aligned_bytes(meta) for meta in metas)


def placed(meta: torch.Tensor, memory: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A tensor like ``meta`` (of its class, with its attributes and strides) where ``memory`` (1-D uint8) begins; and what is left."""
    elements = memory[: _extent(meta) * meta.itemsize].view(meta.dtype)
    made: Any = elements.as_strided(meta.shape, meta.stride())
    made.__class__, made.__dict__ = meta.__class__, meta.__dict__.copy()
    return made, memory[_aligned_bytes(meta) :]


def _extent(meta: torch.Tensor) -> int:
    """Elements from the first to the last one."""
    return 1 + sum((n - 1) * step for n, step in zip(meta.shape, meta.stride(), strict=True)) if meta.numel() else 0


def _aligned_bytes(meta: torch.Tensor) -> int:
    return -(-_extent(meta) * meta.itemsize // ALIGNMENT) * ALIGNMENT
