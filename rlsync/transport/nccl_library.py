"""NCCL's own functions: communicators that block nobody, messages on a stream, abort. Owns the calls; knows no group and no deadline.

The library is used directly. torch's ProcessGroupNCCL waits inside NCCL for members that never come, ends the whole process from
a watchdog thread when a message is late, and reads what it does then from the environment of the process, which is vLLM's here and
the trainer's there. A communicator that does not block returns at once, says how it stands when asked, and can always be given up.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from rlsync.errors import ConfigError, RlsyncError

UNIQUE_ID_BYTES = 128
# Values of nccl.h; they are part of its binary interface.
_SUCCESS, _IN_PROGRESS, _UINT8 = 0, 7, 1
_CONFIG_MAGIC = 0xCAFEBEEF
_UNDEFINED = -(2**31)
# The first version whose communicators need not block. Its config is understood by every later one, which goes by its size.
_CONFIG_VERSION = 2 * 10000 + 17 * 100


class NcclError(RlsyncError):
    """NCCL refused a call, or says that a communicator is broken."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class _Config(ctypes.Structure):
    """``ncclConfig_t`` as of version 2.17."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
    "ncclCommInitRankConfig": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int, ctypes.POINTER(_Config)),
    "ncclCommGetAsyncError": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)),
    "ncclCommAbort": (ctypes.c_void_p,),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
    "ncclSend": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
    "ncclRecv": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """The one that torch has loaded, found by its name."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise ConfigError(f"the nccl transport needs NCCL, which comes with a CUDA build of torch: {error}") from error
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    for name in ("ncclGetErrorString", "ncclGetLastError"):
        getattr(library, name).argtypes = (ctypes.c_int if name == "ncclGetErrorString" else ctypes.c_void_p,)
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: object) -> None:
    code = getattr(_library(), name)(*arguments)
    if code not in (_SUCCESS, _IN_PROGRESS):
        raise NcclError(f"{name}: {_reason(code, None)}")


def _reason(code: int, communicator: ctypes.c_void_p | None) -> str:
    library = _library()
    words, last = library.ncclGetErrorString(code), library.ncclGetLastError(communicator)
    return ": ".join(text.decode(errors="replace").strip() for text in (words, last) if text)


def nccl_version() -> str:
    """Of the library, ``2.28.9``. Raises ConfigError where there is none."""
    number = ctypes.c_int(0)
    _call("ncclGetVersion", ctypes.byref(number))
    major, rest = divmod(number.value, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"


def unique_id() -> bytes:
    """Names a communicator that is to be made; one member asks for it, all others are told."""
    made = _UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(made))
    return bytes(made)


class Communicator:
    """One member of an NCCL communicator on the calling thread's current device. Nothing here waits but ``abort``.

    Not thread-safe. Between calls that begin something ``in_progress`` must have become false.
    """

    def __init__(self, name: bytes, rank: int, world_size: int) -> None:
        """Begin to connect with the other members. Collective over them, though it returns at once. Raises NcclError."""
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0, _UNDEFINED, _UNDEFINED, _UNDEFINED, None)
        self._handle = ctypes.c_void_p()
        _call(
            "ncclCommInitRankConfig", ctypes.byref(self._handle), world_size, _UniqueId.from_buffer_copy(name), rank, ctypes.byref(config)
        )

    def in_progress(self) -> bool:
        """Whether what was begun last is not enqueued yet. Raises NcclError where the communicator is broken."""
        state = ctypes.c_int(_SUCCESS)
        _call("ncclCommGetAsyncError", self._handle, ctypes.byref(state))
        if state.value not in (_SUCCESS, _IN_PROGRESS):
            raise NcclError(_reason(state.value, self._handle))
        return state.value == _IN_PROGRESS

    def begin(self, sends: list[tuple[int, int, int]], receives: list[tuple[int, int, int]], stream: int) -> None:
        """Begin to enqueue messages on ``stream`` (a handle) that travel together; each is (address, bytes, rank of the other end).

        Messages between two members match in the order in which they were begun. Raises NcclError.
        """
        _call("ncclGroupStart")
        try:
            for name, messages in (("ncclSend", sends), ("ncclRecv", receives)):
                for address, nbytes, rank in messages:
                    _call(name, address, nbytes, _UINT8, rank, self._handle, stream)
        finally:
            _call("ncclGroupEnd")

    def abort(self) -> None:
        """End whatever is under way, on the device too, and free the communicator. Waits for its kernels. Idempotent."""
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            _call("ncclCommAbort", handle)
