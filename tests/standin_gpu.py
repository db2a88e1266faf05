"""GPU memory where there is no GPU: what CUDA's driver and kernels mean for ``ipc``, over shared memory of this process.

An allocation is a file in memory, a handle names it, and to open it maps it once more, to be read only. A copy program executes the
tables of the real one by their meaning, and looks whether what it reads is mapped. tests/gpu has the real things.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import socket
import threading
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlsync.copy import checksum_programs
from rlsync.copy.cuda import strided
from rlsync.copy.tables import Move, Strided, build_tables, moved
from rlsync.sync import packer, syncer
from rlsync.transport import cuda_memory, ipc
from rlsync.transport.cuda_memory import HANDLE_BYTES, Allocation
from tests.copy_tables import execute_in_place

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
HERE = torch.device("cpu")


class GpuTensor(torch.Tensor):
    """Says that it is on a GPU, and so do its views."""

    is_cuda = True  # type: ignore[assignment]


class Driver:
    """Of all GPUs of the host.

    Attributes:
        mapped: what has been opened and not closed, by address: number and bytes.
        opened: numbers of allocations, in the order in which they were opened.
        freed: numbers of allocations, in the order in which they were given back, and whether somebody mapped them then.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(100)
        self._lock = threading.Lock()
        self._taken: dict[int, tuple[int, int, int]] = {}
        self.mapped: dict[int, tuple[int, int]] = {}
        self.opened: list[int] = []
        self.freed: list[tuple[int, bool]] = []

    def take(self, nbytes: int) -> int:
        """Address of a new allocation."""
        fd = os.memfd_create("gpu")
        os.ftruncate(fd, nbytes)
        address = _map(fd, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
        with self._lock:
            self._taken[address] = fd, nbytes, next(self._numbers)
        return address

    def give_back(self, address: int) -> None:
        """What is mapped elsewhere stays there."""
        with self._lock:
            fd, nbytes, number = self._taken.pop(address)
            self.freed.append((number, number in {mapped for mapped, _ in self.mapped.values()}))
        _LIBC.munmap(address, nbytes)
        os.close(fd)

    def _allocation(self, address: int) -> tuple[int, int, int, int]:
        with self._lock:
            return next((start, *it) for start, it in self._taken.items() if start <= address < start + it[1])

    def number(self, address: int) -> int:
        return self._allocation(address)[3]

    def export(self, address: int, device: torch.device) -> Allocation:
        start, fd, nbytes, number = self._allocation(address)
        return Allocation(start, nbytes, number, fd.to_bytes(HANDLE_BYTES, "little"))

    def open(self, allocation: Allocation) -> int:
        address = _map(int.from_bytes(allocation.handle, "little"), allocation.nbytes, mmap.PROT_READ)
        with self._lock:
            self.mapped[address] = allocation.number, allocation.nbytes
            self.opened.append(allocation.number)
        return address

    def call(self, name: str, address: ctypes.c_uint64) -> None:
        assert name == "cuIpcCloseMemHandle"
        with self._lock:
            _, nbytes = self.mapped.pop(address.value)
        _LIBC.munmap(address.value, nbytes)

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether this can be read."""
        with self._lock:
            spans = [(start, n) for start, (_, n) in self.mapped.items()] + [(start, n) for start, (_, n, _) in self._taken.items()]
        return any(start <= address and address + nbytes <= start + n for start, n in spans)


def _map(fd: int, nbytes: int, access: int) -> int:
    address = _LIBC.mmap(None, nbytes, access, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(address)


class Memory:
    """An allocation as a tensor, in place of ``ExportableMemory`` and of torch's allocator."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver, self.nbytes, self.address = driver, nbytes, driver.take(nbytes)
        raw = (ctypes.c_uint8 * nbytes).from_address(self.address)
        self.tensor = torch.frombuffer(raw, dtype=torch.uint8).as_subclass(GpuTensor)

    def free(self) -> None:
        """Idempotent; the tensor is not to be used any more."""
        if self.address:
            self._driver.give_back(self.address)
            self.address = 0


class Program:
    """What ``CudaCopyProgram`` means."""

    table_bytes = 0

    def __init__(
        self, driver: Driver, pairs: Iterable[tuple[Any, Any]], constants: Sequence[Any] = (), *, device: torch.device, summed: bool = False
    ) -> None:
        assert not constants
        pairs = [(None if d is None else strided(d), strided(s)) for d, s in pairs]
        self._driver, self._tables = driver, build_tables(pairs, in_order=summed)
        self._reads = [(s, _nbytes(s)) for _, s in pairs]
        self._sums: list[int] = []

    def run(self, stream: object = None) -> int:
        for source, nbytes in self._reads:
            assert self._driver.holds(source.address, nbytes), f"{source} at {source.address:#x} is not mapped"
        self._sums = execute_in_place(self._tables)
        return self._tables.nbytes

    def checksums(self) -> list[int]:
        return self._sums

    def move_sources(self, moves: Sequence[Move]) -> None:
        self._tables = moved(self._tables, moves)
        places = self._tables.pairs["source"]
        assert len(places) == len(self._reads)
        self._reads = [(Strided(int(at), s.dtype, s.shape, s.strides), nbytes) for at, (s, nbytes) in zip(places, self._reads, strict=True)]


def _nbytes(view: Strided) -> int:
    """From its first to its last element."""
    return (1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))) * np.dtype(view.dtype).itemsize


def host() -> str:
    """The name of this host, as actor ranks say it."""
    return socket.gethostname()


def install(patch: pytest.MonkeyPatch) -> Driver:
    """Have actor ranks of threads and workers of threads find GPUs, ``GPU-actor-0`` and so on; all memory can be mapped."""
    driver, ranks = Driver(), itertools.count()
    silent = SimpleNamespace(synchronize=lambda: None)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: silent)
    for name in ("synchronize", "set_device"):
        patch.setattr(torch.cuda, name, lambda device=None: None)
    patch.setattr(syncer, "_gpu_uuid", lambda: f"GPU-actor-{next(ranks) % 2}")
    patch.setattr(syncer, "_device", lambda: HERE)
    patch.setattr(syncer, "memory_of", lambda buffers, stable_memory: "stable" if stable_memory else "unstable")
    patch.setattr(ipc, "can_be_exported", lambda address: True)
    patch.setattr(ipc, "allocation_number", driver.number)
    patch.setattr(ipc, "allocation_of", driver.export)
    patch.setattr(cuda_memory, "_use", lambda device: None)
    patch.setattr(cuda_memory, "_call", driver.call)
    patch.setattr(cuda_memory.Mappings, "_open", lambda self, allocation: driver.open(allocation))
    patch.setattr(ipc, "ExportableMemory", lambda nbytes, device: Memory(driver, nbytes))
    for module in (ipc, packer, checksum_programs):
        patch.setattr(module, "CudaCopyProgram", _program(driver))
    return driver


def _program(driver: Driver) -> type[Program]:
    class Bound(Program):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(driver, *arguments, **named)

    return Bound
