"""The processes that share one conversion: how they find each other, divide the files, and wait for each other.

They meet at torchrun's store, of which they need no more than small values: no process group, no collective. A file is written by one
of them, because two hosts may not write to one page of a file on a network file system.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import HashStore, Store, rendezvous

from rlsync.errors import CheckpointError, ConfigError, RlsyncError
from rlsync.transport.rendezvous import sentence

# A process that has not said for so long that it lives is taken for lost. It says so from a thread, which a write to a slow disk may hold.
SILENCE_S = 300.0
_SAYS_S = 1.0
_POLL_S = 0.1
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """This process among those of a conversion.

    Attributes:
        rank, size: which of how many.
    """

    def __init__(self, store: Store, rank: int, size: int, *, silence_s: float = SILENCE_S) -> None:
        self.rank, self.size, self._store, self._silence_s = rank, size, store, silence_s
        self._ended = threading.Event()

    @classmethod
    def alone(cls) -> Ranks:
        return cls(HashStore(), 0, 1)

    @classmethod
    def from_environment(cls, *, silence_s: float = SILENCE_S) -> Ranks:
        """As torchrun says it, or whatever else sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; alone where nothing does.

        Raises ConfigError where some are missing or none of a group, or the others are not found.
        """
        there = [name for name in _ENVIRONMENT if name in os.environ]
        if "WORLD_SIZE" not in there or os.environ["WORLD_SIZE"] == "1":
            return cls.alone()
        if len(there) < len(_ENVIRONMENT):
            absent = ", ".join(sorted(set(_ENVIRONMENT) - set(there)))
            raise ConfigError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, and {absent} not there; start with torchrun")
        said = os.environ["RANK"], os.environ["WORLD_SIZE"]
        if not all(word.isascii() and word.isdigit() for word in said) or int(said[0]) >= int(said[1]):
            raise ConfigError(f"RANK is {said[0]} and WORLD_SIZE {said[1]} in the environment, and ranks count from 0; start with torchrun")
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=SILENCE_S)))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"the other processes of this conversion were not found: {sentence(str(error))}") from None
        return cls(store, rank, size, silence_s=silence_s)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that makes and publishes files."""
        return self.rank == 0

    def share(self, nbytes: Sequence[int]) -> list[int]:
        """Numbers of the files that this process fills: the largest ones first, each to who has least."""
        filled = [0] * self.size
        mine = []
        for number in sorted(range(len(nbytes)), key=lambda n: (-nbytes[n], n)):
            rank = min(range(self.size), key=filled.__getitem__)
            filled[rank] += nbytes[number] + 1
            if rank == self.rank:
                mine.append(number)
        return sorted(mine)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it this process says that it lives; an error that leaves it is raised on all that wait, by name."""
        speaker = threading.Thread(target=self._say_alive, daemon=True)
        speaker.start()
        try:
            yield
        except _Elsewhere:
            raise
        except BaseException as error:
            said = str(error) if isinstance(error, RlsyncError) else f"{type(error).__name__}: {error}"
            self._set("failed", f"process {self.rank} of {self.size}: {said}")
            raise
        finally:
            self._ended.set()
            speaker.join()

    def wait(self, stage: str, report: Callable[[], None] = lambda: None) -> None:
        """Until all have come to a stage; ``report`` is called meanwhile. Raises CheckpointError for one that failed or is silent."""
        self._set(f"{stage} {self.rank}")
        self._wait_for(stage, [rank for rank in range(self.size) if rank != self.rank], report)

    def leave(self) -> None:
        """Until the first one is here, which waits for all others and goes last: the store may be its own."""
        if self.is_first:
            self._set("published 0")
            self._wait_for("left", range(1, self.size))
        else:
            self._wait_for("published", [0])
            self._set(f"left {self.rank}")

    def _wait_for(self, stage: str, ranks: Iterable[int], report: Callable[[], None] = lambda: None) -> None:
        lives: dict[int, tuple[bytes, float]] = {}
        absent = list(ranks)
        while absent := [rank for rank in absent if not self._is_there(f"{stage} {rank}")]:
            self.check()
            now = time.monotonic()
            for rank in absent:
                said = self._store.get(f"lives {rank}") if self._is_there(f"lives {rank}") else b""
                if lives.get(rank, (None,))[0] != said:
                    lives[rank] = said, now
                elif now - lives[rank][1] > self._silence_s:
                    raise _Elsewhere(f"process {rank} of {self.size} said nothing for {self._silence_s:g} s, before {stage}; start again")
            report()
            time.sleep(_POLL_S)

    def same(self, what: str, value: str) -> None:
        """Raise CheckpointError unless all say the same value; waits for all."""
        self._set(f"{what} of {self.rank}", value)
        self.wait(f"all say their {what}")
        for rank in range(self.size):
            if self._store.get(f"{what} of {rank}").decode() != value:
                raise CheckpointError(f"process {rank} has another {what} than process {self.rank}: give all the same arguments and files")

    def check(self) -> None:
        """Raise CheckpointError where another process failed."""
        if self._is_there("failed"):
            raise _Elsewhere(self._store.get("failed").decode())

    def _is_there(self, key: str) -> bool:
        with _told_of_store():
            return bool(self._store.check([key]))

    def _set(self, key: str, value: str = "") -> None:
        with _told_of_store():
            self._store.set(key, value)

    def _say_alive(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                self._store.set(f"lives {self.rank}", str(number))
            except RuntimeError:
                return
            self._ended.wait(_SAYS_S)


@contextmanager
def _told_of_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _Elsewhere(f"the store of this conversion is gone ({sentence(str(error))}); start again") from None


class _Elsewhere(CheckpointError):
    """What failed on another process, or between them."""
