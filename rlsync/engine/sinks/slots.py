"""How a segment lies in a slot. Owns no memory."""

from __future__ import annotations

import torch

from rlsync.staging import Segment


def segment_in(slot: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The view of a slot (1-D uint8) that holds a segment, in its shape and dtype."""
    dtype = getattr(torch, segment.dtype)
    return slot[segment.slot_offset : segment.slot_offset + segment.size * dtype.itemsize].view(dtype).view(segment.shape)
