"""One outcome for all ranks of a process group: an error of any rank is raised on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rlsync import errors
from rlsync.errors import RlsyncError


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
