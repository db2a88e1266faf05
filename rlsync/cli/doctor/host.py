"""Findings about the host: shared memory, memory and its limits, what a process may open, and what the kernel offers."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from rlsync.cli.doctor.finding import Finding, amount, ok

# A ring of two default buckets (256 MiB each) and what Ray, vLLM and torch keep there besides.
MIN_SHM_BYTES = 2 * 2**30
# What the tiny default takes.
MIN_MEMORY_BYTES = 4 * 2**30
MIN_OPEN_FILES = 4096
# Ray starts no more work where a disk is fuller than this.
_MAX_DISK_USE = 0.95
# The default run's results, logs and world.
MIN_DISK_BYTES = 2 * 2**30
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def examine(ring_bytes: int | None) -> Iterator[Finding]:
    """``ring_bytes``: size of a ring that has to fit, or None."""
    yield examine_shm(Path("/dev/shm"), ring_bytes)
    yield examine_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"), ring_bytes)
    for path, purpose in (
        (Path.cwd(), "results, unless runner.output_dir says otherwise"),
        (Path(os.environ.get("RAY_TMPDIR", "/tmp")), "Ray's sessions and logs"),
    ):
        yield examine_disk(path, purpose)
    yield examine_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield examine_pidfd()


def examine_shm(path: Path, ring_bytes: int | None = None) -> Finding:
    """Room for the ring, through which weights travel on a host."""
    if not path.is_dir():
        return Finding("problem", f"{path} is missing; weights travel through it on a host", f"mount a tmpfs at {path}")
    stat = os.statvfs(path)
    free_bytes, size_bytes = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    text = f"{path}: {amount(free_bytes)} free of {amount(size_bytes)}"
    remedy = "give the container more (docker run --shm-size=8g), or lower weight_sync.bucket_bytes or weight_sync.num_slots"
    if not os.access(path, os.W_OK):
        return Finding("problem", f"{text}, and this user may not write there", f"chmod 1777 {path}")
    if ring_bytes is not None and free_bytes < ring_bytes:
        return Finding("problem", f"{text}; the ring needs {amount(ring_bytes)}", remedy)
    if ring_bytes is not None:
        return ok(f"{text}; the ring needs {amount(ring_bytes)}")
    if free_bytes < MIN_SHM_BYTES:
        return Finding("warning", f"{text}; {amount(MIN_SHM_BYTES)} are advised; `rlsync plan` says what a model needs", remedy)
    return ok(f"{text}; `rlsync plan` says what a model needs")


def examine_memory(meminfo: Path, cgroups: Path, ring_bytes: int | None = None) -> Finding:
    """What is available of the machine's memory and of the container's limit. Shared memory counts towards both."""
    rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    available_bytes = int(rows["MemAvailable"].split()[0]) * 1024
    text = f"memory: {amount(available_bytes)} available of {amount(int(rows['MemTotal'].split()[0]) * 1024)}"
    for limit_name, usage_name in _CGROUPS:
        limit_bytes, used_bytes = _number(cgroups / limit_name), _number(cgroups / usage_name)
        # The first form of cgroups has a number beyond any memory where there is no limit.
        if limit_bytes is not None and used_bytes is not None and limit_bytes < 2**60:
            available_bytes = min(available_bytes, limit_bytes - used_bytes)
            text += f"; the container may take {amount(limit_bytes)} and has taken {amount(used_bytes)}"
    needed_bytes = MIN_MEMORY_BYTES if ring_bytes is None else max(MIN_MEMORY_BYTES, ring_bytes)
    if available_bytes < needed_bytes:
        remedy = "end other programs, or raise the container's limit; Ray and the kernel end processes when it is used up"
        return Finding("warning", f"{text}; {amount(needed_bytes)} are advised", remedy)
    return ok(text)


def examine_disk(path: Path, purpose: str) -> Finding:
    """Room on the disk of a folder."""
    try:
        stat = os.statvfs(path)
    except OSError as error:
        return Finding("warning", f"disk of {path}: cannot be looked at ({error.strerror})", "check the mount")
    free_bytes, size_bytes = stat.f_bavail * stat.f_frsize, stat.f_blocks * stat.f_frsize
    text = f"disk of {path} ({purpose}): {amount(free_bytes)} free of {amount(size_bytes)}"
    if free_bytes < MIN_DISK_BYTES:
        return Finding("warning", f"{text}; {amount(MIN_DISK_BYTES)} are advised, a checkpoint takes more", "make room there")
    if free_bytes < (1 - _MAX_DISK_USE) * size_bytes:
        return Finding("warning", f"{text}; Ray stops where more than {_MAX_DISK_USE:.0%} are used", "make room there")
    return ok(text)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def examine_open_files(soft: int, hard: int) -> Finding:
    """Ray, vLLM and gloo open a file for each connection."""
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        return ok(f"open files: {'no limit' if soft == resource.RLIM_INFINITY else f'up to {soft:,}'}")
    may = "" if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES else f"ulimit -n {MIN_OPEN_FILES * 16 if hard < 0 else hard}; "
    return Finding(
        "warning", f"open files: up to {soft:,}; {MIN_OPEN_FILES:,} are advised", f"{may}in containers: docker run --ulimit nofile=65536"
    )


def examine_pidfd() -> Finding:
    """How the coordinator notices at once that a process of its host has ended."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        remedy = "take a kernel of 5.3 or later, and a container whose seccomp profile allows pidfd_open"
        return Finding("warning", f"pidfd_open fails ({error.strerror}): a dead process is found by a deadline only", remedy)
    return ok("pidfd works: a dead process is noticed at once")
