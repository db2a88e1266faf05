"""The actor's share of a sync, bound to memory: copies its regions into slots and sums up those that are verified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rlsync.control.messages import Sum
from rlsync.control.shares import ActorShare
from rlsync.copy.checksum import checksums
from rlsync.copy.cpu import CopyProgram, region
from rlsync.errors import PlacementError
from rlsync.staging import Region
from rlsync.verification import is_verified


@dataclass(frozen=True, slots=True)
class Filling:
    """What one fill did: bytes copied, and checksums of the memory it copied from."""

    nbytes: int
    sums: tuple[Sum, ...]


class Filler:
    """Fills the slots of a ring. Programs are made once per bucket and slot; slots do not move.

    Args:
        share: of this actor rank.
        buffers: memory of this rank's placement.
        slots: 1-D uint8 tensors; bucket ``k`` goes into slot ``k % len(slots)``.
    """

    def __init__(self, share: ActorShare, buffers: Mapping[str, torch.Tensor], slots: list[torch.Tensor]) -> None:
        self._share, self._buffers, self._slots = share, buffers, slots
        self._programs: dict[int, CopyProgram] = {}
        self._addresses = {name: tensor.data_ptr() for name, tensor in buffers.items()}

    def check(self) -> None:
        """Raise PlacementError where memory is not where it was when the programs were made."""
        moved = sorted(name for name, tensor in self._buffers.items() if tensor.data_ptr() != self._addresses[name])
        if moved:
            raise PlacementError(f"{len(moved)} parameters have moved since connect(), among them {moved[0]}; close() and connect() anew")

    def fill(self, bucket: int, turn: int) -> Filling:
        """Copy this rank's regions of a bucket into its slot."""
        if bucket not in self._programs:
            self._programs[bucket] = self._bind(bucket)
        nbytes = self._programs[bucket].run()
        chosen = [
            (part.stream, r) for part in self._share.parts[bucket] for r in part.regions if is_verified(self._share.verify, r.number, turn)
        ]
        values = checksums([self._view(r).to(getattr(torch, r.dtype)) for _, r in chosen])
        return Filling(nbytes, tuple(Sum(stream, r.number, value) for (stream, r), value in zip(chosen, values, strict=True)))

    def _bind(self, bucket: int) -> CopyProgram:
        slot = self._slots[bucket % len(self._slots)]
        pairs = []
        for part in self._share.parts[bucket]:
            for r in part.regions:
                dtype = getattr(torch, r.dtype)
                begin = part.offset + r.slot_offset
                extent = (1 + sum((n - 1) * s for n, s in zip(r.shape, r.slot_strides, strict=True))) * dtype.itemsize
                flat = slot[begin : begin + extent].view(dtype)
                pairs.append((flat.as_strided(r.shape, r.slot_strides), self._view(r)))
        return CopyProgram(pairs)

    def _view(self, r: Region) -> torch.Tensor:
        return region(self._buffers[r.source_buffer], r.source_offset, r.shape, r.source_strides)
