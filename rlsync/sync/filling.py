"""The actor's share of a sync, bound to memory: copies its regions into slots and messages, and sums up those that are verified."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rlsync.coordinator.assignments import ActorParcel, ActorPart, ActorShare
from rlsync.coordinator.messages import Sum
from rlsync.copy.checksum import checksums
from rlsync.copy.cpu import CopyProgram, region
from rlsync.copy.cuda import CudaCopyProgram, strided
from rlsync.copy.sums import Sums, Views, place_of
from rlsync.copy.tables import Move, moves_of
from rlsync.errors import PlacementError
from rlsync.plan.packing import Region
from rlsync.plan.verification import num_rounds, round_of, rounds_in
from rlsync.transport.boxes import Outbox
from rlsync.transport.parcels import make_parcel, placed


@dataclass(frozen=True, slots=True)
class Filling:
    """What one fill did: bytes copied, and checksums of the memory it copied or lent."""

    nbytes: int
    sums: tuple[Sum, ...]


@dataclass(frozen=True, slots=True)
class _Round:
    """Regions that are verified together, with their streams: those that arrive as they are, and those that are cast."""

    same: list[tuple[int, Region]]
    cast: list[tuple[int, Region]]


class _Program(Protocol):
    def run(self) -> int: ...


# Destination and source.
_Pair = tuple[torch.Tensor, torch.Tensor]


class Filler:
    """Fills the slots of rings, and sends messages to workers that have no part in them. What is lent, it only sums up.

    Programs are made once per bucket, and follow parameters that have moved; neither slots nor messages move.

    Args:
        share: of this actor rank.
        buffers: memory of this rank's placement.
        slots: of the ring in host memory, 1-D uint8; bucket ``k`` goes into slot ``k % len(slots)``.
        stage: slots of the staging ring in device memory, alike.
        outbox: for what the share sends, if anything.
    """

    def __init__(
        self,
        share: ActorShare,
        buffers: Mapping[str, torch.Tensor],
        slots: Sequence[torch.Tensor],
        outbox: Outbox | None = None,
        stage: Sequence[torch.Tensor] = (),
    ) -> None:
        self._share, self._buffers, self._slots, self._stage, self._outbox = share, buffers, slots, stage, outbox
        # By bucket what is put into slots, by step what is packed into messages.
        self._programs: dict[int, tuple[_Program, ...]] = {}
        self._packing: dict[int, tuple[_Program, ...]] = {}
        self._sums = Sums()
        self._rounds = [self._by_round(bucket) for bucket in range(len(share.parts))]
        self._shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in buffers.items()}
        self._place = place_of(buffers.values())

    def check(self) -> None:
        """Look where the parameters are now. Raises PlacementError where they are no longer what they were at connect."""
        if any(tensor.is_cuda for tensor in self._buffers.values()):
            # They may have been written on any stream of this process, and others read them.
            torch.cuda.synchronize()
        place = place_of(self._buffers.values())
        if place == self._place:
            return
        changed = [
            f"{name} is {tuple(t.shape)} {t.dtype}, was {tuple(self._shapes[name][0])} {self._shapes[name][1]}"
            for name, t in self._buffers.items()
            if (t.shape, t.dtype) != self._shapes[name] or t.untyped_storage().nbytes() == 0 < t.numel()
        ]
        if changed:
            raise PlacementError(
                f"{len(changed)} parameters have changed since connect(), or have no memory: {changed[0]}; onload them first"
            )
        moves = moves_of((old, nbytes, new) for (old, nbytes), (new, _) in zip(self._place, place, strict=True))
        self._place = place
        _follow(self._programs, moves)
        _follow(self._packing, moves)

    def fill(self, bucket: int, turn: int) -> Filling:
        """Copy this rank's regions of a bucket into its slots and its messages; these are on their way when it returns.

        What is lent of the bucket, and what was copied on a device, is complete then and can be read by other processes.
        """
        if bucket not in self._programs:
            self._programs[bucket] = _bind(self._pairs(bucket))
        nbytes = sum(program.run() for program in self._programs[bucket])
        if self._outbox is not None:
            nbytes += self._send(bucket, self._outbox)
        sums = self._sum_up(bucket, turn)
        if self._stage:
            # Its readers are other processes, which know nothing of this one's streams.
            torch.cuda.current_stream(self._stage[0].device).synchronize()
        return Filling(nbytes, sums)

    def _send(self, bucket: int, outbox: Outbox) -> int:
        """Pack and post the bucket's messages, step by step; returns the bytes packed."""
        nbytes = 0
        for step in outbox.steps(bucket):
            programs = self._pack(step, outbox)
            outbox.reclaim(step)
            nbytes += sum(program.run() for program in programs)
            outbox.post(step)
        return nbytes

    def _pack(self, step: int, outbox: Outbox) -> tuple[_Program, ...]:
        """The programs that write a step's messages."""
        if step not in self._packing:
            pairs = [pair for p, memory in outbox.messages(step) for pair in zip(p.views(memory), map(self._view, p.regions), strict=True)]
            self._packing[step] = _bind(pairs)
        return self._packing[step]

    def _pairs(self, bucket: int) -> Iterator[_Pair]:
        for part in self._share.parts[bucket]:
            slot = self._slots[bucket % len(self._slots)]
            yield from ((placed(slot, part.offset + r.slot_offset, r, r.slot_strides), self._view(r)) for r in part.regions)
        for part in self._share.staged[bucket] if self._share.staged else ():
            parcel = make_parcel(part.stream, part.regions, 0)
            memory = self._stage[bucket % len(self._stage)][part.offset : part.offset + parcel.nbytes]
            yield from zip(parcel.views(memory), map(self._view, part.regions), strict=True)

    def prepare(self) -> None:
        """Do what the first syncs would otherwise do once."""
        for bucket, rounds in enumerate(self._rounds):
            self._sums.prepare(bucket, list(rounds), self._place, self._views(bucket))
            if self._outbox is not None:
                for step in self._outbox.steps(bucket):
                    self._pack(step, self._outbox)

    def _sum_up(self, bucket: int, turn: int) -> tuple[Sum, ...]:
        """Of the regions whose turn it is, in the dtype in which they arrive."""
        rounds = [number for number in rounds_in(self._share.verify, turn) if number in self._rounds[bucket]]
        same = [given for number in rounds for given in self._rounds[bucket][number].same]
        cast = [given for number in rounds for given in self._rounds[bucket][number].cast]
        values = self._sums.begin(bucket, rounds, self._place, self._views(bucket)).values()
        # A cast makes new memory each time, to which nothing can be bound.
        values += checksums([self._view(r).to(getattr(torch, r.dtype)) for _, r in cast])
        return tuple(Sum(stream, r.number, value) for (stream, r), value in zip((*same, *cast), values, strict=True))

    def _views(self, bucket: int) -> Views:
        return lambda number: [self._view(r) for _, r in self._rounds[bucket][number].same]

    def _by_round(self, bucket: int) -> dict[int, _Round]:
        """Everything that is given of a bucket and ever verified."""
        share = self._share
        given: list[ActorPart | ActorParcel] = [*share.parts[bucket], *share.parcels[bucket]]
        given += [part for table in (share.lent, share.staged) if table for part in table[bucket]]
        rounds: dict[int, _Round] = defaultdict(lambda: _Round([], []))
        for part in given if num_rounds(share.verify) else ():
            for r in part.regions:
                found = rounds[round_of(share.verify, r.number)]
                is_cast = str(self._buffers[r.source_buffer].dtype) != f"torch.{r.dtype}"
                (found.cast if is_cast else found.same).append((part.stream, r))
        return dict(rounds)

    def _view(self, r: Region) -> torch.Tensor:
        return region(self._buffers[r.source_buffer], r.source_offset, r.shape, r.source_strides)


def _bind(given: Iterable[_Pair]) -> tuple[_Program, ...]:
    """The programs that copy these pairs: in the host, and on the device that destinations are on."""
    pairs = list(given)
    in_host = [(d, s) for d, s in pairs if not d.is_cuda]
    # Sources by address: a program would keep memory alive that parameters have left.
    on_device = [(d, strided(s)) for d, s in pairs if d.is_cuda]
    programs: list[_Program] = [CopyProgram(in_host)] if in_host else []
    if on_device:
        programs.append(CudaCopyProgram(on_device, device=on_device[0][0].device))
    return tuple(programs)


def _follow(bound: dict[int, tuple[_Program, ...]], moves: Sequence[Move] | None) -> None:
    """Have programs read where parameters are now. Those that cannot are made anew when their turn comes."""
    for key, programs in list(bound.items()):
        if moves is None or not all(isinstance(program, CudaCopyProgram) for program in programs):
            del bound[key]
            continue
        for program in programs:
            assert isinstance(program, CudaCopyProgram)
            program.move_sources(moves)
