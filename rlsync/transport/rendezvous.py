"""How members of a group find each other: a store on one host, and barriers in it. Knows no backend and no message."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import msgspec
from torch.distributed import PrefixStore, Store, TCPStore

from rlsync.errors import RlsyncError

# A wait for a group ends before the deadline of the phase it is in, so that the error says whom it was for.
PATIENCE = 0.75
_POLL_S = 0.01


class GroupInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A group of ``transport`` to join as ``rank``; its members meet at a store on ``host`` and ``port``.

    ``members`` names them for errors: actor ranks in order, then the workers that get their bytes through the group.
    ``num_steps``: into how many steps the messages of a bucket are cut. ``engines``: of each member, None for an actor rank.
    """

    host: str
    port: int
    rank: int
    members: tuple[str, ...]
    transport: str = "gloo"
    num_steps: int = 1
    engines: tuple[str | None, ...] = ()


class GroupError(RlsyncError, ConnectionError):
    """The group could not be made, or a member of it is gone or silent. ``engine``: whose worker that is, where it is known to be one."""

    def __init__(self, cause: str, engine: str | None = None) -> None:
        super().__init__(cause)
        self.engine = engine


class Rendezvous:
    """The store through which members find each other, on ``bind_host`` and no other address. Lives until it is dropped.

    Attributes:
        host, port: where it listens; the port is of the system's choice, unless one is given.
        store: this process's own connection to it.

    Raises OSError where this host cannot listen there.
    """

    def __init__(self, bind_host: str, timeout_s: float, port: int = 0) -> None:
        self.host = bind_host
        family = socket.getaddrinfo(bind_host, None)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((bind_host, port))
        listener.listen(128)
        self.port: int = listener.getsockname()[1]
        # torch's own listener would be bound to every address.
        self.store: Store = TCPStore(
            bind_host, self.port, None, True, seconds(timeout_s), wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def seal(self) -> None:
        """Nothing: every group that a connection makes anew meets here too."""

    def close(self) -> None:
        """Give it up; there is no call to end a store."""
        del self.store


def enter(info: GroupInfo, number: int, limit_s: float) -> Store:
    """The part of the store that belongs to the group of this number. Raises GroupError where it cannot be reached."""
    with told_of_store(info):
        store = TCPStore(info.host, info.port, None, False, seconds(limit_s), wait_for_workers=False)
        return PrefixStore(f"group-{number}", store)


@contextlib.contextmanager
def told_of_store(info: GroupInfo) -> Iterator[None]:
    """Raise torch's errors of a store as GroupErrors."""
    try:
        yield
    except RuntimeError as error:
        raise GroupError(f"the {info.transport} group broke while the group was made: {sentence(str(error))}") from error


def barrier(
    room: Store, info: GroupInfo, value: str, limit_s: float, abandoned: threading.Event, *, topic: str = "version"
) -> tuple[str, ...]:
    """The values of all members under ``topic``, by rank, when all have set one. Collective over the members.

    Connections are made after it, because making them can hardly be interrupted. Raises GroupError naming the missing members.
    """
    deadline_s = time.monotonic() + limit_s
    keys = [f"{topic}-{rank}" for rank in range(len(info.members))]
    with told_of_store(info):
        room.set(keys[info.rank], value)
        while not room.check(keys):
            if abandoned.wait(_POLL_S):
                raise GroupError(f"the {info.transport} group was given up while it was made")
            if time.monotonic() > deadline_s:
                absent = [rank for rank, key in enumerate(keys) if not room.check([key])]
                if not absent:
                    break  # they came while this process was stopped
                names = ", ".join(info.members[rank] for rank in absent)
                engine = info.engines[absent[0]] if info.engines else None
                raise GroupError(f"{names} did not come to the {info.transport} group within {limit_s:g} s", engine)
        return tuple(room.get(key).decode() for key in keys)


def compare(info: GroupInfo, versions: Sequence[str], what: str) -> None:
    """Raise GroupError where members differ in their version of ``what``, whose messages are those of one version."""
    for member, version in zip(info.members, versions, strict=True):
        if version != versions[0]:
            raise GroupError(
                f"{member} runs {what} {version}, {info.members[0]} runs {what} {versions[0]}; the messages of {info.transport} are "
                f"those of one version: install the same {what} on both"
            )


def seconds(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s)


def sentence(text: str) -> str:
    """torch's message, without the source line before it and the advice behind it."""
    return re.sub(r"^\[[^\]]*\] ", "", text.partition("\n")[0]).partition(". This is")[0]
