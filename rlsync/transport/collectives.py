"""Collectives of one torch.distributed group: agreement on one outcome, and execution of a plan between its ranks. gloo and NCCL alike.

Source ``i`` of a plan is rank ``i`` of the group. Knows plans and tensors; knows no model and no engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from rlsync import errors
from rlsync.copy.cpu import Buffers, bind, bind_pack, bind_unpack, packed_bytes, region
from rlsync.errors import RlsyncError
from rlsync.plan.planner import Bucket, Copy, Plan

# From here on a transfer of its own costs less than packing and unpacking.
STRAIGHT_BYTES = 2**20

_Key = TypeVar("_Key", int, tuple[int, int])
_Messages = Callable[[Sequence[Copy]], torch.Tensor]


class Exchange:
    """Delivers the buckets of a plan, one at a time. Memory: the messages of one bucket."""

    def __init__(
        self,
        plan: Plan,
        sources: Buffers,
        *,
        device: torch.device,
        destination_ranks: Sequence[int] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """``sources`` are the buffers of this rank's source placement.

        ``destination_ranks[d]`` is the rank that holds destination ``d``; None delivers the plan's only destination to
        every rank.
        """
        assert len(plan.sources) == dist.get_world_size(group), "source i of the plan is rank i of the group"
        assert destination_ranks is not None or len(plan.destinations) == 1
        self._plan, self._sources, self._device, self._group = plan, sources, device, group
        self._destination_ranks = destination_ranks
        self._rank = dist.get_rank(group)
        # Messages of one bucket, used again for the next: memory that is touched for the first time costs many times the copy into it.
        self._messages: list[torch.Tensor] = []
        self._dtypes = [{b.name: getattr(torch, b.dtype) for b in p.buffers} for p in plan.sources]

    def deliver(self, bucket: int, destinations: Sequence[Buffers]) -> None:
        """Move one bucket. ``destinations[d]`` are the buffers of destination ``d``, read only on the rank that holds it.

        Collective over the group.
        """
        copies, unused = self._plan.buckets[bucket], iter(self._messages)
        self._messages = []

        def message(copies: Sequence[Copy]) -> torch.Tensor:
            """Memory for a message; that of the bucket before where it is large enough."""
            item_bytes = {name: dtype.itemsize for name, dtype in self._source_dtypes(copies).items()}
            nbytes, old = packed_bytes(copies, item_bytes), next(unused, None)
            if old is None or old.numel() < nbytes:
                old = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self._messages.append(old)
            return old[:nbytes]

        if self._destination_ranks is None:
            self._broadcast(copies, destinations[0], message)
        else:
            self._send(copies, destinations, self._destination_ranks, message)

    def _broadcast(self, bucket: Bucket, destination: Buffers, message_for: _Messages) -> None:
        works, arriving = [], []
        for source, copies in sorted(_grouped(bucket.copies, lambda c: c.source).items()):
            root = source if self._group is None else dist.get_global_rank(self._group, source)
            straight, packed = self._split(copies)
            messages = [self._taken(c) if source == self._rank else _given(c, destination) for c in straight]
            if packed:
                messages.append(message_for(packed))
                if source == self._rank:
                    bind_pack(packed, self._sources, messages[-1]).run()
                else:
                    arriving.append((packed, messages[-1]))
            works += [dist.broadcast(message.view(torch.uint8), root, group=self._group, async_op=True) for message in messages]
        # While those of others are on their way.
        bind((c for c in bucket.copies if c.source == self._rank), self._sources, destination).run()
        for work in works:
            work.wait()
        for copies, message in arriving:
            bind_unpack(copies, message, destination, self._source_dtypes(copies)).run()

    def _send(self, bucket: Bucket, destinations: Sequence[Buffers], ranks: Sequence[int], message_for: _Messages) -> None:
        operations, unpacking, kept = [], [], []
        for (source, destination), copies in sorted(_grouped(bucket.copies, lambda c: (c.source, c.destination)).items()):
            receiver = ranks[destination]
            if source == receiver == self._rank:
                kept.append((copies, destination))
                continue
            if self._rank not in (source, receiver):
                continue
            straight, packed = self._split(copies)
            messages = [self._taken(c) if source == self._rank else _given(c, destinations[destination]) for c in straight]
            if packed:
                messages.append(message_for(packed))
                if source == self._rank:
                    bind_pack(packed, self._sources, messages[-1]).run()
                else:
                    unpacking.append((packed, messages[-1], destination))
            operation, peer = (dist.isend, receiver) if source == self._rank else (dist.irecv, source)
            operations += [dist.P2POp(operation, message.view(torch.uint8), group=self._group, group_peer=peer) for message in messages]
        works = dist.batch_isend_irecv(operations) if operations else []
        # While those of others are on their way.
        for copies, destination in kept:
            bind(copies, self._sources, destinations[destination]).run()
        for work in works:
            work.wait()
        for copies, message, destination in unpacking:
            bind_unpack(copies, message, destinations[destination], self._source_dtypes(copies)).run()

    def _split(self, copies: Sequence[Copy]) -> tuple[list[Copy], list[Copy]]:
        """Copies that are contiguous on both sides, so that none but the bytes need to travel, and those that a message carries."""
        straight: list[Copy] = []
        packed: list[Copy] = []
        for c in copies:
            item_bytes = self._dtypes[c.source][c.source_buffer].itemsize
            is_straight = c.source_strides == c.destination_strides == (1,) and c.size * item_bytes >= STRAIGHT_BYTES
            (straight if is_straight else packed).append(c)
        return straight, packed

    def _taken(self, copy: Copy) -> torch.Tensor:
        return region(self._sources[copy.source_buffer], copy.source_offset, copy.shape, (1,))

    def _source_dtypes(self, copies: Sequence[Copy]) -> dict[str, torch.dtype]:
        return {c.tensor: self._dtypes[c.source][c.source_buffer] for c in copies}


def _given(copy: Copy, destination: Buffers) -> torch.Tensor:
    return region(destination[copy.destination_buffer], copy.destination_offset, copy.shape, (1,))


def _grouped(copies: Sequence[Copy], key: Callable[[Copy], _Key]) -> dict[_Key, list[Copy]]:
    groups: dict[_Key, list[Copy]] = defaultdict(list)
    for copy in copies:
        groups[key(copy)].append(copy)
    return groups


def gather_bytes(payload: bytes, *, device: torch.device, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """The payload of every rank, in rank order, as raw bytes (no pickle). Collective over the group."""
    world_size = dist.get_world_size(group)
    mine = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(lengths, mine, group=group)
    sizes = [int(n.item()) for n in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    if payload:
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    if padded.numel():
        dist.all_gather(parts, padded, group=group)
    return [part[:size].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]


@contextmanager
def agreed(*, device: torch.device, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block that contains no collective; an exception on any rank is raised on every rank.

    A rank that failed itself raises its own exception; the others raise an RlsyncError (of the same type, where it is one of
    ours) that names the ranks. Collective over the group.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # whatever it is, the others wait for word of it
        failure = error
    text = "" if failure is None else f"{type(failure).__name__}: {failure}"
    said = gather_bytes(text.encode(), device=device, group=group)
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {message.decode()}" for rank, message in enumerate(said) if message]
    if failed:
        raise _same_type(failed[0])("; ".join(failed))


def _same_type(message: str) -> type[RlsyncError]:
    """The most specific rlsync error that can be made from a message alone."""
    name = message.split(": ", 2)[1]
    kinds = {kind.__name__: kind for kind in (errors.ConfigError, errors.PlacementError, errors.CheckpointError)}
    return kinds.get(name, RlsyncError)
