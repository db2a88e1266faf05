"""What is left behind: processes, files in /dev/shm and listening ports of this process and its descendants. Ends nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
_SHM_PREFIXES = ("rlsync-ring-", ".rlsync-ring-", "vllm_dist_", "psm_")
_PR_SET_CHILD_SUBREAPER = 36
_SETTLE_S = 15.0
# Of multiprocessing: they end with this process.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that they stay in sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def alive(process: psutil.Process) -> bool:
    """Whether a process still is one: neither gone nor a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants, as far as they live."""
    try:
        top = psutil.Process(pid)
        return [p for p in (top, *top.children(recursive=True)) if alive(p)]
    except psutil.NoSuchProcess:
        return []


def mapped(processes: Iterable[psutil.Process]) -> set[str]:
    """Names of the files of /dev/shm that processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = line.partition("/dev/shm/")[2]
                if path:
                    found.add(path.removesuffix(" (deleted)"))
    return found


def shm_files() -> set[str]:
    """Names of all files in /dev/shm that are of a kind that rlsync and vLLM make."""
    return {name for name in os.listdir(SHM) if name.startswith(_SHM_PREFIXES)}


def listening(process: psutil.Process) -> set[int]:
    """Ports on which a process listens."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {c.laddr.port for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}
    return set()


@dataclass(frozen=True, slots=True)
class Ports:
    """On which a process may listen: those that are known, and so many others."""

    known: set[int]
    others: int


class Leaks:
    """Looks for what nobody owns any more. Files that were there when it was made are not looked at."""

    def __init__(self) -> None:
        self._before = shm_files()

    def of_engine(self, processes: list[psutil.Process], segments: set[str]) -> list[str]:
        """What a closed engine left: of its processes, and of the segments that only they had mapped."""
        return self._settled(
            lambda: (
                [f"process {p.pid} of a closed engine lives" for p in processes if alive(p)]
                + [f"/dev/shm/{name} of a closed engine is there" for name in sorted(segments & shm_files())]
            )
        )

    def everywhere(self, owned: Callable[[], set[int]], ports: Callable[[], dict[int, Ports]]) -> list[str]:
        """What nobody owns.

        Args:
            owned: pids of all processes that may live.
            ports: by pid; processes that it does not name may not listen at all.
        """
        return self._settled(lambda: [*_strays(owned()), *self._unmapped(), *_open_ports(ports())])

    def _unmapped(self) -> list[str]:
        here = psutil.Process()
        living = mapped([here, *here.children(recursive=True)])
        return [f"/dev/shm/{name} is mapped by nobody" for name in sorted(shm_files() - self._before - living)]

    def _settled(self, look: Callable[[], list[str]]) -> list[str]:
        """Findings that stay: the end of a process takes the system a moment."""
        deadline_s = time.monotonic() + _SETTLE_S
        while (findings := look()) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        return findings


def _strays(owned: set[int]) -> list[str]:
    return [
        f"process {p.pid} ({' '.join(_command(p))}) belongs to nobody"
        for p in psutil.Process().children(recursive=True)
        if p.pid not in owned and alive(p) and not any(name in " ".join(_command(p)) for name in _HELPERS)
    ]


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def _open_ports(allowed: dict[int, Ports]) -> list[str]:
    here, findings = psutil.Process(), []
    for process in (here, *here.children(recursive=True)):
        limit = allowed.get(process.pid, Ports(set(), 0))
        unknown = sorted(listening(process) - limit.known)
        if len(unknown) > limit.others:
            findings.append(f"process {process.pid} listens on {unknown}, of which {limit.others} may be its own")
    return findings
