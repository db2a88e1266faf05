"""What the ranks of ``test_nccl_communicators`` do: half of them actor ranks, the others workers, each on a GPU of its own.

Every rank prints what it did and when, and ends with the stacks of its threads when that takes too long.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlsync.layout.geometry import Box, BufferSpec, Piece, Placement, TensorSpec
from rlsync.plan.packing import lay_out
from rlsync.plan.planner import build_plan
from rlsync.transport.nccl import NcclCommunicator
from rlsync.transport.p2p import Program
from rlsync.transport.rendezvous import GroupError, GroupInfo, Rendezvous
from tests.p2p_scene import HOST, Scene

ROWS = 4096
_started_s = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _started_s:7.3f}] {text}", flush=True)


class Rank:
    """This process: device, place, and the scene with its own memory. Workers share the columns of a matrix, actors its rows."""

    def __init__(self, folder: str, megabytes: int, num_steps: int, timeout_s: float, limit_s: float) -> None:
        faulthandler.dump_traceback_later(limit_s, exit=True)
        self.rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.pairs = world_size // 2
        self.device = torch.device("cuda", self.rank)
        torch.cuda.set_device(self.device)
        self.is_actor = self.rank < self.pairs
        self.folder, self.world_size = Path(folder), world_size
        self.place = self.rank if self.is_actor else self.rank - self.pairs
        columns = megabytes * 2**20 // 2 // ROWS // 64 * 64
        shapes = {"big": (ROWS, columns), "flat": (columns,), "few": (3,)}
        self.tensors = tuple(TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items())
        givers, takers = ([self._placement(side, i) for i in range(self.pairs)] for side in ("actor", "worker"))
        plan = build_plan(self.tensors, givers, takers)
        rendezvous = self._meet(Path(folder, "port"), timeout_s)
        mine = (givers if self.is_actor else takers)[self.place]
        self.memory = {b.name: torch.zeros(b.shape, dtype=torch.bfloat16, device=self.device) for b in mine.buffers}
        nobody: list[dict[str, torch.Tensor]] = [{} for _ in range(self.pairs)]
        sources, wanted = list(nobody), list(nobody)
        (sources if self.is_actor else wanted)[self.place] = self.memory

        def make_communicator(info: GroupInfo, number: int) -> NcclCommunicator:
            return NcclCommunicator(info, number, timeout_s, self.device)

        self.scene = Scene(lay_out(plan), sources, wanted, rendezvous, make_communicator, self.device, "nccl", num_steps=num_steps)
        self.nbytes = sum(part.nbytes for row in self.scene.parts for part in row[:1])
        say(f"rank {self.rank}: {'actor' if self.is_actor else 'worker'} {self.place} on {torch.cuda.get_device_name(self.device)}")

    def _placement(self, side: str, i: int) -> Placement:
        """Actors share the rows of ``big``, workers its columns; all hold the small ones."""
        n = self.pairs
        buffers, pieces = [], []
        for t in self.tensors:
            shape, start = list(t.shape), [0] * len(t.shape)
            if t.name == "big":
                dim = 0 if side == "actor" else 1
                shape[dim] //= n
                start[dim] = i * shape[dim]
            stop = [a + b for a, b in zip(start, shape, strict=True)]
            strides = (shape[1], 1) if len(shape) == 2 else (1,)
            buffers.append(BufferSpec(t.name, t.dtype, tuple(shape)))
            pieces.append(Piece(t.name, Box(tuple(start), tuple(stop)), t.name, 0, strides))
        return Placement(f"{side} {i}", tuple(buffers), tuple(pieces))

    def _meet(self, path: Path, timeout_s: float) -> int:
        if self.rank == 0:
            self.rendezvous = Rendezvous(HOST, timeout_s)
            path.with_suffix(".new").write_text(str(self.rendezvous.port))
            path.with_suffix(".new").rename(path)
        while not path.exists():
            time.sleep(0.01)
        return int(path.read_text())

    def leave_together(self, what: str = "done") -> None:
        """Memory of a sender may be read until its receivers are done."""
        (self.folder / f"{what}-{self.rank}").touch()
        while not all((self.folder / f"{what}-{rank}").exists() for rank in range(self.world_size)):
            time.sleep(0.01)

    def values(self, name: str, version: int) -> torch.Tensor:
        """What this rank's buffer is to hold: whole numbers that tell row, column and version, exact in bfloat16."""
        spec = {t.name: t for t in self.tensors}[name]
        index = [torch.arange(n, device=self.device) for n in spec.shape]
        if name != "big":
            return ((index[0] + version) % 251).bfloat16()
        for dim, side in ((0, True), (1, False)):
            if self.is_actor == side:
                index[dim] = index[dim].chunk(self.pairs)[self.place]
        return ((index[0][:, None] * 7 + index[1][None, :] * 3 + version) % 251).bfloat16()

    def fill(self, version: int) -> None:
        for name, buffer in self.memory.items():
            buffer.copy_(self.values(name, version))
        torch.cuda.synchronize()

    def check(self, version: int) -> None:
        for name, buffer in self.memory.items():
            wanted = self.values(name, version)
            wrong = (buffer != wanted).nonzero()
            assert len(wrong) == 0, f"{name} of version {version}: {len(wrong)} of {wanted.numel()} differ, first at {wrong[0].tolist()}"


