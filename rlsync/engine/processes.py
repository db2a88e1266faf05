"""An engine's processes and the shared memory that they leave when they do not end by themselves.

Owns their being seen and their being ended, from outside. Knows no request, no sync, and no call into an engine.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from typing import Any

import psutil

from rlsync.engine import compat


class Processes:
    """The processes of one engine as they were seen.

    Attributes:
        seen: none before ``look`` and after ``end``.
    """

    def __init__(self, engine_id: str) -> None:
        self._engine_id = engine_id
        self.seen: list[psutil.Process] = []
        self._segments: set[str] = set()

    def look(self, llm: Any) -> None:
        """Remember what runs for ``llm``, an AsyncLLM: when its core is dead, nothing leads to its workers and to what they share."""
        self.seen = list(dict.fromkeys((*self.seen, *_descendants(llm))))
        self._segments |= shared_segments(self.seen)

    def ailment(self) -> str | None:
        """Which of them has ended or is stopped. None while all run; never waits."""
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    if process.status() == psutil.STATUS_STOPPED:
                        return f"process {process.pid} of engine {self._engine_id} is stopped"
                    continue
            return f"process {process.pid} of engine {self._engine_id} has ended"
        return None if self.seen else f"engine {self._engine_id} is not started"

    def end(self, timeout_s: float) -> None:
        """vLLM asks its processes to end; those that cannot answer, being stopped, are killed, and what they left is removed."""
        for process in self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self.seen, timeout=timeout_s)
        for segment in self._segments:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(segment)
        self.seen, self._segments = [], set()


def _descendants(llm: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for core in compat.core_processes(llm):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(core.pid)
            found += [process, *process.children(recursive=True)]
    return found


def shared_segments(processes: Iterable[psutil.Process]) -> set[str]:
    """Paths of shared memory that vLLM's processes make for collectives and messages, and remove only when they end by themselves."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {m.path for m in process.memory_maps() if m.path.startswith(compat.SHM_PREFIXES)}
    return found
