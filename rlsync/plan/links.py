"""Link classes between holders, and what a plan moves over each. Pure: prices a plan without executing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsync.layout.geometry import DTYPE_BYTES, Location

if TYPE_CHECKING:
    from rlsync.plan.planner import Plan

LINK_NAMES = ("same device", "same host", "other host")
# Of messages between GPUs. Larger ones were measured to take as long (benchmarks/RESULTS.md), and memory at both ends.
MOST_STEP_BYTES = 192 * 2**20


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one execution of a plan moves.

    Attributes:
        bytes_by_link: link name -> bytes copied over it.
        bytes_by_source: holder -> bytes it gives.
        bytes_by_destination: holder -> bytes it receives, in its own dtypes.
        redundancy: holder -> received over held bytes of HF tensors; 1.0 means each byte once and none unneeded.
    """

    bytes_by_link: Mapping[str, int]
    bytes_by_source: Mapping[str, int]
    bytes_by_destination: Mapping[str, int]
    redundancy: Mapping[str, float]


def link_class(source: Location | None, destination: Location | None) -> int:
    """Index into LINK_NAMES: how far two holders are apart. Holders without a location count as one host."""
    if source is None or destination is None:
        return 1
    if source.host != destination.host:
        return 2
    return 0 if source.device is not None and source.device == destination.device else 1


def traffic(plan: Plan) -> Traffic:
    """Count the bytes of a plan by link, source and destination."""
    by_link: dict[str, int] = dict.fromkeys(LINK_NAMES, 0)
    given: dict[str, int] = {p.holder: 0 for p in plan.sources}
    received: dict[str, int] = {p.holder: 0 for p in plan.destinations}
    item_bytes = [{b.name: DTYPE_BYTES[b.dtype] for b in p.buffers} for p in plan.destinations]
    for bucket in plan.buckets:
        for copy in bucket.copies:
            source, destination = plan.sources[copy.source], plan.destinations[copy.destination]
            nbytes = copy.size * item_bytes[copy.destination][copy.destination_buffer]
            by_link[LINK_NAMES[link_class(source.location, destination.location)]] += nbytes
            given[source.holder] += nbytes
            received[destination.holder] += nbytes
    held: dict[str, int] = defaultdict(int)
    for placement, items in zip(plan.destinations, item_bytes, strict=True):
        held[placement.holder] = sum(piece.box.size * items[piece.buffer] for piece in placement.pieces)
    redundancy = {holder: received[holder] / nbytes for holder, nbytes in held.items() if nbytes}
    return Traffic(by_link, given, received, redundancy)


def num_steps(moved: Traffic, bucket_bytes: int) -> int:
    """Number of steps in each of which no holder gives or takes more than ``bucket_bytes`` or ``MOST_STEP_BYTES``."""
    most = max((*moved.bytes_by_source.values(), *moved.bytes_by_destination.values()))
    return max(1, -(-most // min(bucket_bytes, MOST_STEP_BYTES)))
