"""Bytes of tensors on their way to places in files: written at once, or copied to host memory first and written by a thread; and whether
files still hold what was written to them.

Several processes may write into one file, each its own places. Knows no format of a file; knows no process group.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Protocol

import torch

from rlsync.errors import CheckpointError

# torch rounds pinned memory up to a power of two, so it is taken in pieces that are one.
_PIECE_BYTES = 256 * 2**20
# What is copied from a device, and then written, at a time.
_STEP_BYTES = 32 * 2**20
# More bytes are summed up by another thread while they are written.
_ASIDE_BYTES = 2**20
# Threads of a process that sum up what files hold.
_READERS = 4


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes ``[begin, end)`` of a file, and the CRC-32 of what was written there."""

    file: Path
    begin: int
    end: int
    crc: int

    def damage(self, descriptor: int) -> str | None:
        """What is wrong with these bytes in the file that is open; None where they are as written. Raises OSError."""
        crc, at = 0, self.begin
        while at < self.end and (content := os.pread(descriptor, min(_STEP_BYTES, self.end - at), at)):
            crc, at = zlib.crc32(content, crc), at + len(content)
        if at < self.end:
            return f"{self.file} ends at byte {at}, and was written to byte {self.end}"
        if crc != self.crc:
            return f"{self.file}: bytes {self.begin} to {self.end} have CRC-32 {crc:08x}, and were written with {self.crc:08x}"
        return None


def damage(written: Sequence[Written]) -> list[str]:
    """A sentence for each place that is no longer as written, file by file. Reads all of it. Raises OSError."""
    pieces: dict[Path, list[Written]] = {}
    for one in written:
        pieces.setdefault(one.file, []).append(one)
    found: list[str | None] = []
    with ThreadPoolExecutor(_READERS) as readers:
        # One is open at a time: a checkpoint may have more than a process may open.
        for file, own in pieces.items():
            with file.open("rb", buffering=0) as stream:
                found += readers.map(Written.damage, own, repeat(stream.fileno()))
    return [text for text in found if text is not None]


def read_sums(path: Path) -> list[Written]:
    """The sums listed in ``path``, whose file names are relative to its folder. Raises CheckpointError."""
    try:
        return [Written(path.parent / file, int(begin), int(end), int(crc)) for file, begin, end, crc in json.loads(path.read_bytes())]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); take an older checkpoint") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def check_sums(written: Sequence[Written], path: Path) -> None:
    """Raise CheckpointError where files are no longer what was written, as ``path`` says it. Reads all of it."""
    try:
        found = damage(written)
    except OSError as error:
        raise _unreadable(path.parent, error) from error
    if found:
        more = f" (and {len(found) - 1} other places)" if len(found) > 1 else ""
        raise CheckpointError(f"{found[0]}{more}; take an older checkpoint, or remove {path} where the files were changed on purpose")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror}); take an older checkpoint")


class HostMemory:
    """Bytes in host memory, in pieces that are taken when they are needed first, and kept; pinned where there is CUDA.

    Copies between it and a device are asynchronous on the current stream.
    """

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []

    def reserve(self, nbytes: int) -> None:
        """Take memory for ``nbytes`` bytes now, so that nobody waits for it later; pinned memory takes long to be had."""
        for _ in self.spans(0, nbytes):
            pass

    def write(self, offset: int, source: torch.Tensor) -> None:
        """Take in the bytes ``source``, 1-D uint8 on any device."""
        done = 0
        for piece in self.spans(offset, source.numel()):
            piece.copy_(source[done : done + piece.numel()], non_blocking=True)
            done += piece.numel()

    def read(self, offset: int, destination: torch.Tensor) -> None:
        """Fill ``destination``, 1-D uint8 on any device."""
        done = 0
        for piece in self.spans(offset, destination.numel()):
            destination[done : done + piece.numel()].copy_(piece, non_blocking=True)
            done += piece.numel()

    def spans(self, offset: int, nbytes: int) -> Iterator[torch.Tensor]:
        """The memory of ``[offset, offset + nbytes)``, 1-D uint8 pieces in order."""
        end = offset + nbytes
        while offset < end:
            index, start = divmod(offset, _PIECE_BYTES)
            if index == len(self._pieces):
                self._pieces.append(torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
            count = min(_PIECE_BYTES - start, end - offset)
            yield self._pieces[index][start : start + count]
            offset += count


class Writes(Protocol):
    """Where the bytes of files go. Methods raise OSError; a deferred write's is raised by whoever waits for it."""

    def put(self, file: Path, begin: int, data: torch.Tensor) -> None:
        """Write 1-D uint8 ``data`` of any device at byte ``begin`` of a file that exists. It may change when this returns."""
        ...

    def close(self, file: Path, becomes: Path | None = None) -> None:
        """All of a file has been put: have the disk keep it, and then give it the name ``becomes``, if any."""
        ...

    def discard(self, file: Path) -> None:
        """The file is not wanted any more, after a failure; whoever created it removes it."""
        ...


@dataclass(slots=True)
class _OpenFile:
    """A file that is written to. ``written``: what was put into it so far; None where nothing is summed up."""

    descriptor: int
    written: list[Written] | None


class DirectWrites:
    """Writes at once. ``durable`` False leaves it to the system when the disk gets a file.

    Attributes:
        written: what was put into files below ``summed`` that were closed, by the names that they were given at last; without that nothing
            is summed up.
    """

    def __init__(self, *, durable: bool = True, summed: Path | None = None) -> None:
        self._durable, self._summed = durable, summed
        self.written: list[Written] = []
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="checkpoint sums")
        self._open: dict[Path, _OpenFile] = {}
        self._step: torch.Tensor | None = None

    def put(self, file: Path, begin: int, data: torch.Tensor) -> None:
        if file not in self._open:
            # Asked once for a file: thousands of tensors are put into each.
            is_summed = self._summed is not None and file.is_relative_to(self._summed)
            self._open[file] = _OpenFile(os.open(file, os.O_WRONLY), [] if is_summed else None)
        into = self._open[file]
        with _naming(file):
            for start in range(0, data.numel(), _STEP_BYTES):
                piece = self._on_host(data[start : start + _STEP_BYTES])
                self._write(file, into, begin + start, piece)
                if self._durable:
                    # Has Linux begin to write it, so that the disk works while more is copied; nobody reads it soon.
                    os.posix_fadvise(into.descriptor, begin + start, piece.numel(), os.POSIX_FADV_DONTNEED)

    def _write(self, file: Path, into: _OpenFile, begin: int, piece: torch.Tensor) -> None:
        if into.written is None:
            _write(into.descriptor, begin, piece)
            return
        content = piece.numpy().data
        crc = self._aside.submit(zlib.crc32, content) if len(content) > _ASIDE_BYTES else None
        _write(into.descriptor, begin, piece)
        into.written.append(Written(file, begin, begin + len(content), zlib.crc32(content) if crc is None else crc.result()))

    def _on_host(self, data: torch.Tensor) -> torch.Tensor:
        if data.device.type == "cpu":
            return data
        if self._step is None:
            self._step = torch.empty(_STEP_BYTES, dtype=torch.uint8, pin_memory=data.device.type == "cuda")
        # Waits for the copy.
        return self._step[: data.numel()].copy_(data)

    def close(self, file: Path, becomes: Path | None = None) -> None:
        own = self._open.pop(file, None) or _OpenFile(os.open(file, os.O_WRONLY), None)
        try:
            with _naming(file):
                if self._durable:
                    os.fsync(own.descriptor)
        finally:
            os.close(own.descriptor)
        if becomes is not None:
            os.replace(file, becomes)
        self.written += own.written or () if becomes is None else [replace(one, file=becomes) for one in own.written or ()]

    def discard(self, file: Path) -> None:
        if file in self._open:
            os.close(self._open.pop(file).descriptor)

    def __enter__(self) -> DirectWrites:
        return self

    def __exit__(self, *failure: object) -> None:
        """Close what a failure left open."""
        for file in tuple(self._open):
            self.discard(file)
        self._aside.shutdown()