def carry(folder: str, megabytes: int, num_steps: int, rounds: int) -> None:
    """Several syncs, each checked bit for bit; prints the speed of each."""
    here = Rank(folder, megabytes, num_steps, timeout_s=30, limit_s=90)
    free = torch.cuda.mem_get_info()[0]
    if here.is_actor:
        outbox = here.scene.outbox(here.place)
        outbox.join(0)
        for version in range(rounds):
            here.fill(version)
            begin_s = time.monotonic()
            here.scene.send(outbox, here.place)
            enqueued_s = time.monotonic() - begin_s
            torch.cuda.synchronize()
            say(f"round {version}: enqueued in {enqueued_s * 1e3:.2f} ms, sent in {(time.monotonic() - begin_s) * 1e3:.2f} ms")
        say(f"MEMORY actor: slots {outbox.nbytes >> 20} MiB, all of it {free - torch.cuda.mem_get_info()[0] >> 20} MiB")
        here.leave_together()
        return
    inbox = here.scene.inbox(here.place)
    inbox.open()
    say("the group is open")
    inbox.bind(0, here.scene.buffers(here.place, 0))
    for version in range(rounds):
        begin_s = time.monotonic()
        inbox.land(0, inbox.communicator.mark())
        took_s = time.monotonic() - begin_s
        here.check(version)
        say(f"LANDED round {version}: {here.nbytes / 1e9:.3f} GB in {took_s * 1e3:.2f} ms, {here.nbytes / took_s / 1e9:.1f} GB/s")
    say(f"MEMORY worker: slots {inbox.nbytes >> 20} MiB, all of it {free - torch.cuda.mem_get_info()[0] >> 20} MiB")
    here.leave_together()


def speeds(folder: str) -> None:
    """Where the time of a step goes: messages alone, copies alone, and both in turn with several numbers of slots."""
    here = Rank(folder, 4096, 16, timeout_s=30, limit_s=85)
    for number, num_slots in enumerate((2, 3, 4)):
        here.scene.num_slots = num_slots
        here.scene.programs.clear()
        if here.is_actor:
            outbox = here.scene.outbox(here.place)
            outbox.join(number)
            communicator = outbox._communicator
            assert isinstance(communicator, NcclCommunicator)
            if num_slots == 2:
                here.fill(0)
                messages_alone(here, communicator)
            for _ in range(4):
                begin_s = time.monotonic()
                here.scene.send(outbox, here.place)
                enqueued_s = time.monotonic() - begin_s
                torch.cuda.synchronize()
                say(f"slots {num_slots}: enqueued in {enqueued_s * 1e3:.2f} ms, sent in {(time.monotonic() - begin_s) * 1e3:.2f} ms")
            copies_alone(here, [here.scene.programs[here.place, step] for step in outbox.steps(0)])
            here.leave_together(f"slots{num_slots}")
            outbox.abandon()
        else:
            inbox = here.scene.inbox(here.place, number)
            inbox.open()
            assert isinstance(inbox.communicator, NcclCommunicator)
            if num_slots == 2:
                messages_alone(here, inbox.communicator)
            inbox.bind(0, here.scene.buffers(here.place, 0))
            for _ in range(4):
                begin_s = time.monotonic()
                inbox.land(0, inbox.communicator.mark())
                took_s = time.monotonic() - begin_s
                say(f"SPEED slots {num_slots}: {took_s * 1e3:.2f} ms, {here.nbytes / took_s / 1e9:.1f} GB/s")
            here.check(0)
            # It leaves other values: slots hold the last steps.
            copies_alone(here, inbox._landing[0][1])
            here.leave_together(f"slots{num_slots}")
            inbox.abandon()
            assert inbox.communicator.rest(10)


