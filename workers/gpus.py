"""GPUs of this machine as NVML knows them: how many, how large, how full. Makes no CUDA context, and imports no torch."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from itertools import takewhile
from types import ModuleType


def count_gpus() -> int:
    """GPUs that this process may use, as NVML and CUDA_VISIBLE_DEVICES say."""
    visible, count = os.environ.get("CUDA_VISIBLE_DEVICES"), len(_gpus())
    # CUDA takes the names up to the first that is none: -1 alone hides all GPUs.
    return count if visible is None else min(count, len(list(takewhile(_is_device, visible.split(",")))))


def _is_device(name: str) -> bool:
    return name.strip() != "" and not name.strip().startswith("-")


def gpu_bytes() -> int | None:
    """Memory of the largest GPU of this machine, or None where there is none, or none that says so.

    Of which ones a run may use, CUDA alone knows: what is refused fits on none.
    """
    return max(filter(None, _gpus()), default=None)


def _gpus() -> list[int]:
    """Memory of each GPU of this machine."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    count, found = ctypes.c_uint(0), []
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        count.value = 0
    for index in range(count.value):
        device, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
            nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        found.append(memory[0])
    nvml.nvmlShutdown()
    return found


def device_memory_gb(visible: str | None = None) -> float | None:
    """Used memory of the fullest visible GPU, by all processes, in 10^9 bytes; ``visible`` defaults to CUDA_VISIBLE_DEVICES.

    None without GPUs and where NVML cannot be asked.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "") if visible is None else visible
    if not names:
        return None
    pynvml = _nvml()
    if pynvml is None:
        return None
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names.split(",")
        ]
        return max(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles) / 1e9
    except pynvml.NVMLError:
        return None


@cache
def _nvml() -> ModuleType | None:
    """NVML, which this process keeps: every rank and engine asks it in every step, and to begin it looks at all GPUs of the host."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError, RuntimeError):
        return None
    except pynvml.NVMLError:
        return None
    return pynvml
