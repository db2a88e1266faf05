"""One failure in the words that every peer gets: what happened, whom it names, and where the sync stood. Sends and keeps nothing."""

from __future__ import annotations

from rlsync.control import messages as m
from rlsync.control.progress import Progress
from rlsync.control.roster import Member, Roster, some


def found(cause: str, peer: Member | None, phase: str, sync: Progress | None) -> m.Error:
    """What the coordinator has seen for itself; ``peer`` is the one it came from, where it came from one."""
    return _error(cause, phase, sync, None if peer is None else peer.engine, _bucket(peer, phase, sync))


def told(peer: Member, message: m.Failed, phase: str, sync: Progress | None) -> m.Error:
    """What a peer says of itself. It knows better than the coordinator where in a sync it was, and on whose account."""
    cause, engine = f"{peer}: {message.cause}", peer.engine if message.engine is None else message.engine
    if phase == "connect":
        return _error(cause, phase, sync, engine, None)
    return _error(cause, message.phase, sync, engine, _bucket(peer, phase, sync) if message.bucket is None else message.bucket)


def late(roster: Roster, timeout_s: float, phase: str, sync: Progress | None) -> m.Error:
    """A phase that took too long: whom it waits for, as many as fill a host or two, and the first of them as the one that is named."""
    if phase == "connect":
        absent = roster.absent()
        laggards, culprit, engine = [words for _, words in absent], None, absent[0][0] if absent else None
    else:
        assert sync is not None
        slow = sync.laggards(phase, roster.actors(), roster.workers())
        laggards, culprit = [f"{p}, which was {what}" for p, what in slow], slow[0][0] if slow else None
        engine = culprit.engine if culprit else None
    cause = f"nothing within {timeout_s:g} s from {some(laggards, 16, '; ')}"
    return _error(cause, phase, sync, engine, _bucket(culprit, phase, sync))


def _bucket(peer: Member | None, phase: str, sync: Progress | None) -> int | None:
    """The bucket that a peer is at, while buckets move."""
    return sync.bucket_of(peer) if phase == "transfer" and sync is not None and peer is not None else None


def _error(cause: str, phase: str, sync: Progress | None, engine: str | None, bucket: int | None) -> m.Error:
    attempt, version = (0, None) if sync is None else (sync.attempt, sync.version)
    return m.Error(attempt=attempt, phase=phase, cause=m.shortened(cause), engine=engine, version=version, bucket=bucket)