def messages_alone(here: Rank, communicator: NcclCommunicator) -> None:
    """From an actor rank to the worker of its number, of several sizes, one behind the other."""
    other = here.rank + here.pairs if here.is_actor else here.rank - here.pairs
    for megabytes in (16, 64, 256, 1024):
        memory = torch.zeros(megabytes << 20, dtype=torch.uint8, device=here.device)
        torch.cuda.synchronize()
        count = 4096 // megabytes
        for _ in range(3):
            begin_s, works = time.monotonic(), []
            for step in range(count):
                pair = [(memory, other)]
                works.append(communicator.carry(step, pair if here.is_actor else [], [] if here.is_actor else pair, []))
                if step >= 8:
                    communicator.wait(works[step - 8])
            enqueued_s = time.monotonic() - begin_s
            communicator.wait(works[-1])
            took_s = time.monotonic() - begin_s
        speed = count * memory.nbytes / took_s / 1e9
        say(f"SPEED messages of {megabytes} MiB alone: {speed:.1f} GB/s, {enqueued_s / count * 1e6:.0f} us each to enqueue")


def copies_alone(here: Rank, programs: Sequence[Program]) -> None:
    """Packing or unpacking of all steps, without a message."""
    for _ in range(3):
        torch.cuda.synchronize()
        begin_s = time.monotonic()
        nbytes = sum(program.run() for program in programs)
        enqueued_s = time.monotonic() - begin_s
        torch.cuda.synchronize()
        took_s = time.monotonic() - begin_s
    say(f"SPEED copies alone: {nbytes / took_s / 1e9:.1f} GB/s written, {enqueued_s / len(programs) * 1e6:.0f} us each to enqueue")


def give_up(folder: str) -> None:
    """A worker waits for what is never sent, is let go by another thread, and the next group is right."""
    here = Rank(folder, 256, 8, timeout_s=30, limit_s=60)
    if here.is_actor:
        here.fill(1)
        outbox = here.scene.outbox(here.place)
        outbox.join(0)
        here.scene.send(outbox, here.place, steps=2)
        time.sleep(1.5)
        outbox.abandon()
        outbox.join(1)
        here.scene.send(outbox, here.place)
        torch.cuda.synchronize()
        say("sent in the second group")
        here.leave_together()
        return
    inbox = here.scene.inbox(here.place)
    inbox.open()
    inbox.bind(0, here.scene.buffers(here.place, 0))
    threading.Timer(1.0, inbox.abandon).start()
    begin_s = time.monotonic()
    with pytest.raises(GroupError, match="given up") as raised:
        inbox.land(0, inbox.communicator.mark())
    say(f"LET GO after {time.monotonic() - begin_s:.3f} s: {raised.value}")
    assert time.monotonic() - begin_s < 3
    assert inbox.communicator.rest(10), "the communicator is not given up"
    say(f"GONE after {time.monotonic() - begin_s:.3f} s")
    assert float(torch.ones(1000, device=here.device).sum()) == 1000
    again = here.scene.inbox(here.place, number=1)
    again.open()
    again.bind(0, here.scene.buffers(here.place, 0))
    again.land(0, again.communicator.mark())
    here.check(1)
    say(f"RIGHT in the second group after {time.monotonic() - begin_s:.3f} s")
    here.leave_together()


def die(folder: str) -> None:
    """The actor ends in the middle. The worker notices within its limit of 4 s, and its device still works."""
    here = Rank(folder, 256, 8, timeout_s=30, limit_s=60)
    if here.is_actor:
        outbox = here.scene.outbox(here.place)
        outbox.join(0)
        here.scene.send(outbox, here.place, steps=2)
        time.sleep(0.5)
        say("gone")
        os._exit(0)
    inbox = here.scene.inbox(here.place)
    inbox.open()
    inbox.communicator._limit_s = 4.0  # type: ignore[attr-defined]
    inbox.bind(0, here.scene.buffers(here.place, 0))
    begin_s = time.monotonic()
    with pytest.raises(GroupError, match="actor rank 0") as raised:
        inbox.land(0, inbox.communicator.mark())
    say(f"NOTICED after {time.monotonic() - begin_s:.3f} s: {raised.value}")
    assert time.monotonic() - begin_s < 6
    inbox.abandon()
    assert inbox.communicator.rest(10), "the communicator is not given up"
    assert float(torch.ones(1000, device=here.device).sum()) == 1000
    say(f"GONE after {time.monotonic() - begin_s:.3f} s, and the GPU still works")
