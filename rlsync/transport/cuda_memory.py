"""Device memory that other processes of the host map: its allocations, the handles by which they do, and mappings of both.

Owns the calls of the CUDA driver. Its functions are used directly, because torch's way of sharing counts references in both
processes and keeps memory from being freed until the other one has let go, and because only the driver says which allocation
an address belongs to. Knows no plans and no messages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import msgspec
import torch

from rlsync.errors import ConfigError, RlsyncError

HANDLE_BYTES = 64
# CUpointer_attribute of cuda.h.
_BUFFER_ID, _IS_IPC_CAPABLE, _RANGE_START, _RANGE_BYTES = 7, 10, 11, 12
_LAZY_PEER_ACCESS = 1

Size = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
_Handle64 = Annotated[bytes, msgspec.Meta(max_length=256)]


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """One allocation: where it begins in its owner's process, its bytes, and the CUDA IPC handle by which others map it.

    ``number`` is the driver's for it, which no other allocation of that process ever has: memory that was freed and taken
    again at the same address differs by it.
    """

    address: Size
    nbytes: Size
    number: Size
    handle: _Handle64


class DriverError(RlsyncError):
    """The CUDA driver refused a call."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise ConfigError(f"CUDA IPC needs the CUDA driver: {error}") from error
    library.cuIpcOpenMemHandle_v2.argtypes = (ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint)
    return library


def _call(name: str, *arguments: object) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'unknown').decode()} (CUDA error {code})")


def _attribute(address: int, attribute: int) -> int:
    value = ctypes.c_uint64(0)
    _call("cuPointerGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), ctypes.c_uint64(address))
    return value.value


def can_be_exported(address: int) -> bool:
    """Whether other processes can map the memory at a device address; not memory of expandable segments or memory savers."""
    return bool(_attribute(address, _IS_IPC_CAPABLE) & 0xFF)


def allocation_number(address: int) -> int:
    """The driver's number of the allocation that an address lies in; no other one of this process ever has it."""
    return _attribute(address, _BUFFER_ID)


def allocation_of(address: int, device: torch.device) -> Allocation:
    """The allocation of ``device`` that an address lies in, with a handle to it. Raises DriverError where it cannot be exported."""
    _use(device)
    handle = _Handle()
    start = _attribute(address, _RANGE_START)
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(start))
    return Allocation(start, _attribute(address, _RANGE_BYTES), allocation_number(address), bytes(handle))


@dataclass(frozen=True, slots=True)
class _Mapped:
    allocation: Allocation
    address: int


class Mappings:
    """Allocations of one other process, mapped for kernels of ``device``, wherever the memory itself lies.

    They are opened in the context of the reader's device: in that of the owner's, a kernel of the reader's fails with an illegal
    access. The owner's device need not be visible to this process.
    """

    def __init__(self, device: torch.device, owner: str) -> None:
        self._device, self._owner = device, owner
        self._mapped: dict[int, _Mapped] = {}

    def open(self, allocations: Iterable[Allocation]) -> None:
        """Map new allocations, and unmap those that are no longer listed. Raises ConfigError where this process cannot map one."""
        wanted = {a.number: a for a in allocations}
        self._close([number for number, mapped in self._mapped.items() if wanted.get(number) != mapped.allocation])
        _use(self._device)
        for number, allocation in wanted.items():
            if number not in self._mapped:
                self._mapped[number] = _Mapped(allocation, self._open(allocation))

    def _open(self, allocation: Allocation) -> int:
        if len(allocation.handle) != HANDLE_BYTES:
            raise ConfigError(f"{self._owner} sent a memory handle of {len(allocation.handle)} bytes; CUDA's have {HANDLE_BYTES}")
        address = ctypes.c_uint64(0)
        try:
            _call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(allocation.handle),
                ctypes.c_uint(_LAZY_PEER_ACCESS),
            )
        except DriverError as error:
            raise ConfigError(
                f"{self._device} cannot map {allocation.nbytes} bytes of {self._owner}: {error}. Both need one host, one user and, in "
                "containers, one IPC namespace (docker: --ipc=host), and their GPUs peer access; otherwise set weight_sync.transport "
                "to shm, gloo or nccl"
            ) from error
        return address.value

    def here(self, address: int, nbytes: int) -> int:
        """The address in this process of an owner's address. Raises ConfigError for memory that is not mapped."""
        for mapped in self._mapped.values():
            offset = address - mapped.allocation.address
            if 0 <= offset <= mapped.allocation.nbytes - nbytes:
                return mapped.address + offset
        raise ConfigError(f"{self._owner} named the address {address:#x}, which lies in nothing that it exports")

    def close(self) -> None:
        """Unmap everything; no copy may read it any more. Idempotent."""
        self._close(list(self._mapped))

    def _close(self, numbers: Iterable[int]) -> None:
        _use(self._device)
        for number in numbers:
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(self._mapped.pop(number).address))


class ExportableMemory:
    """Device memory that can always be exported: taken from the driver directly, outside torch's allocator and every memory saver.

    Attributes:
        tensor: 1-D uint8 CUDA tensor over all of it; not to be used after ``free``.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        _use(device)
        self._device, self.nbytes = device, nbytes
        address = ctypes.c_uint64(0)
        try:
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        except DriverError as error:
            raise ConfigError(
                f"no {nbytes} bytes for the staging ring on {device}: {error}; lower weight_sync.bucket_bytes or weight_sync.num_slots"
            ) from error
        self.address = address.value
        self.tensor = torch.as_tensor(self, device=device)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}

    def free(self) -> None:
        """Give it back; every reader has let go of it. Idempotent."""
        if self.address:
            _use(self._device)
            _call("cuMemFree_v2", ctypes.c_uint64(self.address))
            self.address = 0


def _use(device: torch.device) -> None:
    """Make the device's context the calling thread's, as calls of the driver need it and threads do not have it from the start."""
    torch.cuda.set_device(device)
    torch.cuda.current_stream(device).query()
