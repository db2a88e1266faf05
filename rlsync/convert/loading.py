"""Loading one holder from files: the file that a conversion writes, or the live parameters of a rank. Planned as a sync is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rlsync.copy.cpu import bind
from rlsync.copy.files import MappedTensors
from rlsync.layout.geometry import Padding, Piece, Placement, TensorSpec
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


class LoadPlanner:
    """Plans loads of any number of holders from the same files: which of these hold something of a tensor is looked up once for all.

    Args:
        tensors: the whole model's; those that neither side of a load holds are left out.
        holdings: files' tensors; several may hold the same.
    """

    def __init__(self, tensors: Sequence[TensorSpec], holdings: Sequence[Holding]) -> None:
        self._tensors = {tensor.name: (number, tensor) for number, tensor in enumerate(tensors)}
        self._holdings = tuple(holdings)
        # By tensor the buffers that have something of it, and by buffer what is in it; buffers of a holding by its number.
        self._buffers: dict[str, dict[tuple[int, str], None]] = defaultdict(dict)
        self._specs = {(number, buffer.name): buffer for number, held in enumerate(holdings) for buffer in held.placement.buffers}
        self._pieces: dict[tuple[int, str], list[Piece]] = defaultdict(list)
        self._padding: dict[tuple[int, str], list[Padding]] = defaultdict(list)
        for number, holding in enumerate(holdings):
            for piece in holding.placement.pieces:
                self._buffers[piece.tensor][number, piece.buffer] = None
                self._pieces[number, piece.buffer].append(piece)
            for box in holding.placement.padding:
                self._padding[number, box.buffer].append(box)

    def plan(self, placement: Placement, *, bucket_bytes: int | None = None) -> LoadPlan:
        """Plan to copy every element of ``placement`` from the files; floating-point dtypes may differ.

        Args:
            placement: the holder to load.
            bucket_bytes: as of ``build_plan``.

        Raises PlacementError where no file holds something of ``placement``.
        """
        used: dict[int, dict[str, None]] = defaultdict(dict)
        for name in dict.fromkeys(piece.tensor for piece in placement.pieces):
            for number, buffer in self._buffers.get(name, ()):
                used[number][buffer] = None
        parts = [self._part(number, used[number]) for number in sorted(used)]
        listed = {piece.tensor for part in (placement, *parts) for piece in part.pieces}
        present = [tensor for _, tensor in sorted(self._tensors[name] for name in listed & self._tensors.keys())]
        plan = build_plan(present, parts, [placement], bucket_bytes=bucket_bytes, transforms=("cast",))
        return LoadPlan(plan, tuple(self._holdings[number] for number in sorted(used)))

    def _part(self, number: int, buffers: Collection[str]) -> Placement:
        """Some of the buffers of a holding, and what is in them."""
        return replace(
            self._holdings[number].placement,
            buffers=tuple(self._specs[number, name] for name in buffers),
            pieces=tuple(piece for name in buffers for piece in self._pieces[number, name]),
            padding=tuple(box for name in buffers for box in self._padding.get((number, name), ())),
        )


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
