"""How much memory of each GPU is in use over time: the driver's word through NVML, which needs no context. Nothing without GPUs."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Mapping

from rlsync.errors import RlsyncError

_PERIOD_S = 0.002


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Watch:
    """A thread that looks at the GPUs every two milliseconds and keeps what changed."""

    def __init__(self, uuids: Mapping[str, str]) -> None:
        """``uuids`` by GPU, as torch names them. Raises RlsyncError where the driver's library cannot be used."""
        self._lib = _library()
        self._handles = {gpu: self._handle(uuid) for gpu, uuid in uuids.items()}
        self._seen: dict[str, list[tuple[float, int]]] = {gpu: [] for gpu in uuids}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="bench-memory", daemon=True)
        self._thread.start()

    def _handle(self, uuid: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        code = self._lib.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(handle))
        if code:
            raise RlsyncError(f"NVML does not know GPU {uuid} (error {code})")
        return handle

    def _look(self) -> None:
        found = _Memory()
        while not self._ended.wait(_PERIOD_S):
            for gpu, handle in self._handles.items():
                if self._lib.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)) == 0:
                    seen, now_s = self._seen[gpu], time.monotonic()
                    if not seen or seen[-1][1] != found.used:
                        seen.append((now_s, int(found.used)))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def most_more(self, begin_s: float, end_s: float) -> Mapping[str, int]:
        """For each GPU the most bytes in use between two times (monotonic clock), beyond those in use at the first."""
        found = {}
        for gpu, seen in self._seen.items():
            before = [used for at_s, used in seen if at_s <= begin_s]
            during = [used for at_s, used in seen if begin_s < at_s <= end_s]
            if before:
                found[gpu] = max([0, *(used - before[-1] for used in during)])
        return found


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise RlsyncError(f"memory of the GPUs cannot be watched: {error}") from None
    if code := library.nvmlInit_v2():
        raise RlsyncError(f"memory of the GPUs cannot be watched: nvmlInit failed with {code}")
    return library
