"""The actor's share of a sync, bound to memory: copies its regions into slots and messages, and sums up those that are verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rlsync.control.messages import Sum
from rlsync.control.shares import ActorParcel, ActorPart, ActorShare
from rlsync.copy.checksum import checksums
from rlsync.copy.cpu import CopyProgram, region
from rlsync.errors import PlacementError
from rlsync.staging import Region
from rlsync.transport.gloo import Outbox
from rlsync.transport.parcels import make_parcel, placed
from rlsync.verification import is_verified


@dataclass(frozen=True, slots=True)
class Filling:
    """What one fill did: bytes copied, and checksums of the memory it copied from."""

    nbytes: int
    sums: tuple[Sum, ...]


class Filler:
    """Fills the slots of a ring, and sends messages to workers that have no part in it.

    Programs are made once per bucket; neither slots nor messages move.

    Args:
        share: of this actor rank.
        buffers: memory of this rank's placement.
        slots: 1-D uint8 tensors; bucket ``k`` goes into slot ``k % len(slots)``.
        outbox: for what the share sends, if anything.
    """

    def __init__(
        self, share: ActorShare, buffers: Mapping[str, torch.Tensor], slots: Sequence[torch.Tensor], outbox: Outbox | None = None
    ) -> None:
        self._share, self._buffers, self._slots, self._outbox = share, buffers, slots, outbox
        self._programs: dict[int, CopyProgram] = {}
        self._addresses = {name: tensor.data_ptr() for name, tensor in buffers.items()}

    def check(self) -> None:
        """Raise PlacementError where memory is not where it was when the programs were made."""
        moved = sorted(name for name, tensor in self._buffers.items() if tensor.data_ptr() != self._addresses[name])
        if moved:
            raise PlacementError(f"{len(moved)} parameters have moved since connect(), among them {moved[0]}; close() and connect() anew")

    def fill(self, bucket: int, turn: int) -> Filling:
        """Copy this rank's regions of a bucket into its slot and its messages; these are on their way when it returns."""
        if bucket not in self._programs:
            self._programs[bucket] = self._bind(bucket)
        if self._outbox is not None:
            self._outbox.reclaim(bucket)
        nbytes = self._programs[bucket].run()
        if self._outbox is not None:
            self._outbox.post(bucket)
        given: list[ActorPart | ActorParcel] = [*self._share.parts[bucket], *self._share.parcels[bucket]]
        chosen = [(part.stream, r) for part in given for r in part.regions if is_verified(self._share.verify, r.number, turn)]
        values = checksums([self._view(r).to(getattr(torch, r.dtype)) for _, r in chosen])
        return Filling(nbytes, tuple(Sum(stream, r.number, value) for (stream, r), value in zip(chosen, values, strict=True)))

    def _bind(self, bucket: int) -> CopyProgram:
        pairs = []
        for part in self._share.parts[bucket]:
            slot = self._slots[bucket % len(self._slots)]
            pairs += [(placed(slot, part.offset + r.slot_offset, r, r.slot_strides), self._view(r)) for r in part.regions]
        if self._outbox is not None:
            for parcel, message in self._outbox.messages(bucket):
                pairs += [(view, self._view(r)) for view, r in zip(parcel.views(message), parcel.regions, strict=True)]
        return CopyProgram(pairs)

    def _view(self, r: Region) -> torch.Tensor:
        return region(self._buffers[r.source_buffer], r.source_offset, r.shape, r.source_strides)


def make_outbox(share: ActorShare, timeout_s: float) -> Outbox | None:
    """Memory for what an actor rank sends, or None where there is no group."""
    if share.group is None:
        return None
    parcels = [[make_parcel(p.taker, p.regions, p.whole_bytes) for p in row] for row in share.parcels]
    return Outbox(share.group, parcels, share.num_slots, timeout_s)
