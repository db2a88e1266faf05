"""Loading one holder from files: the file that a conversion writes, or the live parameters of a rank. Planned as a sync is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rlsync.copy.cpu import bind
from rlsync.copy.files import MappedTensors
from rlsync.layout.geometry import Placement, TensorSpec
from rlsync.layout.safetensors import Holding
from rlsync.plan.planner import Copy, Plan, build_plan


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The copies into one holder, and the files' tensors that they come from; a copy's ``source`` is an index of ``holdings``."""

    plan: Plan
    holdings: tuple[Holding, ...]

    def open(self) -> list[MappedTensors]:
        """Map the files, one mapping from a name to its tensor for each of ``holdings``."""
        mapped = [MappedTensors(holding.stored) for holding in self.holdings]
        for tensors in mapped:
            tensors.open()
        return mapped


def plan_load(
    tensors: Sequence[TensorSpec], holdings: Sequence[Holding], placement: Placement, *, bucket_bytes: int | None = None
) -> LoadPlan:
    """Plan to copy every element of ``placement`` from the tensors of ``holdings``; floating-point dtypes may differ.

    Args:
        tensors: the whole model's; those that neither side holds are left out.
        holdings: files' tensors; several may hold the same.
        placement: the holder to load.
        bucket_bytes: as of ``build_plan``.

    Raises PlacementError where no file holds something of ``placement``.
    """
    wanted = {piece.tensor for piece in placement.pieces}
    narrowed = [(holding, _narrowed(holding.placement, wanted)) for holding in holdings]
    used = [(holding, part) for holding, part in narrowed if part.pieces]
    listed = {piece.tensor for part in (placement, *(part for _, part in used)) for piece in part.pieces}
    present = tuple(tensor for tensor in tensors if tensor.name in listed)
    plan = build_plan(present, [part for _, part in used], [placement], bucket_bytes=bucket_bytes, transforms=("cast",))
    return LoadPlan(plan, tuple(holding for holding, _ in used))


def _narrowed(placement: Placement, tensors: Collection[str]) -> Placement:
    """The buffers that hold something of these tensors."""
    return restricted_to(placement, {piece.buffer for piece in placement.pieces if piece.tensor in tensors})


def restricted_to(placement: Placement, buffers: Collection[str]) -> Placement:
    """Some of the buffers, and what is in them."""
    return replace(
        placement,
        buffers=tuple(buffer for buffer in placement.buffers if buffer.name in buffers),
        pieces=tuple(piece for piece in placement.pieces if piece.buffer in buffers),
        padding=tuple(box for box in placement.padding if box.buffer in buffers),
    )


def copy_all(copies: Iterable[Copy], sources: Sequence[Mapping[str, torch.Tensor]], buffers: Mapping[str, torch.Tensor]) -> None:
    """Copy from ``sources``, one mapping from buffer to tensor for each source of the plan, into the buffers of its one destination."""
    copies = tuple(copies)
    for source in sorted({copy.source for copy in copies}):
        bind((copy for copy in copies if copy.source == source), sources[source], buffers).run()
