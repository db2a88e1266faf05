"""A transport in one file, for processes that are threads of this one: a dictionary of packed messages. Knows no GPU and no socket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import torch

from rlsync.coordinator.messages import RankExport, Reports, WorkerAssignment, WorkerHello
from rlsync.copy.cpu import CopyProgram, region
from rlsync.plan.packing import Region, pack_message
from rlsync.transport.ends import Buffers, EndArguments, Hosted, HostSettings, Routes, SenderContext, given_by
from rlsync.transport.p2p import steps_of, views

# By what a sender exports: by destination and bucket, the message.
BOXES: dict[int, dict[tuple[int, int], torch.Tensor]] = {}


class SenderEnd(msgspec.Struct, frozen=True):
    rank: int
    num_slots: int
    # By bucket, destinations and what each is given.
    given: tuple[tuple[tuple[int, tuple[Region, ...]], ...], ...]


def finding(reports: Reports, worker: WorkerHello) -> str | None:
    return None if worker.pid_domain == "threads" else "it is no thread of this process"


def host(routes: Routes, settings: HostSettings) -> None:
    """Nothing."""


def assign(routes: Routes, hosted: Hosted | None) -> EndArguments:
    ranks, encode = range(len(routes.actors)), msgspec.msgpack.encode
    given = [[tuple((d, given_by(row[d], rank)) for d in routes.destinations) for row in routes.parts] for rank in ranks]
    senders = tuple(encode(SenderEnd(rank, routes.num_slots, tuple(given[rank]))) for rank in ranks)
    return EndArguments(senders, dict.fromkeys(routes.destinations, b""), dict.fromkeys(routes.destinations, tuple(ranks)))


def make_sender(end: bytes, context: SenderContext) -> MailboxSender:
    return MailboxSender(msgspec.msgpack.decode(end, type=SenderEnd))


def make_receiver(assignment: WorkerAssignment, timeout_s: float, device: torch.device) -> MailboxReceiver:
    return MailboxReceiver(assignment)


class MailboxSender:
    def __init__(self, end: SenderEnd) -> None:
        self._end = end
        self._messages = [{d: pack_message(d, regions) for d, regions in row} for row in end.given]
        most = max(message.nbytes for row in self._messages for message in row.values())
        self._memory = {(d, s): torch.zeros(most, dtype=torch.uint8) for d, _ in end.given[0] for s in range(end.num_slots)}

    def join(self, group: int) -> bytes | None:
        if id(self) in BOXES:
            return None
        BOXES[id(self)] = {}
        return msgspec.msgpack.encode(id(self))

    def gives(self, bucket: int) -> Iterator[tuple[int, Region]]:
        return ((d, r) for d, message in self._messages[bucket].items() for r in message.regions)

    def steps(self, bucket: int) -> range:
        return range(bucket, bucket + 1)

    def views(self, step: int) -> Iterator[tuple[Region, torch.Tensor]]:
        for d, message in self._messages[step].items():
            memory = self._memory[d, step % self._end.num_slots][: message.nbytes]
            yield from zip(message.regions, views(message, memory), strict=True)

    @contextlib.contextmanager
    def sending(self, step: int) -> Iterator[None]:
        yield
        BOXES[id(self)].update({(d, step): self._memory[d, step % self._end.num_slots] for d in self._messages[step]})

    def close(self) -> None:
        BOXES.pop(id(self), None)


class MailboxReceiver:
    fd, lands_ahead, extra_bytes = None, False, 0

    def __init__(self, assignment: WorkerAssignment) -> None:
        self._assignment = assignment
        self._boxes: dict[int, int] = {}

    def join(self, group: int) -> bool:
        return True

    def prepare(self, standing: Mapping[int, Buffers], exports: Sequence[RankExport]) -> None:
        self._boxes.update((told.actor_rank, msgspec.msgpack.decode(told.export, type=int)) for told in exports)

    def receiving(self, standing: Mapping[int, Buffers], first: int = 0) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def fetch(self, bucket: int, buckets_ready: int, exports: Sequence[RankExport]) -> MailboxArrival:
        self.prepare({}, exports)
        return MailboxArrival(self, bucket)

    def land(self, bucket: int, buffers: Buffers) -> None:
        part = self._assignment.parts[bucket]
        # Each lies as a message of several ranks, though one gives it all.
        for message in (m for row in steps_of(part) for m in row):
            dense = pack_message(message.peer, message.regions)
            memory = BOXES[self._boxes[message.peer]][self._assignment.destination, bucket]
            pairs = zip(dense.regions, views(dense, memory[: dense.nbytes]), strict=True)
            CopyProgram((region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides), view) for r, view in pairs).run()

    def abandon(self) -> None: ...

    def close(self) -> None: ...


class MailboxArrival:
    def __init__(self, receiver: MailboxReceiver, bucket: int) -> None:
        self._receiver, self._bucket = receiver, bucket

    def land(self, buffers: Buffers) -> None:
        self._receiver.land(self._bucket, buffers)
