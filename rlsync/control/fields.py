"""What messages of the sync channel are made of: bounded numbers and texts, and the base that tags each. Knows no message."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_TEXT = 2**16
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Name = Annotated[str, msgspec.Meta(max_length=1024)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base that gives every message its type tag."""


class Sum(msgspec.Struct, frozen=True, array_like=True):
    """Checksum of one region of one stream."""

    stream: Count
    region: Count
    value: int
