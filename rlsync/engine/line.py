"""A worker's line to the coordinator: what it says of itself, and waits that end by a deadline of the worker's own.

Owns the worker's end of the channel. Knows no model, no sink and no plan: what a message means is its caller's.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import Peer, pid_domain
from rlsync.engine import compat
from rlsync.engine.infos import InitInfo
from rlsync.errors import RlsyncError, WeightSyncError
from rlsync.transport.ends import Receiver
from rlsync.transport.shm import shm_domain

# The coordinator's deadline names the culprit; the worker's own is for the case that the coordinator is gone.
GRACE_S = 2.0
# A link that breaks is often the echo of a fault that the coordinator names better; it is heard for so long first.
_ECHO_S = 1.0

T = TypeVar("T")


class Line:
    """One connection of a worker. Dials when it is made; not thread-safe.

    Args:
        info: where to dial, for which run and engine, and the deadline of a phase.
        parallel_config: vLLM's, which knows this worker's place in its engine.
    """

    def __init__(self, info: InitInfo, parallel_config: Any, device: torch.device) -> None:
        self.timeout_s = info.timeout_s
        self._endpoint = info.endpoint
        self._peer = Peer(info.endpoint, _hello(info, parallel_config, device))

    def send(self, message: m.FromPeer) -> None:
        """Queue a message; never blocks."""
        self._peer.send(message)

    def tell_failure(self, error: BaseException, attempt: int, phase: str, bucket: int | None = None) -> None:
        """Say what went wrong here: the sentence of an error of ours, the whole traceback of any other."""
        cause = str(error) if isinstance(error, RlsyncError) else "".join(traceback.format_exception(error)).strip()
        self._peer.send(m.Failed(attempt, phase, m.shortened(cause), bucket=bucket))

    def next(self, kind: type[Any], attempt: int, what: str) -> Any:
        """The next message of ``kind``; ``Ready`` says a level and may come again after the last bucket was taken.

        Raises WeightSyncError when the coordinator says so, RuntimeError where nothing comes in time or what nobody asked for.
        """
        found: list[Any] = []

        def hear(message: m.FromCoordinator) -> None:
            if isinstance(message, kind):
                found.append(message)
            elif not isinstance(message, m.Ready):
                raise RuntimeError(f"{type(message).__name__} came while waiting for {what}")

        return self.until(lambda: found.pop() if found else None, attempt, what, hear)

    def until(
        self, poll: Callable[[], T | None], attempt: int, what: str, hear: Callable[[Any], None], receiver: Receiver | None = None
    ) -> T:
        """What ``poll`` gives; it is asked again after each message, which ``hear`` gets, and whenever ``receiver`` has news.

        Raises as ``next`` does.
        """
        limit_s = self.timeout_s + GRACE_S
        deadline_s = time.monotonic() + limit_s
        while (result := poll()) is None:
            try:
                message = self._peer.receive(attempt, deadline_s, None if receiver is None else receiver.fd)
            except TimeoutError:
                raise RuntimeError(f"nothing from {self._endpoint} within {limit_s:g} s while waiting for {what}") from None
            if message is not None:
                hear(message)
        return result

    def told_meanwhile(self, attempt: int) -> WeightSyncError | None:
        """The error that the coordinator made everybody's, if it comes soon."""
        deadline_s = time.monotonic() + _ECHO_S
        try:
            while True:
                self._peer.receive(attempt, deadline_s)
        except TimeoutError:
            return None
        except WeightSyncError as told:
            return told

    def close(self) -> None:
        """Hang up; what was sent still leaves. Idempotent."""
        self._peer.close()


def _hello(info: InitInfo, parallel_config: Any, device: torch.device) -> m.WorkerHello:
    dp_index, worker_rank, world_size = compat.worker_place(parallel_config)
    return m.WorkerHello(
        token=info.token,
        run_id=info.run_id,
        engine_id=info.engine_id,
        dp_index=dp_index,
        worker_rank=worker_rank,
        world_size=world_size,
        host=socket.gethostname(),
        shm_domain=shm_domain(),
        pid_domain=pid_domain(),
        pid=os.getpid(),
        gpu_uuid=compat.gpu_uuid(device),
        vllm_version=compat.vllm_version(),
    )
