"""Messages between the members of a group, whatever carries them: the sender of an actor rank and the receiver of a worker.

Owns the memory of messages and the order of who may touch it. Knows no backend: a communicator carries messages and says when they have
ended. On one that is a CUDA stream nobody waits for that here: what comes next is enqueued behind it, and a sync costs no message and no
round trip between two steps. A receiver that is not ready holds up its sender on the device.

A *step* is what travels together: all messages of one bucket, or of a part of it. Steps are counted over all buckets, and all
members go through them in one order. Both ends lay a message out from its regions alone.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, cast

import msgspec
import torch

from rlsync.coordinator.messages import RankExport, WorkerAssignment
from rlsync.copy.cpu import CopyProgram, region
from rlsync.copy.cuda import CudaCopyProgram
from rlsync.errors import PlacementError
from rlsync.plan.packing import PackedMessage, PackedPart, Region, cut, pack_message
from rlsync.transport.ends import Arrival, Buffers, EndArguments, Hosted, HostSettings, PackedArrival, Routes, given_by, placed
from rlsync.transport.rendezvous import GroupError, GroupInfo, Rendezvous
from rlsync.transport.tasks import Lane, Tasks

# A message and the member at its other end.
Message = tuple[torch.Tensor, int]
# A handle on work that has begun; only communicators look into it.
Work = Any
# Maximum steps in flight beside those that have a slot. A device takes in only so many launches before it makes its caller wait, and
# that wait has no limit.
_STEPS_AHEAD = 4
# Abandoned work on a device ends within a fraction of a second.
_CLOSE_S = 5.0


class Communicator(Protocol):
    """A group as one of its members sees it. Its waits have a limit, and raise GroupError when that is over or the group given up."""

    number: int

    def open(self, senders: Sequence[int], receivers: Sequence[int]) -> None:
        """Find all members, and connect to those of whom this one receives and to whom it sends. Collective over the members."""
        ...

    def carry(self, step: int, sends: Sequence[Message], receives: Sequence[Message], after: Sequence[Work]) -> Work:
        """Begin to move messages (1-D uint8) when all of ``after`` has ended; steps in order."""
        ...

    def mark(self) -> Work:
        """A handle on all work that this thread has enqueued so far."""
        ...

    def hold(self, work: Work) -> None:
        """Work that this thread enqueues from now on begins after ``work``."""
        ...

    def wait(self, work: Work) -> None:
        """Until it has ended."""
        ...

    def apart(self) -> contextlib.AbstractContextManager[object]:
        """Work that this thread enqueues inside does not wait for that of other threads, nor theirs for it."""
        ...

    def abandon(self, kept: Sequence[object]) -> None:
        """Release all waiters. ``kept`` stays alive until the device no longer uses it. From any thread, idempotent, does not block."""
        ...

    def rest(self, limit_s: float) -> bool:
        """After ``abandon``: whether all its writes have ended within this time."""
        ...


class Program(Protocol):
    """Copies that are bound to memory."""

    def run(self) -> int:
        """Execute them, or enqueue them on this thread's current stream; returns the bytes written."""
        ...


class SentMessage(msgspec.Struct, frozen=True, array_like=True):
    """The regions of one part that an actor rank sends to member ``receiver`` of the group.

    ``whole_bytes`` is the length of the part where they are all of it, and 0 where other ranks give some.
    """

    destination: int
    receiver: int
    whole_bytes: int
    regions: tuple[Region, ...]


