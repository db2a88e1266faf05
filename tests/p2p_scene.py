"""Actor ranks and workers with memory of their own, and the two ends of a group that carry the weights of one to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from rlsync.copy.cpu import region
from rlsync.plan.packing import PackedPart
from rlsync.transport.p2p import Communicator, GroupSender, Inbox, Program, SenderEnd, SentMessage, bind_program
from rlsync.transport.rendezvous import GroupInfo

HOST = "127.0.0.1"
Buffers = dict[str, torch.Tensor]
MakeCommunicator = Callable[[GroupInfo, int], Communicator]


@dataclass
class Scene:
    """``parts`` are by bucket and worker. ``sources`` and ``wanted``: memory of each actor rank and each worker, on ``device``."""

    parts: tuple[tuple[PackedPart, ...], ...]
    sources: Sequence[Buffers]
    wanted: Sequence[Buffers]
    port: int
    make_communicator: MakeCommunicator
    device: torch.device
    transport: str = "gloo"
    num_slots: int = 2
    num_steps: int = 1
    # A send goes with its outbox.
    outboxes: list[GroupSender] = field(default_factory=list)
    programs: dict[tuple[int, int], Program] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        return (*(f"actor rank {i}" for i in range(len(self.sources))), *(f"worker {i}" for i in range(len(self.wanted))))

    def info(self, rank: int) -> GroupInfo:
        return GroupInfo(HOST, self.port, rank, self.members, self.transport, self.num_steps)

    def outbox(self, rank: int) -> GroupSender:
        info = self.info(rank)
        end = SenderEnd(info, self.num_slots, self._messages(rank))
        self.outboxes.append(GroupSender(end, lambda number: self.make_communicator(info, number), self.device))
        return self.outboxes[-1]

    def _messages(self, rank: int) -> tuple[tuple[SentMessage, ...], ...]:
        rows = []
        for row in self.parts:
            given = [(worker, tuple(r for r in part.regions if r.source == rank)) for worker, part in enumerate(row)]
            wholes = [row[worker].nbytes if len(mine) == len(row[worker].regions) else 0 for worker, mine in given]
            rows.append(
                tuple(
                    SentMessage(worker, len(self.sources) + worker, whole, mine)
                    for (worker, mine), whole in zip(given, wholes, strict=True)
                    if mine
                )
            )
        return tuple(rows)

    def inbox(self, worker: int, number: int = 0) -> Inbox:
        info = self.info(len(self.sources) + worker)
        own = tuple(row[worker] for row in self.parts)
        return Inbox(own, self.num_slots, self.num_steps, self.make_communicator(info, number), self.device)

    def send(self, outbox: GroupSender, rank: int, steps: int | None = None) -> None:
        """All buckets, or the first ``steps`` steps of them."""
        for bucket in range(len(self.parts)):
            for step in outbox.steps(bucket)[:steps]:
                program = self._program(outbox, rank, step)
                with outbox.sending(step):
                    program.run()

    def _program(self, outbox: GroupSender, rank: int, step: int) -> Program:
        if (rank, step) not in self.programs:
            pairs = [
                (view, region(self.sources[rank][r.source_buffer], r.source_offset, r.shape, r.source_strides))
                for r, view in outbox.views(step)
            ]
            self.programs[rank, step] = bind_program(pairs, self.device)
        return self.programs[rank, step]

    def buffers(self, worker: int, bucket: int) -> Buffers:
        """That a bucket of a worker lands in."""
        return {r.buffer: self.wanted[worker][r.buffer] for r in self.parts[bucket][worker].regions}
