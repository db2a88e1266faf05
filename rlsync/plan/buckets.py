"""Cuts tensors into consecutive groups, each as large as the limits of its holders allow. Pure integers and names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

from rlsync.layout.geometry import TensorSpec

# By name of a tensor: bytes by holder. A source and a destination are two holders.
HolderBytes = Mapping[str, Mapping[Hashable, int]]


def grouped(tensors: Iterable[TensorSpec], holder_bytes: HolderBytes, limits: Mapping[Hashable, int]) -> tuple[tuple[TensorSpec, ...], ...]:
    """Groups in which no holder has more bytes than its limit; a tensor that alone exceeds a limit ends its group.

    Args:
        holder_bytes: a tensor that is not listed has no bytes.
        limits: by holder; one that is not listed has none.
    """
    groups: list[list[TensorSpec]] = []
    filled: dict[Hashable, int] = defaultdict(int)
    for tensor in tensors:
        by_holder = holder_bytes.get(tensor.name, {})
        if not groups or any(filled[h] and filled[h] + nbytes > limits[h] for h, nbytes in by_holder.items() if nbytes and h in limits):
            groups.append([])
            filled.clear()
        groups[-1].append(tensor)
        for holder, nbytes in by_holder.items():
            filled[holder] += nbytes
    return tuple(map(tuple, groups))


def limits_of(holder_bytes: HolderBytes, bucket_bytes: int | None) -> dict[Hashable, int]:
    """Limits for ``grouped``: of each holder ``bucket_bytes``, or its largest tensor, which is never split. None: no limits."""
    limits: dict[Hashable, int] = {}
    if bucket_bytes is None:
        return limits
    for by_holder in holder_bytes.values():
        for holder, nbytes in by_holder.items():
            limits[holder] = max(limits.get(holder, bucket_bytes), nbytes)
    return limits
