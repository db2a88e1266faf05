"""What rank 0 tells those who are to dial in, and what is made of it: an actor rank's first message, an engine's call to connect.

Opens nothing and sends nothing.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import msgspec

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import pid_domain
from rlsync.sync.lending import memory_of
from rlsync.sync.source import Source, source_digest
from rlsync.transport.shm import shm_domain


class Invitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to dial and for which run, or why there is nothing to dial."""

    endpoint: str = ""
    token: str = ""
    run_id: str = ""
    error: m.Error | None = None

    def hello(self, source: Source, actor_rank: int, world_size: int, gpu_uuid: str | None) -> m.ActorHello:
        """The first message of this process, as an actor rank."""
        return m.ActorHello(
            token=self.token,
            run_id=self.run_id,
            actor_rank=actor_rank,
            world_size=world_size,
            host=socket.gethostname(),
            shm_domain=shm_domain(),
            pid_domain=pid_domain(),
            pid=os.getpid(),
            gpu_uuid=gpu_uuid,
            digest=source_digest(source.tensors, source.placements[actor_rank]),
            memory=memory_of(source.buffers, stays=source.stays),
        )

    def for_engine(self, engine_id: str, timeout_s: float) -> dict[str, Any]:
        """Fields of the ``InitInfo`` of an engine's workers, ``purpose`` aside."""
        return {
            "endpoint": self.endpoint,
            "token": self.token,
            "run_id": self.run_id,
            "engine_id": engine_id,
            "timeout_s": timeout_s,
        }
