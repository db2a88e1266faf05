"""How a bucket lies in a slot. Owns no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rlsync.copy.cpu import CopyProgram, region
from rlsync.plan.packing import Segment


@dataclass(frozen=True, slots=True)
class SlotArrival:
    """A bucket that lies in a slot (1-D uint8, CPU or the model's device) as its segments say."""

    memory: torch.Tensor
    segments: Sequence[Segment]

    def land(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy every segment to where it belongs."""
        CopyProgram(
            (region(buffers[s.buffer], s.buffer_offset, s.shape, s.strides), segment_in(self.memory, s)) for s in self.segments
        ).run()


def segment_in(slot: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The view of a slot (1-D uint8) that holds a segment, in its shape and dtype."""
    dtype = getattr(torch, segment.dtype)
    return slot[segment.slot_offset : segment.slot_offset + segment.size * dtype.itemsize].view(dtype).view(segment.shape)
