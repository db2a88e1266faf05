"""The two ends of a group: an actor rank's outbox and a worker's inbox, and whose turn it is with each slot of their memory.

Own that memory and the order of who may touch it. Know no backend: a wire carries messages and says when they have ended. On a
wire that is a CUDA stream nobody waits for that here: what comes next is enqueued behind it, and a sync costs no message and no
round trip between two steps. A receiver that is not ready holds up its sender on the device.

A *step* is what travels together: all messages of one bucket, or of a part of it. Steps are counted over all buckets, and all
members go through them in one order.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from rlsync.coordinator.assignments import ActorShare, WorkerShare
from rlsync.copy.cpu import CopyProgram, region
from rlsync.copy.cuda import CudaCopyProgram
from rlsync.plan.packing import Region
from rlsync.transport.parcels import Parcel, placed, steps_of, steps_to

# A message and the member at its other end.
Message = tuple[torch.Tensor, int]
# What stands for something that has begun; wires know what it is.
Ticket = Any
# So many steps may be enqueued and not ended, beside those that have a slot. A device takes in only so many launches before it
# makes its caller wait, and that wait has no limit.
_STEPS_AHEAD = 4


class Wire(Protocol):
    """A group as one of its members sees it. What it waits for has a limit, and raises GroupError when it is over or given up."""

    number: int

    def open(self, givers: Sequence[int], takers: Sequence[int]) -> None:
        """Find all members, and connect to those of whom this one receives and to whom it sends. Collective over the members."""
        ...

    def carry(self, step: int, sends: Sequence[Message], receives: Sequence[Message], after: Sequence[Ticket]) -> Ticket:
        """Begin to move messages (1-D uint8) when all of ``after`` has ended; steps in order."""
        ...

    def mark(self) -> Ticket:
        """What this thread has begun on its device so far."""
        ...

    def hold(self, ticket: Ticket) -> None:
        """What this thread begins on its device from now on begins after ``ticket``."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Until it has ended."""
        ...

    def apart(self) -> contextlib.AbstractContextManager[object]:
        """What this thread begins on its device inside does not wait for other threads, nor they for it."""
        ...

    def abandon(self, kept: Sequence[object]) -> None:
        """Let go whoever waits. ``kept`` lives until the device uses none of it. From any thread, idempotent, does not block."""
        ...

    def rest(self, limit_s: float) -> bool:
        """After ``abandon``: whether nothing of it is written any more, within so long."""
        ...


class Program(Protocol):
    """Copies that are bound to memory."""

    def run(self) -> int:
        """Execute them, or enqueue them on this thread's current stream; returns the bytes written."""
        ...


class Outbox:
    """An actor rank's end: memory for the messages of ``num_slots`` steps, and the sends that have not ended.

    Args:
        make_wire: gets the number of a group.
        device: that the memory is on.

    Attributes:
        number: of the group that it is in, or None.
        nbytes: of the memory.
    """

    def __init__(self, share: ActorShare, make_wire: Callable[[int], Wire], device: torch.device) -> None:
        assert share.group is not None
        self._steps = _Steps([steps_to(row, share.group.num_steps) for row in share.parcels])
        self._slots = self._steps.memories(share.num_slots, device)
        self._make_wire = make_wire
        self._wire: Wire | None = None
        self._in_slot: dict[int, Ticket] = {}
        self._begun: deque[Ticket] = deque()
        self.number: int | None = None
        self.nbytes = sum(slot.nbytes for slot in self._slots)

    def join(self, number: int) -> None:
        """Be in the group of this number; a former one is given up. Collective over the members."""
        self.abandon()
        wire = self._wire = self._make_wire(number)
        wire.open((), self._steps.peers)
        self.number = number

    def steps(self, bucket: int) -> range:
        """The steps of a bucket; each is reclaimed, written and posted before the next one."""
        return self._steps.of(bucket)

    def messages(self, step: int) -> list[tuple[Parcel, torch.Tensor]]:
        """The step's parcels and their memory, 1-D uint8; the same at every call."""
        return _split(self._slots[step % len(self._slots)], self._steps.parcels[step])

    def reclaim(self, step: int) -> None:
        """What this thread writes from now on may go into the step's slot. Raises GroupError."""
        wire = self._wire
        assert wire is not None, "join() comes first"
        begun = self._begun
        while len(begun) >= len(self._slots) + _STEPS_AHEAD:
            wire.wait(begun.popleft())
        former = self._in_slot.pop(step % len(self._slots), None)
        if former is not None:
            wire.hold(former)

    def post(self, step: int) -> None:
        """Begin to send the step's messages, when what this thread has written is written."""
        wire = self._wire
        assert wire is not None
        # Those of this group, also where it is given up meanwhile.
        in_slot, begun = self._in_slot, self._begun
        sends = [(memory, parcel.peer) for parcel, memory in self.messages(step)]
        if sends:
            ticket = in_slot[step % len(self._slots)] = wire.carry(step, sends, (), [wire.mark()])
            begun.append(ticket)

    def abandon(self) -> None:
        """Give the group up; nothing reads the messages any more. From any thread, idempotent, does not block."""
        wire = self._wire
        self._wire, self.number, self._in_slot, self._begun = None, None, {}, deque()
        if wire is not None:
            wire.abandon(self._slots)


