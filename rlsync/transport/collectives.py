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
from rlsync.copy.cpu import Buffers, bind, bind_pack, bind_unpack, packed_bytes
from rlsync.errors import RlsyncError
from rlsync.plan.planner import Bucket, Copy, Plan

_Key = TypeVar("_Key", int, tuple[int, int])


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
        self._dtypes = [{b.name: getattr(torch, b.dtype) for b in p.buffers} for p in plan.sources]

    def deliver(self, bucket: int, destinations: Sequence[Buffers]) -> None:
        """Move one bucket. ``destinations[d]`` are the buffers of destination ``d``, read only on the rank that holds it.

        Collective over the group.
        """
        copies = self._plan.buckets[bucket]
        if self._destination_ranks is None:
            self._broadcast(copies, destinations[0])
        else:
            self._send(copies, destinations, self._destination_ranks)

    def _broadcast(self, bucket: Bucket, destination: Buffers) -> None:
        arriving = []
        for source, copies in sorted(_grouped(bucket.copies, lambda c: c.source).items()):
            message = self._message(copies)
            if source == self._rank:
                bind_pack(copies, self._sources, message).run()
            root = source if self._group is None else dist.get_global_rank(self._group, source)
            arriving.append((copies, message, dist.broadcast(message, root, group=self._group, async_op=True)))
        for copies, message, work in arriving:
            work.wait()
            bind_unpack(copies, message, destination, self._source_dtypes(copies)).run()

    def _send(self, bucket: Bucket, destinations: Sequence[Buffers], ranks: Sequence[int]) -> None:
        operations, unpacking, kept = [], [], []
        for (source, destination), copies in sorted(_grouped(bucket.copies, lambda c: (c.source, c.destination)).items()):
            receiver = ranks[destination]
            if source == receiver == self._rank:
                bind(copies, self._sources, destinations[destination]).run()
            elif source == self._rank:
                message = self._message(copies)
                bind_pack(copies, self._sources, message).run()
                kept.append(message)
                operations.append(dist.P2POp(dist.isend, message, group=self._group, group_peer=receiver))
            elif receiver == self._rank:
                message = self._message(copies)
                operations.append(dist.P2POp(dist.irecv, message, group=self._group, group_peer=source))
                unpacking.append((copies, message, destination))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        for copies, message, destination in unpacking:
            bind_unpack(copies, message, destinations[destination], self._source_dtypes(copies)).run()

    def _source_dtypes(self, copies: Sequence[Copy]) -> dict[str, torch.dtype]:
        return {c.tensor: self._dtypes[c.source][c.source_buffer] for c in copies}

    def _message(self, copies: Sequence[Copy]) -> torch.Tensor:
        item_bytes = {name: dtype.itemsize for name, dtype in self._source_dtypes(copies).items()}
        return torch.empty(packed_bytes(copies, item_bytes), dtype=torch.uint8, device=self._device)


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
