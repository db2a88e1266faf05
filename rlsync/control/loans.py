"""Loans: device memory of an actor rank that processes of its host may read. Wire form; says where, opens nothing."""

from __future__ import annotations

from typing import Annotated

import msgspec

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
