"""A ring of slots in host shared memory. Owns the file under /dev/shm and its mappings; knows nothing of what is in it.

The creator unlinks the file as soon as every peer has attached: the memory then lives exactly as long as a process maps
it, so that no crash, not even kill -9, leaves a segment behind. ``multiprocessing.shared_memory`` is not used because
its resource tracker unlinks segments of other processes at exit (python/cpython#82300).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import socket
from pathlib import Path

import torch

from rlsync.errors import ConfigError

SHM_DIR = Path("/dev/shm")
HEADER_BYTES = mmap.PAGESIZE
_PREFIX = "rlsync-ring-"
_MAGIC = b"rlsync-ring-1\n"


class Ring:
    """``num_slots`` slots of ``slot_bytes`` bytes, mapped into this process as 1-D uint8 CPU tensors.

    Attributes:
        path: file under /dev/shm; gone after ``unlink``, while the mapping stays.
        token: secret written to the header; ``attach`` compares it, so that a stale file of that name is not taken.
    """

    def __init__(self, path: Path, token: str, num_slots: int, slot_bytes: int, memory: mmap.mmap) -> None:
        self.path, self.token, self.num_slots, self.slot_bytes = path, token, num_slots, slot_bytes
        self._memory: mmap.mmap | None = memory
        self._lock_fd: int | None = None

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int, *, directory: Path = SHM_DIR) -> Ring:
        """Allocate the memory of a new ring at once. ``slot_bytes`` is rounded up to whole pages.

        Raises ConfigError, naming the free and the needed bytes, where the file system has no room.
        """
        _sweep(directory)
        slot_bytes = -(-max(slot_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        size, token = HEADER_BYTES + num_slots * slot_bytes, secrets.token_hex(16)
        path, fd = _create_locked(directory)
        try:
            # Without this, a full /dev/shm shows as SIGBUS at the first write to a page.
            os.posix_fallocate(fd, 0, size)
            memory = mmap.mmap(fd, size)
        except OSError as error:
            os.unlink(path)
            os.close(fd)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
            raise ConfigError(
                f"shared memory: {directory} has {free} bytes free, the ring needs {size} ({num_slots} slots of {slot_bytes}); "
                "give it more room (docker: --shm-size), or lower weight_sync.bucket_bytes or weight_sync.num_slots"
            ) from error
        memory[: len(_MAGIC) + len(token)] = _MAGIC + token.encode()
        ring = cls(path, token, num_slots, slot_bytes, memory)
        ring._lock_fd = fd
        return ring

    @classmethod
    def attach(cls, path: str | Path, token: str, num_slots: int, slot_bytes: int) -> Ring:
        """Map a ring that another process of this host created. Raises ConfigError where it is not that ring."""
        size = HEADER_BYTES + num_slots * slot_bytes
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise ConfigError(
                f"shared memory: cannot open the ring {path} on {socket.gethostname()} ({error.strerror}); the shm transport needs "
                "actor and engine on one host, with one /dev/shm between their containers and one user"
            ) from error
        try:
            found = os.fstat(fd).st_size
            if found != size:
                raise ConfigError(f"shared memory: {path} has {found} bytes, the ring was announced with {size}")
            memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        expected = _MAGIC + token.encode()
        if memory[: len(expected)] != expected:
            raise ConfigError(f"shared memory: {path} is not the ring of this run")
        return cls(Path(path), token, num_slots, slot_bytes, memory)

    def slot(self, index: int) -> torch.Tensor:
        """Slot ``index`` as a writable uint8 tensor of ``slot_bytes``; its address is the same at every call."""
        return self.tensor(index, 0, (self.slot_bytes,), torch.uint8)

    def tensor(self, index: int, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A typed view of a part of slot ``index``. Every call makes a storage object of its own over the same memory."""
        assert 0 <= index < self.num_slots, f"slot {index} of {self.num_slots}"
        assert self._memory is not None, "the ring is closed"
        count = 1
        for size in shape:
            count *= size
        assert offset_bytes + count * dtype.itemsize <= self.slot_bytes, "outside the slot"
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        start = HEADER_BYTES + index * self.slot_bytes + offset_bytes
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start).view(shape)

    def unlink(self) -> None:
        """Remove the name; the memory is freed when the last process unmaps it. Only the creator's call does anything."""
        if self._lock_fd is not None:
            os.unlink(self.path)
            os.close(self._lock_fd)
            self._lock_fd = None

    def close(self) -> None:
        """Give up this process's mapping, at once or with the last tensor that looks into it."""
        self.unlink()
        # Not memory.close(): tensors refer to the mapping without locking it, and would be left pointing nowhere.
        self._memory = None


def _create_locked(directory: Path) -> tuple[Path, int]:
    """A new empty file, locked until ``unlink`` or the end of this process; who can lock such a file knows it is an orphan.

    It gets the name that is swept only when it is locked.
    """
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
    hidden, path = directory / f".{name}", directory / name
    fd = os.open(hidden, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    os.rename(hidden, path)
    return path, fd


def _sweep(directory: Path) -> None:
    """Remove rings of this user whose creator was killed between ``create`` and ``unlink``."""
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def shm_domain(directory: Path = SHM_DIR) -> str:
    """Equal in two processes exactly when they see the same /dev/shm: the booted kernel and its device number there."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat(directory).st_dev}"