class Inbox:
    """A worker's end: memory for its part of ``num_slots`` buckets or steps. One group long: what comes after it has memory of its own.

    A bucket is either handed out as it lies in a slot, or lands in buffers that are known before, step by step.
    """

    def __init__(self, share: WorkerShare, wire: Wire, device: torch.device) -> None:
        assert share.group is not None
        self._parts, self._num_slots, self._device = share.parts, share.num_slots, device
        self._steps = _Steps([steps_of(part, share.group.num_steps) for part in share.parts])
        self.wire = wire
        self._slots: list[torch.Tensor] = []
        self._packed: list[torch.Tensor] = []
        self._memory: list[torch.Tensor] = []
        self._assembly: dict[int, Program] = {}
        self._landing: dict[int, tuple[list[int], list[Program]]] = {}

    @property
    def nbytes(self) -> int:
        """Of the memory that was needed so far."""
        return sum(memory.nbytes for memory in (*self._slots, *self._packed, *self._memory))

    def open(self) -> None:
        """Open the wire. Collective over the members."""
        self.wire.open(self._steps.peers, ())

    def receive(self, bucket: int) -> torch.Tensor:
        """This worker's part of a bucket (1-D uint8), when it is here; stays until the bucket ``num_slots`` later. Raises GroupError."""
        (step,) = self._steps.of(bucket)
        parcels = self._steps.parcels[step]
        if not self._slots:
            self._make_slots()
        slot = self._slots[bucket % len(self._slots)][: self._parts[bucket].nbytes]
        arriving = [(parcels[0], slot)] if len(parcels) == 1 else _split(self._packed[0], parcels)
        wire = self.wire
        with wire.apart():
            wire.hold(wire.carry(step, (), _receives(arriving), [wire.mark()]))
            if len(parcels) > 1:
                if bucket not in self._assembly:
                    pairs = [(placed(slot, r.slot_offset, r, r.slot_strides), view) for r, view in _regions(arriving)]
                    self._assembly[bucket] = bind_program(pairs, self._device)
                self._assembly[bucket].run()
            wire.wait(wire.mark())
        return slot

    def _make_slots(self) -> None:
        most = max(part.nbytes for part in self._parts)
        self._slots = [_memory(most, self._device) for _ in range(min(self._num_slots, len(self._parts)))]
        several = [row for row in self._steps.parcels if len(row) > 1]
        self._packed = [_memory(max(sum(p.nbytes for p in row) for row in several), self._device)] if several else []

    def bind(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> None:
        """Have a bucket land in these buffers: all of it, by name, contiguous, in checkpoint layout. Nothing is under way."""
        places = [tensor.data_ptr() for tensor in buffers.values()]
        if self.is_bound(bucket, buffers):
            return
        if not self._memory:
            self._memory = self._steps.memories(self._num_slots, self._device)
        programs = []
        for step in self._steps.of(bucket):
            arriving = _split(self._memory[step % len(self._memory)], self._steps.parcels[step])
            pairs = [(region(buffers[r.buffer], r.buffer_offset, r.shape, r.buffer_strides), view) for r, view in _regions(arriving)]
            programs.append(bind_program(pairs, self._device))
        self._landing[bucket] = places, programs

    def is_bound(self, bucket: int, buffers: Mapping[str, torch.Tensor]) -> bool:
        """Whether the bucket lands in these buffers, where they are now."""
        return bucket in self._landing and self._landing[bucket][0] == [tensor.data_ptr() for tensor in buffers.values()]

    def land(self, bucket: int, after: Ticket) -> None:
        """Receive a bucket into the buffers that it was bound to; returns when all of it is there. Raises GroupError.

        ``after``: what has to have ended before they are written.
        """
        wire, memory = self.wire, self._memory
        taken: deque[Ticket] = deque()
        with wire.apart():
            wire.hold(after)
            for step, program in zip(self._steps.of(bucket), self._landing[bucket][1], strict=True):
                # The slot was last read by the step that is so many before, and by nobody but this thread.
                free = [taken[-len(memory)]] if len(taken) >= len(memory) else [wire.mark()]
                arriving = _split(memory[step % len(memory)], self._steps.parcels[step])
                if arriving:
                    wire.hold(wire.carry(step, (), _receives(arriving), free))
                    program.run()
                taken.append(wire.mark())
                if len(taken) > len(memory) + _STEPS_AHEAD:
                    wire.wait(taken.popleft())
            wire.wait(wire.mark())

    def abandon(self) -> None:
        """Give the group up. From any thread, idempotent, does not block."""
        programs = [*self._assembly.values(), *(program for _, row in self._landing.values() for program in row)]
        self.wire.abandon([*self._slots, *self._packed, *self._memory, *programs])


class _Steps:
    """The steps of all buckets, one after another.

    Attributes:
        parcels: by step.
        peers: members that messages go to or come from.
    """

    def __init__(self, by_bucket: Sequence[Sequence[tuple[Parcel, ...]]]) -> None:
        self._first = list(accumulate((len(rows) for rows in by_bucket), initial=0))
        self.parcels = [row for rows in by_bucket for row in rows]
        self.peers = tuple(sorted({parcel.peer for row in self.parcels for parcel in row}))

    def of(self, bucket: int) -> range:
        return range(self._first[bucket], self._first[bucket + 1])

    def memories(self, num_slots: int, device: torch.device) -> list[torch.Tensor]:
        """Memory for the largest step, so many times."""
        most = max(sum(parcel.nbytes for parcel in row) for row in self.parcels)
        return [_memory(most, device) for _ in range(min(num_slots, len(self.parcels)))]


def bind_program(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> Program:
    """Copies (destination, source) for the memory of a device."""
    return CudaCopyProgram(pairs, device=device) if device.type == "cuda" else CopyProgram(pairs)


def _memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """Of that device, whatever the process's default one. Zeros, because what lies between regions travels too."""
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    if memory.is_cuda:
        # Streams that will use it know nothing of this one.
        torch.cuda.current_stream(device).synchronize()
    return memory


def _split(memory: torch.Tensor, parcels: Sequence[Parcel]) -> list[tuple[Parcel, torch.Tensor]]:
    """The parcels and the memory of each, one after another."""
    sizes = [p.nbytes for p in parcels]
    return list(zip(parcels, memory[: sum(sizes)].split(sizes), strict=True)) if parcels else []


def _receives(arriving: Iterable[tuple[Parcel, torch.Tensor]]) -> list[Message]:
    return [(memory, parcel.peer) for parcel, memory in arriving]


def _regions(arriving: Iterable[tuple[Parcel, torch.Tensor]]) -> list[tuple[Region, torch.Tensor]]:
    """Regions, and where they lie in their messages."""
    return [pair for parcel, memory in arriving for pair in zip(parcel.regions, parcel.views(memory), strict=True)]
