"""What planning has to know of each way to move bytes: a table, in order of preference. Pure; the code of a row is in its module.

A new transport is a module of ``rlsync.transport`` and a row here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

# Where the buffers of a holder are: in the host; in device memory that other processes of the host cannot map; mappable but reallocated
# each sync; mappable and stable.
Memory = Literal["host", "device", "unstable", "stable"]


@dataclass(frozen=True, slots=True)
class TransportRow:
    """One way to move bytes.

    Attributes:
        module: that has both of its ends; see ``rlsync.transport.ends``.
        is_grouped: it carries messages between the members of a group. A connection has one group, of one transport.
        is_by_gpu: it finds one GPU nearer than another. Others go through host memory, where all are equally near.
        is_shared: workers of one host that hold the same read the same bytes, which are written once.
        in_place: where it is the only transport and all workers write into their parameters, buckets need no room: they are ``read``
            where they lie, unless they are staged, or travel in ``steps``.
    """

    name: str
    module: str
    is_grouped: bool = False
    is_by_gpu: bool = False
    is_shared: bool = False
    in_place: Literal["", "read", "steps"] = ""


TRANSPORTS = {
    row.name: row
    for row in (
        TransportRow("ipc", "rlsync.transport.ipc", is_by_gpu=True, in_place="read"),
        TransportRow("shm", "rlsync.transport.shm", is_shared=True),
        TransportRow("nccl", "rlsync.transport.nccl", is_grouped=True, in_place="steps"),
        TransportRow("gloo", "rlsync.transport.gloo", is_grouped=True),
    )
}


def in_one_group(chosen: Iterable[str]) -> tuple[str, ...]:
    """The same transports, where those of groups are all the least preferred of them: a group's members speak alike."""
    chosen = tuple(chosen)
    grouped = [name for name, row in TRANSPORTS.items() if row.is_grouped and name in chosen]
    return tuple(grouped[-1] if TRANSPORTS[name].is_grouped else name for name in chosen)


def in_place(transports: Iterable[str], *, is_direct: bool) -> Literal["", "read", "steps"]:
    """How bytes go from parameters to parameters with these transports, by ``TransportRow.in_place``; empty where they do not.

    ``is_direct``: whether all workers write into their parameters.
    """
    used = set(transports)
    return TRANSPORTS[next(iter(used))].in_place if is_direct and len(used) == 1 else ""


def is_staged(memory: Memory, mode: str, *, is_near: bool) -> bool:
    """Whether a reader of a holder's device memory reads a ring in which the holder puts it first, and not where it lies.

    So where it cannot be mapped, and where it would have to be mapped anew in every sync from another GPU: mapping takes far longer than
    the copy (benchmarks/RESULTS.md). A ring is mapped once.

    Args:
        mode: ``weight_sync.staging``, ``auto`` or ``always``.
        is_near: whether both are on one GPU.
    """
    return mode == "always" or memory == "device" or (memory == "unstable" and not is_near)


def fills_buckets(transports: Iterable[str], *, is_direct: bool, staged: bool) -> bool:
    """Whether what a destination takes of a holder counts for the size of buckets.

    Not what goes from parameters to parameters, of which nobody has to be told in parts.

    Args:
        transports: of all destinations. Where there are several, buckets are those of the others.
        staged: whether it goes through a ring of the holder's, see ``is_staged``.
    """
    return staged or not in_place(transports, is_direct=is_direct)
