"""Is what lies in an engine's memory what the actor sent? Owns the checksums of a connection's regions."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlsync.control.shares import WorkerShare
from rlsync.copy.cpu import region
from rlsync.copy.sums import Sums
from rlsync.errors import RlsyncError
from rlsync.staging import Region
from rlsync.verification import is_verified, round_of


class MismatchError(RlsyncError):
    """What this worker holds is not what the actor sent."""


class Verifier:
    """Of one worker and connection."""

    def __init__(self, share: WorkerShare) -> None:
        self._share = share
        self._sums = Sums()
        self._chosen: dict[tuple[int, int], tuple[Region, ...]] = {}

    def compare(self, bucket: int, buffers: Mapping[str, torch.Tensor], sent: Mapping[int, int], turn: int) -> None:
        """Sum up the bucket's regions whose turn it is where they lie in ``buffers``; ``sent`` is by region.

        Raises MismatchError naming those that differ.
        """
        key = bucket, round_of(self._share.verify, turn)
        if key not in self._chosen:
            self._chosen[key] = tuple(r for r in self._share.parts[bucket].regions if is_verified(self._share.verify, r.number, turn))
        chosen = self._chosen[key]
        places = [tensor.data_ptr() for tensor in buffers.values()]
        held = self._sums.of(key, places, lambda: [region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides) for r in chosen])
        findings = [
            f"{r.tensor} in {r.buffer} (elements from {r.buffer_offset}, shape {r.shape}, from actor rank {r.source}) "
            + (f"sums up to {value:016x}, sent were {sent[r.number]:016x}" if r.number in sent else "came without a checksum")
            for r, value in zip(chosen, held, strict=True)
            if sent.get(r.number) != value
        ]
        if findings:
            more = f" and {len(findings) - 5} more" if len(findings) > 5 else ""
            raise MismatchError(f"{len(findings)} of {len(chosen)} verified regions are not what was sent: {'; '.join(findings[:5])}{more}")