class SenderEnd(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of an actor rank's end. ``messages``: by bucket."""

    group: GroupInfo
    num_slots: int
    messages: tuple[tuple[SentMessage, ...], ...]


def host(routes: Routes, settings: HostSettings) -> Rendezvous:
    """Rank 0: the store at which the members meet."""
    return Rendezvous(settings.bind_host, settings.timeout_s)


def assign(routes: Routes, hosted: Hosted | None, transport: str) -> EndArguments:
    """Who sends what to whom: actor ranks are the first members, then the workers."""
    store, num_actors = cast(Rendezvous, hosted), len(routes.actors)
    members = (*routes.actors, *routes.workers)
    engines = (*(None for _ in routes.actors), *routes.engines)
    first = GroupInfo(store.host, store.port, 0, members, transport, routes.num_steps, engines)
    infos = [msgspec.structs.replace(first, rank=rank) for rank in range(len(members))]
    receivers = {destination: num_actors + index for index, destination in enumerate(routes.destinations)}
    encode = msgspec.msgpack.encode
    senders = tuple(
        encode(SenderEnd(infos[rank], routes.num_slots, tuple(_sent(row, rank, receivers) for row in routes.parts)))
        for rank in range(num_actors)
    )
    return EndArguments(senders, {destination: encode(infos[receiver]) for destination, receiver in receivers.items()}, {})


def _sent(row: Sequence[PackedPart], rank: int, receivers: Mapping[int, int]) -> tuple[SentMessage, ...]:
    given = ((destination, receiver, given_by(row[destination], rank)) for destination, receiver in receivers.items())
    return tuple(
        SentMessage(destination, receiver, row[destination].nbytes if len(mine) == len(row[destination].regions) else 0, mine)
        for destination, receiver, mine in given
        if mine
    )


class GroupSender:
    """An actor rank's end: memory for the messages of ``num_slots`` steps, and the sends that have not ended.

    Args:
        make_communicator: gets the number of a group.
        device: that the memory is on.

    Attributes:
        nbytes: of the memory.
    """

    def __init__(self, end: SenderEnd, make_communicator: Callable[[int], Communicator], device: torch.device) -> None:
        self._end = end
        self._steps = _Steps([_steps_to(row, end.group.num_steps) for row in end.messages])
        self._slots = self._steps.memories(end.num_slots, device)
        self._make_communicator = make_communicator
        self._communicator: Communicator | None = None
        self._in_slot: dict[int, Work] = {}
        self._begun: deque[Work] = deque()
        self.nbytes = sum(slot.nbytes for slot in self._slots)

    def join(self, group: int) -> None:
        """Be in the group of this number; another one is given up. Collective over the members."""
        if self._communicator is not None and self._communicator.number == group:
            return
        self.abandon()
        made = self._communicator = self._make_communicator(group)
        try:
            made.open((), self._steps.peers)
        except BaseException:
            if self._communicator is made:
                self.abandon()
            raise

    def gives(self, bucket: int) -> Iterator[tuple[int, Region]]:
        return ((message.destination, r) for message in self._end.messages[bucket] for r in message.regions)

    def steps(self, bucket: int) -> range:
        return self._steps.of(bucket)

    def views(self, step: int) -> list[tuple[Region, torch.Tensor]]:
        return _regions(self._messages(step))

    def _messages(self, step: int) -> list[tuple[PackedMessage, torch.Tensor]]:
        """The step's messages and their memory, 1-D uint8; the same at every call."""
        return _split(self._slots[step % len(self._slots)], self._steps.messages[step])

    @contextlib.contextmanager
    def sending(self, step: int) -> Iterator[None]:
        """Writes inside come after the slot's former send has ended, and are sent afterwards. Raises GroupError."""
        self._reclaim(step)
        yield
        self._post(step)

    def _reclaim(self, step: int) -> None:
        """Wait, or let the device wait, until the step's slot may be written."""
        communicator = self._communicator
        if communicator is None:
            raise GroupError(f"the {self._end.group.transport} group was given up")
        begun = self._begun
        while len(begun) >= len(self._slots) + _STEPS_AHEAD:
            communicator.wait(begun.popleft())
        former = self._in_slot.pop(step % len(self._slots), None)
        if former is not None:
            communicator.hold(former)

    def _post(self, step: int) -> None:
        """Begin to send the step's messages behind this thread's writes."""
        communicator = self._communicator
        if communicator is None:
            raise GroupError(f"the {self._end.group.transport} group was given up")
        # The lists of this group, also if it is given up meanwhile.
        in_slot, begun = self._in_slot, self._begun
        sends = [(memory, message.peer) for message, memory in self._messages(step)]
        if sends:
            work = in_slot[step % len(self._slots)] = communicator.carry(step, sends, (), [communicator.mark()])
            begun.append(work)

    def abandon(self) -> None:
        """Give the group up; nothing reads the messages any more. From any thread, idempotent, does not block."""
        communicator = self._communicator
        self._communicator, self._in_slot, self._begun = None, {}, deque()
        if communicator is not None:
            communicator.abandon(self._slots)

    def close(self) -> None:
        self.abandon()


class Inbox:
    """A worker's end: memory for its part of ``num_slots`` buckets or steps. One group long: what comes after it has memory of its own.

    A bucket is either handed out as it lies in a slot, or lands in buffers that are known before, step by step.
    """

    def __init__(
        self, parts: Sequence[PackedPart], num_slots: int, num_steps: int, communicator: Communicator, device: torch.device
    ) -> None:
        self._parts, self._num_slots, self._device = parts, num_slots, device
        self._steps = _Steps([steps_of(part, num_steps) for part in parts])
        self.communicator = communicator
        self._slots: list[torch.Tensor] = []
        self._packed: list[torch.Tensor] = []
        self._memory: list[torch.Tensor] = []
        self._assembly: dict[int, Program] = {}
        self._landing: dict[int, tuple[list[int], list[Program]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that were needed so far."""
        return sum(memory.nbytes for memory in (*self._slots, *self._packed, *self._memory))

    def open(self) -> None:
        """Open the communicator. Collective over the members."""
        self.communicator.open(self._steps.peers, ())

    def receive(self, bucket: int) -> torch.Tensor:
        """This worker's part of a bucket (1-D uint8), when it is here; stays until the bucket ``num_slots`` later. Raises GroupError."""
        (step,) = self._steps.of(bucket)
        messages = self._steps.messages[step]
        if not self._slots:
            self._make_slots()
        slot = self._slots[bucket % len(self._slots)][: self._parts[bucket].nbytes]
        arriving = [(messages[0], slot)] if len(messages) == 1 else _split(self._packed[0], messages)
        communicator = self.communicator
        with communicator.apart():
            communicator.hold(communicator.carry(step, (), _receives(arriving), [communicator.mark()]))
            if len(messages) > 1:
                if bucket not in self._assembly:
                    pairs = [(placed(slot, r.slot_offset, r, r.slot_strides), view) for r, view in _regions(arriving)]
                    self._assembly[bucket] = bind_program(pairs, self._device)
                self._assembly[bucket].run()
            communicator.wait(communicator.mark())
        return slot

    def _make_slots(self) -> None:
        most = max(part.nbytes for part in self._parts)
        self._slots = [_memory(most, self._device) for _ in range(min(self._num_slots, len(self._parts)))]
        several = [row for row in self._steps.messages if len(row) > 1]
        self._packed = [_memory(max(sum(p.nbytes for p in row) for row in several), self._device)] if several else []

    def bind(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Have a bucket land in these buffers: all of it, by name, contiguous, in checkpoint layout. Nothing is under way."""
        addresses = [tensor.data_ptr() for tensor in buffers.values()]
        if self.is_bound(bucket, buffers):
            return
        if not self._memory:
            self._memory = self._steps.memories(self._num_slots, self._device)
        programs = []
        for step in self._steps.of(bucket):
            arriving = _split(self._memory[step % len(self._memory)], self._steps.messages[step])
            pairs = [(region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides), view) for r, view in _regions(arriving)]
            programs.append(bind_program(pairs, self._device))
        self._landing[bucket] = addresses, programs

    def is_bound(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> bool:
        """Whether the bucket lands in these buffers, where they are now."""
        return bucket in self._landing and self._landing[bucket][0] == [tensor.data_ptr() for tensor in buffers.values()]

    def land(self, bucket: int, after: Work) -> None:
        """Receive a bucket into the buffers that it is bound to; returns when it is complete. Raises GroupError.

        ``after``: work that has to end before the buffers are written.
        """
        communicator, memory = self.communicator, self._memory
        taken: deque[Work] = deque()
        with communicator.apart():
            communicator.hold(after)
            for step, program in zip(self._steps.of(bucket), self._landing[bucket][1], strict=True):
                # The slot was last read by the step that is so many before, and by nobody but this thread.
                free = [taken[-len(memory)]] if len(taken) >= len(memory) else [communicator.mark()]
                arriving = _split(memory[step % len(memory)], self._steps.messages[step])
                if arriving:
                    communicator.hold(communicator.carry(step, (), _receives(arriving), free))
                    program.run()
                taken.append(communicator.mark())
                if len(taken) > len(memory) + _STEPS_AHEAD:
                    communicator.wait(taken.popleft())
            communicator.wait(communicator.mark())

    def abandon(self) -> None:
        """Give the group up. From any thread, idempotent, does not block."""
        programs = [*self._assembly.values(), *(program for _, row in self._landing.values() for program in row)]
        self.communicator.abandon([*self._slots, *self._packed, *self._memory, *programs])


class _Steps:
    """The steps of all buckets, one after another.

    Attributes:
        messages: by step.
        peers: members that messages go to or come from.
    """

    def __init__(self, by_bucket: Sequence[Sequence[tuple[PackedMessage, ...]]]) -> None:
        self._first = list(accumulate((len(rows) for rows in by_bucket), initial=0))
        self.messages = [row for rows in by_bucket for row in rows]
        self.peers = tuple(sorted({message.peer for row in self.messages for message in row}))

    def of(self, bucket: int) -> range:
        return range(self._first[bucket], self._first[bucket + 1])

    def memories(self, num_slots: int, device: torch.device) -> list[torch.Tensor]:
        """Memory for the largest step, so many times."""
        most = max(sum(message.nbytes for message in row) for row in self.messages)
        return [_memory(most, device) for _ in range(min(num_slots, len(self.messages)))]


def bind_program(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Program:
    """Copies (destination, source) for the memory of a device."""
    return CudaCopyProgram(pairs, device=device) if device.type == "cuda" else CopyProgram(pairs)


def _memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Memory of that device (1-D uint8), whatever the process's default one. Zeros, because what lies between regions travels too."""
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    if memory.is_cuda:
        # Streams that will use it know nothing of this one.
        torch.cuda.current_stream(device).synchronize()
    return memory


def _split(memory: torch.Tensor, messages: Sequence[PackedMessage]) -> list[tuple[PackedMessage, torch.Tensor]]:
    """The messages and the memory of each, one after another."""
    sizes = [p.nbytes for p in messages]
    return list(zip(messages, memory[: sum(sizes)].split(sizes), strict=True)) if messages else []


def _receives(arriving: Iterable[tuple[PackedMessage, torch.Tensor]]) -> list[Message]:
    return [(memory, message.peer) for message, memory in arriving]


def _regions(arriving: Iterable[tuple[PackedMessage, torch.Tensor]]) -> list[tuple[Region, torch.Tensor]]:
    """Regions, and where they lie in their messages."""
    return [pair for message, memory in arriving for pair in zip(message.regions, views(message, memory), strict=True)]


def _steps_to(messages: Iterable[SentMessage], num_steps: int) -> tuple[tuple[PackedMessage, ...], ...]:
    """What an actor rank sends of a bucket, by step."""
    return _by_step([(m.receiver, m.regions, m.whole_bytes) for m in messages], num_steps)


def steps_of(part: PackedPart, num_steps: int = 1) -> tuple[tuple[PackedMessage, ...], ...]:
    """What a worker receives of a bucket, by step and actor rank; an actor rank has the same number in the group."""
    groups: dict[int, list[Region]] = defaultdict(list)
    for r in part.regions:
        groups[r.source].append(r)
    whole_bytes = part.nbytes if len(groups) == 1 else 0
    return _by_step([(source, regions, whole_bytes) for source, regions in sorted(groups.items())], num_steps)


def _by_step(given: Iterable[tuple[int, Sequence[Region], int]], num_steps: int) -> tuple[tuple[PackedMessage, ...], ...]:
    """``given``: peer, regions, and bytes of the part where they are all of it."""
    if num_steps == 1:
        return (tuple(pack_message(*each) for each in given),)
    cuts = [(peer, cut(regions, num_steps)) for peer, regions, _ in given]
    return tuple(tuple(pack_message(peer, pieces[step], 0) for peer, pieces in cuts if pieces[step]) for step in range(num_steps))


def views(message: PackedMessage, memory: torch.Tensor) -> list[torch.Tensor]:
    """The regions of a message where they lie in ``memory`` (1-D uint8 of its ``nbytes``), in their shapes and dtypes."""
    return [placed(memory, offset, r, strides) for r, (offset, strides) in zip(message.regions, message.places, strict=True)]


def group_of(assignment: WorkerAssignment) -> GroupInfo:
    """The group that a worker is assigned to."""
    return msgspec.msgpack.decode(assignment.end, type=GroupInfo)


class GroupReceiver:
    """A bucket is asked for as soon as there is memory for it, while those before it are taken in.

    Each group has a thread and memory of its own, so that nothing that is left over of one gets into the next. What ``abandon`` leaves to
    end by itself has ended before the next group is made.

    Args:
        message_device: that messages are on. device: of the worker.
        lands_ahead: whether messages wait for their receiver on the device, so that nobody has to hear first that they were sent.
    """

    def __init__(
        self,
        assignment: WorkerAssignment,
        make_communicator: Callable[[int], Communicator],
        message_device: torch.device,
        device: torch.device,
        timeout_s: float,
        *,
        lands_ahead: bool,
    ) -> None:
        self._info = group_of(assignment)
        self._parts, self._num_slots, self._timeout_s = assignment.parts, assignment.num_slots, timeout_s
        self._message_device, self._device = message_device, device
        self._make_communicator = make_communicator
        self.lands_ahead = lands_ahead
        self._communicator: Communicator | None = None
        self._former: Communicator | None = None
        self._inbox: Inbox | None = None
        self._tasks = Tasks()
        self._lane: Lane | None = None
        self._arrived: dict[Any, Any] = {}
        self._landing: Mapping[int, Buffers] = {}
        self._begun: Work = None
        self._num_asked = 0

    @property
    def fd(self) -> int:
        return self._tasks.fd

    @property
    def extra_bytes(self) -> int:
        return 0 if self._inbox is None else self._inbox.nbytes

    def join(self, group: int) -> bool | None:
        if self._communicator is None or self._communicator.number != group:
            self.abandon()
            made, former = self._make_communicator(group), self._former
            self._communicator = made
            self._tasks, lane = Tasks(), Lane(self._use_device, name="rlsync-receiver")
            self._lane = lane
            lane.submit(self._tasks, "open", lambda: self._open(made, former))
        self._collect()
        if "open" in self._arrived:
            self._inbox, self._former = self._arrived.pop("open"), None
        self._landing, self._num_asked = {}, 0
        return None if self._inbox is None else True

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _open(self, communicator: Communicator, former: Communicator | None) -> Inbox:
        if former is not None and not former.rest(self._timeout_s):
            raise GroupError(f"the {self._info.transport} group before this one still writes to this worker; restart the engine")
        inbox = Inbox(self._parts, self._num_slots, self._info.num_steps, communicator, self._message_device)
        inbox.open()
        return inbox

    def prepare(self, standing: Mapping[int, Buffers], exports: Sequence[RankExport]) -> None:
        for bucket, buffers in standing.items() if self.lands_ahead else ():
            assert self._inbox is not None, "join() comes first"
            self._inbox.bind(bucket, buffers)

    @contextlib.contextmanager
    def receiving(self, standing: Mapping[int, Buffers], first: int = 0) -> Iterator[None]:
        self._num_asked = first
        if self.lands_ahead:
            assert self._inbox is not None, "join() comes first"
            for bucket, buffers in standing.items():
                self._inbox.bind(bucket, buffers)
            self._landing, self._begun = standing, self._inbox.communicator.mark()
            self._ask(first + self._num_slots)
        yield

    def fetch(self, bucket: int, buckets_ready: int, exports: Sequence[RankExport]) -> Arrival | None:
        window = bucket + self._num_slots
        self._ask(window if self.lands_ahead else min(buckets_ready, window))
        self._collect()
        if bucket not in self._arrived:
            return None
        slot = self._arrived.pop(bucket)
        return Landed(self._landing[bucket]) if slot is None else PackedArrival(slot, self._parts[bucket].segments)

    def _ask(self, end: int) -> None:
        """Have the buckets before ``end`` received, one after another."""
        inbox, lane = self._inbox, self._lane
        assert inbox is not None and lane is not None, "join() comes first"
        for number in range(self._num_asked, min(end, len(self._parts))):
            self._num_asked = number + 1
            if self._parts[number].nbytes:
                landing = number in self._landing
                lane.submit(self._tasks, number, partial(inbox.land, number, self._begun) if landing else partial(inbox.receive, number))

    def _collect(self) -> None:
        for outcome in self._tasks.finished():
            if outcome.error is not None:
                try:
                    raise outcome.error
                finally:
                    # The traceback refers to this frame, and would keep a broken group until a worker at rest collects cycles.
                    del outcome
            self._arrived[outcome.key] = outcome.result

    def abandon(self) -> None:
        if self._inbox is not None:
            self._inbox.abandon()
        elif self._communicator is not None:
            self._communicator.abandon(())
        if self._lane is not None:
            self._lane.stop()
        if self._communicator is not None:
            # Kept only while it writes: a reference to a broken group keeps its port.
            self._former = None if self._communicator.rest(0.0) else self._communicator
        self._communicator = self._inbox = self._lane = None
        # Calls that still end in the former thread report to the former tasks.
        self._tasks, self._arrived, self._num_asked = Tasks(), {}, 0
        self._landing, self._begun = {}, None

    def close(self) -> None:
        """Waits for abandoned writes into the model's memory, as another connection may write there next."""
        self.abandon()
        if self._former is not None:
            self._former.rest(_CLOSE_S)
            self._former = None


@dataclass(frozen=True, slots=True)
class Landed:
    """A bucket that is where it belongs: in these buffers."""

    buffers: Buffers

    def land(self, buffers: Buffers) -> None:
        """Nothing is left to copy. Raises PlacementError where the buffers have moved since ``receiving``."""
        moved = [name for name, tensor in buffers.items() if name not in self.buffers or self.buffers[name].data_ptr() != tensor.data_ptr()]
        if moved:
            raise PlacementError(f"{len(moved)} parameters have moved while they were written, among them {moved[0]}")
