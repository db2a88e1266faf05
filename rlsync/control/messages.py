"""The vocabulary of the sync channel and its wire form: every message by name, and how it becomes bytes and is read again.

Every message that belongs to a sync carries ``attempt``, the count of ``sync`` calls since connect, so that an answer
to a failed sync is never taken for one to the next. Counters (``buckets_ready``, ``buckets_writable``) are cumulative:
a message that is read late says no less than one that is read in time. Knows no sockets and no process.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from rlsync.control.fields import MAX_TEXT
from rlsync.control.fields import Message as Message
from rlsync.control.fields import Sum as Sum
from rlsync.control.from_coordinator import AllCommitted, Catalogue, Commit, Connected, Error, Finished, Ready, Share, Surveyed, Writable
from rlsync.control.from_coordinator import Lender as Lender
from rlsync.control.from_peers import (
    ActorHello,
    Answered,
    Attached,
    Committed,
    Done,
    Failed,
    Filled,
    Finish,
    Goodbye,
    Joined,
    Lent,
    Loaded,
    Planned,
    Recorded,
    Start,
    State,
    WorkerHello,
)
from rlsync.control.from_peers import WorkerTimes as WorkerTimes
from rlsync.errors import RlsyncError

MAX_MESSAGE_BYTES = 256 * 2**20
# A first message is a hello, and whoever sends more is not one of ours.
MAX_HELLO_BYTES = 16 * 2**10

FromPeer = (
    WorkerHello | ActorHello | Recorded | Planned | Attached | Answered | Start | Lent | Filled | Joined | Done | Loaded | Committed
    | Finish | Failed | Goodbye | State
)  # fmt: skip
FromCoordinator = Catalogue | Surveyed | Share | Connected | Writable | Ready | Commit | AllCommitted | Finished | Error

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_from_peer = msgspec.msgpack.Decoder(FromPeer, strict=True)
_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator, strict=True)


def encode(message: FromPeer | FromCoordinator) -> bytes:
    """Raises RlsyncError for more than the other side takes, which would hang up without a word."""
    raw = _encoder.encode(message)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise RlsyncError(f"{type(message).__name__} takes {len(raw):,} bytes, and a message may have {MAX_MESSAGE_BYTES:,}")
    return raw


def shortened(text: str) -> str:
    """A cause that fits into a message: the end is kept, where tracebacks say what happened."""
    return text if len(text) <= MAX_TEXT else "... " + text[4 - MAX_TEXT :]


def decode_from_peer(raw: bytes) -> FromPeer:
    """Raises msgspec.ValidationError or msgspec.DecodeError on anything that is not one of the messages."""
    return _decode(_from_peer, raw)


def decode_from_coordinator(raw: bytes) -> FromCoordinator:
    """Raises msgspec.ValidationError or msgspec.DecodeError on anything that is not one of the messages."""
    return _decode(_from_coordinator, raw)


def _decode(decoder: msgspec.msgpack.Decoder[M], raw: bytes) -> M:
    try:
        return decoder.decode(raw)
    except (UnicodeDecodeError, RecursionError, OverflowError) as error:
        # msgspec lets some errors of what it reads with through.
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from None
