"""What each peer has to do with each bucket of a connection, and device memory that others may read. Wire form; opens nothing.

Made from a plan on actor rank 0.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from rlsync.plan.packing import Region, Segment


class RingInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ring of slots to map: ``num_slots`` times ``slot_bytes`` behind the file ``path``, which carries ``token``."""

    path: str
    token: str
    num_slots: int
    slot_bytes: int


class GroupInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group of ``transport`` to join as ``rank``; its members meet at a store on ``host`` and ``port``.

    ``members`` names them for errors: actor ranks in order, then the workers that get their bytes through the group.
    ``num_steps``: into how many steps the messages of a bucket are cut. ``engines``: of each member, None for an actor rank.
    """

    host: str
    port: int
    rank: int
    members: tuple[str, ...]
    transport: Literal["gloo", "nccl"] = "gloo"
    num_steps: int = 1
    engines: tuple[str | None, ...] = ()


class WorkerPart(msgspec.Struct, frozen=True, array_like=True):
    """A worker's part of one bucket: where it begins in the ring's slot (bytes), its length, and what lies in it."""

    offset: int
    nbytes: int
    segments: tuple[Segment, ...]
    regions: tuple[Region, ...]


class ActorPart(msgspec.Struct, frozen=True, array_like=True):
    """The regions of one stream and one bucket that an actor rank gives; the part begins at byte ``offset`` of the slot."""

    stream: int
    offset: int
    regions: tuple[Region, ...]


class ActorParcel(msgspec.Struct, frozen=True, array_like=True):
    """The regions of one stream and one bucket that an actor rank sends to member ``taker`` of the group.

    ``whole_bytes`` is the length of the part where they are all of it, and 0 where other ranks give some.
    """

    stream: int
    taker: int
    whole_bytes: int
    regions: tuple[Region, ...]


class WorkerShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a worker needs to take part. ``digest`` is that of the plan; ``parts`` are by bucket.

    Its bytes come through ``group`` or through ``ring`` where there is one; otherwise it reads the device memory that actor
    ranks ``lenders`` lend. Those of them that stage what they give are in ``staged``, by bucket: rank -> byte of a slot of its
    staging ring at which this worker's parcel begins.
    """

    digest: str
    num_slots: int
    stream: int
    verify: str
    parts: tuple[WorkerPart, ...]
    ring: RingInfo | None = None
    group: GroupInfo | None = None
    lenders: tuple[int, ...] = ()
    staged: tuple[dict[int, int], ...] = ()


class ActorShare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an actor rank needs to take part, by bucket: what it puts into ``ring``, and what it sends in ``group``.

    ``lent`` is read by workers where it lies. ``staged`` is put into a ring in device memory, of slots of ``stage_bytes``, each
    part as a parcel. A bucket to which it gives nothing is empty.
    """

    digest: str
    num_slots: int
    verify: str
    parts: tuple[tuple[ActorPart, ...], ...]
    parcels: tuple[tuple[ActorParcel, ...], ...]
    ring: RingInfo | None = None
    group: GroupInfo | None = None
    lent: tuple[tuple[ActorPart, ...], ...] = ()
    staged: tuple[tuple[ActorPart, ...], ...] = ()
    stage_bytes: int = 0


_Size = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Handle = Annotated[bytes, msgspec.Meta(max_length=256)]


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """One allocation: where it begins in its owner's process, its bytes, and the CUDA IPC handle by which others map it.

    ``number`` is the driver's for it, which no other allocation of that process ever has: memory that was freed and taken
    again at the same address differs by it.
    """

    address: _Size
    nbytes: _Size
    number: _Size
    handle: _Handle


class Lent(msgspec.Struct, frozen=True, array_like=True):
    """One buffer that is lent: its address in the owner's process, its bytes, and its dtype by torch's name without the prefix."""

    address: _Size
    nbytes: _Size
    dtype: str


class Loan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an actor rank lends.

    Attributes:
        allocations: that hold everything else that is named here.
        buffers: of its placement, those that may be read in place.
        stage: address of slot 0 of its staging ring, or 0 where it has none; slots follow each other every ``stage_bytes``.
        stays: whether the memory stays allocated between syncs. If not, readers let go of it before they say that they have loaded.
    """

    allocations: tuple[Allocation, ...] = ()
    buffers: dict[str, Lent] = {}
    stage: _Size = 0
    stage_bytes: _Size = 0
    stays: bool = True
