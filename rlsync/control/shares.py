"""Shares: what one peer has to do with each bucket of a connection. Wire form; made from a plan on actor rank 0."""

from __future__ import annotations

import msgspec

from rlsync.staging import Region, Segment


class RingInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ring of slots to map: ``num_slots`` times ``slot_bytes`` behind the file ``path``, which carries ``token``."""

    path: str
    token: str
    num_slots: int
    slot_bytes: int


class WorkerPart(msgspec.Struct, frozen=True, array_like=True):
    """A worker's part of one bucket: where it begins in the slot (bytes), its length, and what lies in it."""

    offset: int
    nbytes: int
    segments: tuple[Segment, ...]
    regions: tuple[Region, ...]


class ActorPart(msgspec.Struct, frozen=True, array_like=True):
    """The regions of one stream and one bucket that an actor rank gives; the part begins at byte ``offset`` of the slot."""

    stream: int
    offset: int
    regions: tuple[Region, ...]


class WorkerShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a worker needs to take part. ``digest`` is that of the plan; ``parts`` are by bucket."""

    digest: str
    ring: RingInfo
    stream: int
    verify: str
    parts: tuple[WorkerPart, ...]


class ActorShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an actor rank needs to take part. ``parts`` are by bucket; a bucket to which it gives nothing is empty."""

    digest: str
    ring: RingInfo
    verify: str
    parts: tuple[tuple[ActorPart, ...], ...]
