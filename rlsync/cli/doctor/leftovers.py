"""Findings about what killed processes left in shared memory. Removes nothing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rlsync.cli.doctor.finding import Finding, amount, ok
from rlsync.errors import first_few

# Rings of rlsync, also half-made ones; their creator locks them for as long as they have a name (``rlsync.transport.shm``).
RING_PATTERNS = ("rlsync-ring-*", ".rlsync-ring-*")
# What Python's multiprocessing.shared_memory calls its segments, through which vLLM's processes send each other requests.
_PYTHON_PATTERN = "psm_*"
_SHOWN = 5


def examine(directory: Path, engine_prefixes: Sequence[str]) -> Iterator[Finding]:
    """``engine_prefixes``: with which paths of vLLM's shared memory begin; none where vLLM did not say."""
    if not directory.is_dir():
        return
    rings = [path for pattern in RING_PATTERNS for path in directory.glob(pattern) if _is_unlocked(path)]
    if rings:
        yield _finding(
            "rings of rlsync whose creator was killed", rings, "rm them; the next connection of this user removes most by itself"
        )
    patterns = [_PYTHON_PATTERN]
    patterns += [f"{Path(prefix).name}*" for prefix in engine_prefixes if Path(prefix).parent == directory]
    candidates = [path for pattern in patterns for path in directory.glob(pattern) if _is_ours(path)]
    orphans = sorted(set(candidates) - set(_in_use(candidates)))
    if orphans:
        remedy = "rm them, unless a program in another container with the same /dev/shm uses them"
        yield _finding("segments of shared memory that no process here uses, as killed engines leave them", orphans, remedy)
    if not rings and not orphans:
        yield ok(f"nothing is left behind in {directory}")


def _finding(what: str, paths: list[Path], remedy: str) -> Finding:
    nbytes = sum(path.stat().st_size for path in paths if path.exists())
    return Finding("warning", f"{len(paths)} {what}: {first_few([str(path) for path in paths], _SHOWN)}, {amount(nbytes)}", remedy)


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _is_unlocked(path: Path) -> bool:
    """Whether nobody holds the lock that a living creator does."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _in_use(paths: Iterable[Path]) -> Iterator[Path]:
    """Those that some process has mapped or open. Processes that this user may not look into are passed over."""
    names = {str(path) for path in paths}
    if not names:
        return
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text()
            descriptors = list((process / "fd").iterdir())
        except OSError:
            continue
        opened = set(map(_target, descriptors))
        yield from (Path(name) for name in names if name in opened or name in maps)


def _target(descriptor: Path) -> str | None:
    """What a descriptor refers to, or None where it has been closed meanwhile, as that of the listing itself."""
    try:
        return os.readlink(descriptor)
    except OSError:
        return None
