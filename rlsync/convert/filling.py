"""What goes from files into one holder, as a plan: alike for a file that a conversion writes and for the live parameters of a rank."""

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
class Filling:
    """The copies into one holder, and the holders that they come from; a copy's source is an index of these."""

    plan: Plan
    givers: tuple[Holding, ...]

    def open(self) -> list[MappedTensors]:
        """The tensors of the givers, their files mapped."""
        mapped = [MappedTensors(holding.stored) for holding in self.givers]
        for tensors in mapped:
            tensors.open()
        return mapped


def plan_filling(
    tensors: Sequence[TensorSpec], holdings: Sequence[Holding], placement: Placement, *, bucket_bytes: int | None = None
) -> Filling:
    """Every element of ``placement`` from somewhere in ``holdings``; floating-point dtypes may differ.

    ``tensors``: all that there may be. Raises PlacementError where something is missing.
    """
    wanted = {piece.tensor for piece in placement.pieces}
    narrowed = [(holding, _narrowed(holding.placement, wanted)) for holding in holdings]
    givers = [(holding, part) for holding, part in narrowed if part.pieces]
    listed = {piece.tensor for part in (placement, *(part for _, part in givers)) for piece in part.pieces}
    present = tuple(tensor for tensor in tensors if tensor.name in listed)
    plan = build_plan(present, [part for _, part in givers], [placement], bucket_bytes=bucket_bytes, transforms=("cast",))
    return Filling(plan, tuple(holding for holding, _ in givers))


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


def copy_all(copies: Iterable[Copy], givers: Sequence[Mapping[str, torch.Tensor]], buffers: Mapping[str, torch.Tensor]) -> None:
    """Copy into the buffers of the one destination."""
    copies = tuple(copies)
    for giver in sorted({copy.source for copy in copies}):
        bind((copy for copy in copies if copy.source == giver), givers[giver], buffers).run()
