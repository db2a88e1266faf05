"""Placement of whole HF tensors: an open checkpoint, a stream of exported tensors, a bucket. Each tensor is its own buffer."""

from __future__ import annotations

from collections.abc import Iterable

from rlsync.geometry import Box, BufferSpec, Piece, Placement, TensorSpec, contiguous_strides


def whole_tensors(holder: str, tensors: Iterable[TensorSpec]) -> Placement:
    """Every tensor complete and contiguous in a buffer that carries its name."""
    tensors = tuple(tensors)
    return Placement(
        holder,
        tuple(BufferSpec(t.name, t.dtype, t.shape) for t in tensors),
        tuple(Piece(t.name, Box.whole(t.shape), t.name, 0, contiguous_strides(t.shape)) for t in tensors),
    )