@dataclass(slots=True)
class _Job:
    """A file to write: where each piece of host memory goes."""

    file: Path
    pieces: list[tuple[int, int, int]] = field(default_factory=list)  # byte of the file, of the memory, count
    becomes: Path | None = None


class DeferredWrites:
    """Copies to host memory, and writes from there in a thread, which :meth:`start` starts, durably and file by file.

    Args:
        memory: as large as what is put; it must not be used by others until the thread is done.
        summed: as of :class:`DirectWrites`.

    Attributes:
        written: as of :class:`DirectWrites`, when the thread is done.
    """

    def __init__(self, memory: HostMemory, *, summed: Path | None = None) -> None:
        self._memory, self._size, self._summed = memory, 0, summed
        self.written: list[Written] = []
        self._open: dict[Path, _Job] = {}
        self._jobs: list[_Job] = []
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def put(self, file: Path, begin: int, data: torch.Tensor) -> None:
        job = self._open.setdefault(file, _Job(file))
        job.pieces.append((begin, self._size, data.numel()))
        self._memory.write(self._size, data)
        self._size += data.numel()

    def close(self, file: Path, becomes: Path | None = None) -> None:
        job = self._open.pop(file, None) or _Job(file)
        job.becomes = becomes
        self._jobs.append(job)

    def discard(self, file: Path) -> None:
        self._open.pop(file, None)

    def start(self) -> None:
        """Begin to write what was put and closed so far; what was put may change from now on."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        # A daemon: a process that ends is not kept, and what it has not finished has not got its name.
        self._thread = threading.Thread(target=self._run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with DirectWrites(summed=self._summed) as direct:
                for job in self._jobs:
                    for begin, offset, nbytes in job.pieces:
                        for piece in self._memory.spans(offset, nbytes):
                            direct.put(job.file, begin, piece)
                            begin += piece.numel()
                    direct.close(job.file, job.becomes)
            self.written = direct.written
        except Exception as error:  # whoever waits is told
            self._failure = error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether everything is on the disk, after at most ``timeout_s``; None waits for it. Raises CheckpointError where it cannot be."""
        assert self._thread is not None, "start first"
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        if isinstance(self._failure, OSError):
            raise CheckpointError(f"{self._failure.filename}: cannot be written ({self._failure.strerror})") from self._failure
        if self._failure is not None:
            raise self._failure
        return True


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Have an OSError of a descriptor say whose it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def _write(descriptor: int, begin: int, data: torch.Tensor) -> None:
    view, done = data.numpy().data, 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], begin + done)


def share_of(sizes: Sequence[int], part: int, parts: int) -> Iterator[tuple[int, int, int]]:
    """Part ``part`` of ``parts`` equal ones of things of these sizes in a row: (index, begin, end) of each thing that it has a part of."""
    total = sum(sizes)
    first, last = total * part // parts, total * (part + 1) // parts
    at = 0
    for index, size in enumerate(sizes):
        begin, end = max(first - at, 0), min(last - at, size)
        if begin < end:
            yield index, begin, end
        at += size
