"""Memory that a worker's processes and devices take, for metrics. Knows no torch, so that it makes no CUDA context."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import psutil

_GB = 1e9


def host_memory_gb() -> float:
    """Resident memory of this process and all its children, in 10^9 bytes; pages that they share count in each."""
    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # ended since
            continue
    return total / _GB


def device_memory_gb(visible: str | None = None) -> float | None:
    """Memory in use, by whomever, of the fullest GPU in ``visible`` (as CUDA_VISIBLE_DEVICES, which is the default), in 10^9 bytes.

    None without GPUs and where NVML cannot be asked.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "") if visible is None else visible
    if not names:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError, RuntimeError):
        return None
    except pynvml.NVMLError:
        return None
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names.split(",")
        ]
        return max(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles) / _GB
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def largest(reports: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest value of each name."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in report.items():
            found[name] = max(value, found.get(name, value))
    return found
