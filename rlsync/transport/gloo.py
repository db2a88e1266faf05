"""The transport ``gloo``: messages through host memory between actor ranks and the workers that share no memory with them.

Owns the group; both ends are those of ``rlsync.transport.p2p``. Starts no thread: what waits here is called in a thread of the caller's
own, with a limit, and another one may call ``abandon``.

The group is made of torch's ProcessGroupGloo directly, because the default group belongs to the trainer here and to vLLM there.
gloo can take back no send and no receive. A group in which one is left over is therefore given up as a whole, all its
connections closed, and the next one has a number of its own. Data travels only when both ends have asked for it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import msgspec
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Work

from rlsync.coordinator.messages import Reports, WorkerAssignment, WorkerHello
from rlsync.transport import p2p
from rlsync.transport.ends import EndArguments, Hosted, Routes, SenderContext
from rlsync.transport.p2p import GroupReceiver, GroupSender, SenderEnd, group_of
from rlsync.transport.p2p import host as host
from rlsync.transport.rendezvous import PATIENCE, GroupError, GroupInfo, barrier, compare, enter, seconds, sentence

# No message has this tag: buckets are counted from 0.
_NO_BUCKET = 2**31 - 1


def finding(reports: Reports, worker: WorkerHello) -> str | None:
    """Every worker can be sent messages."""
    return None


def assign(routes: Routes, hosted: Hosted | None) -> EndArguments:
    return p2p.assign(routes, hosted, "gloo")


def make_sender(end: bytes, context: SenderContext) -> GroupSender:
    decoded = msgspec.msgpack.decode(end, type=SenderEnd)
    sender = GroupSender(decoded, lambda number: GlooCommunicator(decoded.group, number, context.timeout_s), torch.device("cpu"))
    context.on_abandon.append(sender.abandon)
    return sender


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> GroupReceiver:
    info = group_of(assignment)
    return GroupReceiver(
        assignment, lambda number: GlooCommunicator(info, number, timeout_s), torch.device("cpu"), device, timeout_s, lands_ahead=False
    )


@dataclass(frozen=True, slots=True)
class Transfer:
    """A send or a receive that has begun, with member ``rank``."""

    work: Work
    rank: int
    bucket: int


# Those of a step that nobody has waited for: gloo waits for a second message where it is asked twice for one.
Transfers = list[Transfer]


class Group:
    """One group of all actor ranks and all workers that are not served through shared memory.

    Args:
        number: groups of one connection are counted; all members have to name the same.
        timeout_s: deadline of the phases; every wait here is shorter.
    """

    def __init__(self, info: GroupInfo, number: int, timeout_s: float) -> None:
        self.info, self.number = info, number
        self._limit_s = PATIENCE * timeout_s
        self._abandoned = threading.Event()
        self._backend: ProcessGroupGloo | None = None

    def open(self) -> None:
        """Find all members and connect to each; returns when everybody is there. Collective over the members.

        Raises GroupError naming who is missing.
        """
        info = self.info
        with self._told("while the group was made"):
            room = enter(info, self.number, self._limit_s)
            versions = barrier(room, info, torch.__version__, self._limit_s, self._abandoned)
            compare(info, [version.partition("+")[0] for version in versions], "torch")
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname=address_towards(info.host, info.port), lazy_init=False)]
            options._timeout = seconds(self._limit_s)
            # These threads run collectives, of which there are none.
            options._threads = 1
            self._backend = ProcessGroupGloo(PrefixStore("mesh", room), info.rank, len(info.members), options)
        if self._abandoned.is_set():
            self.abandon()
            raise GroupError("the gloo group was given up while it was made")

    def send(self, message: torch.Tensor, rank: int, bucket: int) -> Transfer:
        """Begin to send to member ``rank`` (contiguous CPU tensor, left as it is until the transfer has ended)."""
        return self._begin("send", message, rank, bucket)

    def receive(self, message: torch.Tensor, rank: int, bucket: int) -> Transfer:
        """Begin to receive from member ``rank``."""
        return self._begin("recv", message, rank, bucket)

    def _begin(self, method: str, message: torch.Tensor, rank: int, bucket: int) -> Transfer:
        assert self._backend is not None, "open() comes first"
        with self._told(f"with {self.info.members[rank]}, bucket {bucket}"):
            return Transfer(_start(self._backend, method, message, rank, bucket), rank, bucket)

    def wait(self, transfer: Transfer) -> None:
        """Until a transfer has ended. Raises GroupError; the group is closed then."""
        with self._told(f"with {self.info.members[transfer.rank]}, bucket {transfer.bucket}"):
            transfer.work.wait(seconds(self._limit_s))

    def abandon(self) -> None:
        """Close all connections: no memory is written to any more, and who waits to receive, in any thread, is let go at once.

        Who waits for a send in full flow may wait until its time is over. Idempotent, does not block.
        """
        self._abandoned.set()
        backend = self._backend
        if backend is None:
            return
        # ProcessGroupGloo.abort() leaves a wait for one message alone, while a wait that times out closes every connection.
        nothing = torch.zeros(1, dtype=torch.uint8, device="cpu")
        for rank in range(len(self.info.members)):
            if rank != self.info.rank:
                with contextlib.suppress(RuntimeError):
                    _start(backend, "recv", nothing, rank, _NO_BUCKET).wait(timedelta(milliseconds=1))

    @contextlib.contextmanager
    def _told(self, where: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = "it was given up" if self._abandoned.is_set() else sentence(str(error))
            raise GroupError(f"the gloo group broke {where}: {why}") from error


class GlooCommunicator:
    """A group whose messages lie in the host; the work that it hands out are the transfers that have begun."""

    def __init__(self, info: GroupInfo, number: int, timeout_s: float) -> None:
        self.number, self._group = number, Group(info, number, timeout_s)

    def open(self, senders: Sequence[int], receivers: Sequence[int]) -> None:
        """Connects with everybody, because gloo does."""
        self._group.open()

    def carry(
        self,
        step: int,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        after: Sequence[Transfers],
    ) -> Transfers:
        """Waits for ``after``; messages are on their way when it returns."""
        for work in after:
            self.wait(work)
        sending = [self._group.send(message, rank, step) for message, rank in sends]
        return sending + [self._group.receive(message, rank, step) for message, rank in receives]

    def mark(self) -> Transfers:
        """Nothing: what a thread has done with memory of the host is done."""
        return []

    def hold(self, work: Transfers) -> None:
        """Waits."""
        self.wait(work)

    def wait(self, work: Transfers) -> None:
        """Until all have ended. Raises GroupError; the group is closed then."""
        while work:
            self._group.wait(work[-1])
            work.pop()

    def apart(self) -> contextlib.AbstractContextManager[object]:
        """Threads of the host are apart."""
        return contextlib.nullcontext()

    def rest(self, limit_s: float) -> bool:
        """A group that is given up writes nothing any more."""
        return True

    def abandon(self, kept: Sequence[object] = ()) -> None:
        """Close all connections; see ``Group.abandon``."""
        self._group.abandon()


def address_towards(host: str, port: int) -> str:
    """The address of this machine from which packets leave for ``host``; nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _start(backend: ProcessGroupGloo, method: str, message: torch.Tensor, rank: int, tag: int) -> Work:
    """torch's stubs lack the methods of single messages."""
    return getattr(backend, method)([message], rank, tag)
