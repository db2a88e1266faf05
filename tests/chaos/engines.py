"""The engines of a campaign: those that stand, those that are being started in place of lost ones, and what they have to answer."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rlsync.engine.compat import engine as compat
from rlsync.engine.handles.local import Engine
from tests.chaos.answers import Reference, ask, same
from tests.chaos.leaks import Leaks, alive, listening, mapped, tree
from tests.integration.engine_source import NUM_BLOCKS

START_S = 600.0
_ANSWER_S = 60.0


@dataclass
class Standing:
    """A started engine and what belongs to it: its core, its workers, its ports and its segments of shared memory."""

    engine: Engine
    tp_size: int
    core: psutil.Process
    workers: list[psutil.Process]
    ports: dict[int, set[int]]
    segments: set[str]
    stopped: list[psutil.Process] = field(default_factory=list)

    @property
    def processes(self) -> list[psutil.Process]:
        return [self.core, *self.workers]

    def kill(self, process: psutil.Process) -> None:
        """kill -9; returns when the process is gone."""
        os.kill(process.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 5
        while alive(process) and time.monotonic() < deadline_s:
            time.sleep(0.002)

    def stop(self, process: psutil.Process) -> None:
        """SIGSTOP, until ``go_on``."""
        os.kill(process.pid, signal.SIGSTOP)
        self.stopped.append(process)

    def go_on(self) -> None:
        for process in self.stopped:
            if alive(process):
                os.kill(process.pid, signal.SIGCONT)
        self.stopped.clear()


def started(engine_id: str, folder: Path, tp_size: int, **changes: Any) -> Standing:
    """Start an engine on CPU and take down what belongs to it."""
    args: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 128}
    args |= {"enforce_eager": True, "max_num_seqs": 8, "num_gpu_blocks_override": NUM_BLOCKS, "tensor_parallel_size": tp_size}
    args["disable_log_stats"] = True  # two start side by side
    engine = Engine(engine_id, args | changes)
    engine.start()
    (process,) = compat.core_processes(engine._llm)
    core, *rest = tree(process.pid)
    workers = [p for p in rest if "Worker" in "".join(p.cmdline())]
    assert len(workers) == tp_size, [p.cmdline() for p in rest]
    processes = [core, *workers]
    return Standing(engine, tp_size, core, workers, {p.pid: listening(p) for p in processes}, mapped(processes))


class Engines:
    """All engines of a campaign by id.

    Attributes:
        standing: those that take part. starting: those that come instead of lost ones.
        references: checkpoint -> what a fresh engine of it answers.
        letters: (engine id, version) -> checkpoint of that version; version None is what an engine was started with.
        starts: engines started so far.
    """

    def __init__(self, folders: dict[str, Path], tp_sizes: dict[str, int], leaks: Leaks) -> None:
        self._folders, self._tp_sizes, self._leaks = folders, dict(tp_sizes), leaks
        self._pool = ThreadPoolExecutor(2)
        self._closing: list[Future[list[str]]] = []
        self.letters: dict[tuple[str, int | None], str] = {}
        self.starting: dict[str, Future[Standing]] = {}
        self.standing: dict[str, Standing] = {}
        self.starts = len(tp_sizes)
        first = {
            engine_id: self._pool.submit(started, engine_id, folders[letter], tp_size)
            for (engine_id, tp_size), letter in zip(tp_sizes.items(), "ab", strict=True)
        }
        for (engine_id, future), letter in zip(first.items(), "ab", strict=True):
            self.standing[engine_id] = future.result(START_S)
            self.letters[engine_id, None] = letter
        self.references: dict[str, Reference] = {
            letter: ask(s.engine, _ANSWER_S) for letter, s in zip("ab", self.standing.values(), strict=True)
        }
        assert not same(self.references["a"], self.references["b"]), "the two checkpoints answer alike"

    @property
    def handles(self) -> list[Engine]:
        return [s.engine for s in self.standing.values()]

    def lose(self, engine_id: str) -> None:
        """Close an engine, dead or alive; it is not waited for."""
        lost = self.standing.pop(engine_id)
        self._tp_sizes[engine_id] = lost.tp_size
        self._closing.append(self._pool.submit(self._close, lost))

    def start_later(self, engine_id: str) -> None:
        """Start an engine without weights, of the size of the former one of that id; it is not waited for."""
        self.letters = {key: letter for key, letter in self.letters.items() if key[0] != engine_id}
        self.starts += 1
        tp_size = self._tp_sizes.get(engine_id, 1)
        self.starting[engine_id] = self._pool.submit(started, engine_id, self._folders["a"], tp_size, load_format="dummy")

    def _close(self, lost: Standing) -> list[str]:
        segments = mapped(p for p in lost.processes if alive(p)) | lost.segments
        lost.engine.close()
        return [f"engine {lost.engine.engine_id}: {f}" for f in self._leaks.of_engine(lost.processes, segments)]

    def arrivals(self, *, wait: bool) -> list[str]:
        """Ids of engines that have started since the last call and stand now. ``wait`` for all that are being started."""
        come = []
        for engine_id, future in list(self.starting.items()):
            if wait or future.done():
                self.standing[engine_id] = future.result(START_S)
                del self.starting[engine_id]
                come.append(engine_id)
        return come

    def closed(self, *, wait: bool) -> list[str]:
        """What engines that were closed have left behind."""
        done = [f for f in self._closing if wait or f.done()]
        self._closing = [f for f in self._closing if f not in done]
        return [finding for future in done for finding in future.result(START_S)]

    def owned(self) -> set[int]:
        """Pids of standing engines."""
        return {p.pid for s in self.standing.values() for p in tree(s.core.pid)}

    def ports(self) -> dict[int, set[int]]:
        """pid -> ports on which processes of standing engines listened when they had been started."""
        return {pid: ports for s in self.standing.values() for pid, ports in s.ports.items()}

    def wrong_answers(self, engine_ids: list[str], letter: str, version: int) -> list[str]:
        """Engines that do not answer as a fresh engine of a checkpoint does, or not under that version."""
        findings = []
        for engine_id in engine_ids:
            try:
                found = ask(self.standing[engine_id].engine, _ANSWER_S)
            except Exception as error:
                findings.append(f"engine {engine_id} does not serve version {version}: {type(error).__name__}: {error}")
                continue
            if not same(found, self.references[letter]):
                findings.append(f"engine {engine_id} does not answer as checkpoint {letter} at version {version}: {found}")
            labels = {(c.version, c.last_version) for c in found}
            if labels != {(version, version)}:
                findings.append(f"engine {engine_id} says that versions {labels} answered, not {version}")
        return findings

    def close(self) -> list[str]:
        """End all engines; what is left behind."""
        for engine_id in list(self.standing):
            self.standing[engine_id].go_on()
            self.lose(engine_id)
        for future in self.starting.values():
            self._closing.append(self._pool.submit(lambda f: self._close(f.result(START_S)), future))
        self.starting.clear()
        findings = self.closed(wait=True)
        self._pool.shutdown()
        return findings
