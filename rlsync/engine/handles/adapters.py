"""On which adapters the requests of one engine run: those of the version that was served when they began, to their end. And how an engine
is started that can. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rlsync.errors import ConfigError, RlsyncError

# Values of vLLM's ``max_lora_rank``.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Stands in the place of a folder's path for adapters that a sync has brought; their number follows.
SYNCED_PATH = "rlsync:"


def least_max_lora_rank(r: int) -> int | None:
    """The least ``max_lora_rank`` for adapters of rank ``r``; None where there is none."""
    return next((rank for rank in MAX_LORA_RANKS if rank >= r), None)


def lora_arguments(r: int) -> dict[str, Any]:
    """Fields of ``vllm.AsyncEngineArgs`` of an engine to which adapters of rank ``r`` are synced.

    One slot is served while the next version goes into the other. Raises ConfigError for a rank beyond those of vLLM.
    """
    rank = least_max_lora_rank(r)
    if rank is None:
        raise ConfigError(
            f"engines hold adapters up to rank {MAX_LORA_RANKS[-1]}, these have {r}; lower actor.lora.r or set weight_sync.lora to merged"
        )
    return {"enable_lora": True, "max_loras": 2, "max_lora_rank": rank}


@dataclass(frozen=True, slots=True)
class Served:
    """What new requests run on: the adapters that vLLM knows as number ``adapter_id``, which is 0 for none, and the version they are of."""

    adapter_id: int = 0
    version: int | None = None


class AdapterRequests:
    """Requests in flight, by the adapters that they run on. Lives on the event loop of the engine's calls.

    Args:
        num_slots: how many versions an engine holds at a time.
        after: the greatest number that may have been used before, by another handle of the engine.
    """

    def __init__(self, num_slots: int, *, after: int = 0) -> None:
        self._num_slots = num_slots
        self._served, self._next = Served(), after
        self._is_pending = False
        self._running: Counter[int] = Counter()
        self._ended = asyncio.Condition()
        # Cleared from the pause of a sync to its end: a request that began between would hold the slot of a former version.
        self._open = asyncio.Event()
        self._open.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Served]:
        """Around one request: what it runs on. Waits while a sync is going on."""
        while not self._open.is_set():
            # Another sync may have begun before this task had its turn.
            await self._open.wait()
        served = self._served
        self._running[served.adapter_id] += 1
        try:
            yield served
        finally:
            self._running[served.adapter_id] -= 1
            async with self._ended:
                self._ended.notify_all()

    def hold(self) -> None:
        """Let new requests wait, until ``serve``."""
        self._open.clear()

    async def make_room(self, timeout_s: float) -> None:
        """Return when a slot is free for the next version. Raises RlsyncError where requests of former versions keep them all."""

        def is_free() -> bool:
            return len(self.in_use()) < self._num_slots

        try:
            async with self._ended:
                await asyncio.wait_for(self._ended.wait_for(is_free), timeout_s)
        except TimeoutError:
            raise RlsyncError(
                f"requests of {len(self.in_use())} versions still run after {timeout_s:g} s, and the engine holds {self._num_slots} at a "
                "time; start it with more max_loras, or sync with pause_mode abort"
            ) from None

    def serves(self, served: Served) -> bool:
        """Whether new requests run on this, and no sync is going on."""
        return self._open.is_set() and self._served == served

    def in_use(self) -> list[int]:
        """Adapters of requests in flight."""
        return sorted(adapter for adapter, count in self._running.items() if adapter and count > 0)

    def next_id(self) -> int:
        """A number for adapters that was never used: prefix caches and requests in flight then cannot take them for others."""
        self._next, self._is_pending = self._next + 1, True
        return self._next

    def serve(self, version: int | None) -> None:
        """Let requests begin, on the adapters of the last ``next_id``, which are of this version; without one on those of before."""
        if self._is_pending:
            self._served, self._is_pending = Served(self._next, version), False
        self._open.set()
