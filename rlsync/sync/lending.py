"""What an actor rank lets workers of its host read: its parameters where they lie, and a staging ring. Owns the ring's memory.

A worker reads parameters between ``Ready`` and ``Done``, and nothing else keeps an optimizer from writing them meanwhile than that
``sync`` does not return before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlsync.coordinator.assignments import ActorShare, Lent, Loan
from rlsync.errors import PlacementError
from rlsync.plan.packing import Memory
from rlsync.transport import cuda_ipc
from rlsync.transport.cuda_ipc import LendableMemory


def memory_of(buffers: Mapping[str, torch.Tensor], *, stays: bool) -> Memory:
    """Where the buffers of an actor rank lie, and whether others can map it. A rank without any counts as lendable.

    ``stays`` is as for a Lender.
    """
    kinds = {tensor.is_cuda for tensor in buffers.values()}
    if False in kinds:
        return "host"
    if not all(cuda_ipc.can_be_lent(t.data_ptr()) for t in buffers.values() if t.numel()):
        return "device"
    return "lendable" if stays or not buffers else "leaving"


class Lender:
    """Of one actor rank and connection.

    Args:
        share: says what is lent and what is staged.
        buffers: memory of this rank's placement.
        stays: whether the buffers stay allocated between syncs.
        device: on which the buffers are, and the staging ring, where there is one.
    """

    def __init__(self, share: ActorShare, buffers: Mapping[str, torch.Tensor], *, stays: bool, device: torch.device) -> None:
        names = dict.fromkeys(r.source_buffer for row in share.lent for part in row for r in part.regions)
        self._buffers = {name: buffers[name] for name in names}
        self._stays, self._device = stays, device
        self._stage: LendableMemory | None = None
        if share.stage_bytes:
            self._stage = LendableMemory(share.num_slots * share.stage_bytes, device)
        self._stage_bytes = share.stage_bytes
        self._addresses: list[int] = []
        # By number of an allocation, an address in it.
        self._firsts: dict[int, int] = {}

    @property
    def slots(self) -> list[torch.Tensor]:
        """Of the staging ring, 1-D uint8 CUDA tensors; none where there is none."""
        return [] if self._stage is None else list(self._stage.tensor.split(self._stage_bytes))

    def loan(self) -> Loan:
        """What is lent now. Raises PlacementError where it is not in memory that can be lent."""
        gone = [name for name, t in self._buffers.items() if not t.is_cuda or t.untyped_storage().nbytes() == 0]
        if gone:
            raise PlacementError(
                f"{len(gone)} of {len(self._buffers)} parameters are not in device memory, among them {gone[0]}: onload them before sync()"
            )
        self._addresses = self._find()
        self._firsts = {cuda_ipc.allocation_number(address): address for address in self._addresses}
        unmappable = [address for address in self._firsts.values() if not cuda_ipc.can_be_lent(address)]
        if unmappable:
            # Decided at connect, for all ranks alike: nothing else reads through a ring what was to be read where it lies.
            name = next(name for name, t in self._buffers.items() if t.data_ptr() == unmappable[0])
            raise PlacementError(
                f"parameter {name} has moved into memory that other processes cannot map (expandable segments, a memory saver); "
                "close() and connect() anew to read it through a staging ring, or set weight_sync.staging=always"
            )
        lent = [*self._firsts.values(), *([] if self._stage is None else [self._stage.address])]
        return Loan(
            tuple(cuda_ipc.allocation_of(address, self._device) for address in lent),
            {name: Lent(t.data_ptr(), t.nbytes, str(t.dtype).removeprefix("torch.")) for name, t in self._buffers.items()},
            0 if self._stage is None else self._stage.address,
            self._stage_bytes,
            self._stays,
        )

    def renewed(self) -> Loan | None:
        """What is lent now, where that is not what was said last; None where nothing has moved.

        The generation of the memory is the addresses of the buffers, and the driver's numbers of the allocations that they are in:
        one that was freed and taken again at the same address has another number.
        """
        same = self._find() == self._addresses and all(cuda_ipc.allocation_number(a) == number for number, a in self._firsts.items())
        return None if same else self.loan()

    def _find(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._buffers.values()]

    def close(self) -> None:
        """Give the staging ring back. Every reader has let go of it, or its process has ended. Idempotent."""
        if self._stage is not None:
            self._stage.free()
        self._stage, self._buffers = None, {}
