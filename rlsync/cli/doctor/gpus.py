"""Findings about GPUs: what the driver has, what torch sees, how they are linked, whose memory can be read by whom, and NCCL."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlsync.cli.doctor.finding import Finding, amount, ok
from rlsync.cli.doctor.probes import Facts

_QUERY_S = 30.0
_FIELDS = ("index", "name", "memory.total", "driver_version", "mig.mode.current")
# Present in most containers; each is made by the program that starts them.
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
OTHERWISE = "set weight_sync.transport to shm or gloo, which go through host memory"


@dataclass(frozen=True, slots=True)
class Driver:
    """What nvidia-smi says: a row of fields for each GPU, or ``error``; neither where there is no nvidia-smi.

    ``links``: how two GPUs are connected, by their numbers, the lower first, in nvidia-smi's words; none where it did not say.
    """

    gpus: tuple[Mapping[str, str], ...] = ()
    error: str = ""
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)


def ask_driver() -> Driver:
    """Ask nvidia-smi, which needs no torch."""
    try:
        run = _ask(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return Driver()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(error=str(error))
    if run.returncode != 0:
        return Driver(error=" ".join((run.stdout + run.stderr).split())[:300])
    rows = [[field.strip() for field in line.split(",")] for line in run.stdout.splitlines() if line.strip()]
    return Driver(tuple(dict(zip(_FIELDS, row, strict=False)) for row in rows), links=_links() if len(rows) > 1 else {})


def _ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nvidia-smi", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_QUERY_S)


def _links() -> dict[tuple[int, int], str]:
    """What stands above the diagonal of the matrix, whose rows are ``GPU0 X NV18 ...``."""
    try:
        matrix = _ask("topo", "-m").stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split()[1:] for line in matrix.splitlines() if re.match(r"GPU\d+\s", line)]
    return {(i, j): row[j] for i, row in enumerate(rows) for j in range(i + 1, len(rows))}


def examine(driver: Driver, facts: Facts | None) -> Iterator[Finding]:
    """``facts``: torch's, why there are none, or None where nobody asked."""
    if driver.error:
        yield Finding("warning", f"nvidia-smi is here and fails: {driver.error}", "check the driver, and the container's access to GPUs")
    for gpu in driver.gpus:
        yield ok(f"GPU {gpu['index']}: {gpu['name']}, {amount(int(float(gpu['memory.total'])) * 2**20)}, driver {gpu['driver_version']}")
    divided = [gpu["index"] for gpu in driver.gpus if gpu.get("mig.mode.current") == "Enabled"]
    if divided:
        yield Finding("warning", f"GPUs {', '.join(divided)} are divided by MIG; their parts cannot share memory", OTHERWISE)
    yield from _linked(driver.links)
    if isinstance(facts, str):
        if "No module named 'torch" in facts:
            yield Finding("problem", "torch is not installed", "make setup")
        else:
            yield Finding(
                "problem", f"torch cannot be used: {facts}", "python -c 'import torch; torch.cuda.device_count()' shows all of it"
            )
    elif facts is not None:
        yield from _of_torch(driver, facts, os.environ)
    elif not driver.gpus and not driver.error:
        yield ok("no nvidia-smi, so no GPU is expected")


def _of_torch(driver: Driver, facts: Mapping[str, object], environment: Mapping[str, str]) -> Iterator[Finding]:
    devices, torch_name = facts["devices"], f"torch {facts['torch']}"
    assert isinstance(devices, list)
    if not devices and driver.gpus:
        remedy = "install a CUDA build of torch (requirements/cuda.lock), check CUDA_VISIBLE_DEVICES; meanwhile all runs on CPU"
        yield Finding("warning", f"the driver has {len(driver.gpus)} GPUs, but {torch_name} sees none", remedy)
        return
    if not devices:
        yield ok(f"{torch_name} sees no GPU: Megatron runs on gloo, vLLM on its CPU build")
        return
    free = ", ".join(f"{amount(d['free_bytes'])} of {amount(d['total_bytes'])}" for d in devices)
    yield ok(f"{torch_name} with CUDA {facts['cuda']} sees {len(devices)}: free {free}")
    yield _nccl(facts["nccl"])
    yield from _sharing(devices, facts["no_peers"], facts["ipc"], environment)


def _nccl(version: object) -> Finding:
    if version is None:
        return Finding("problem", "this build of torch has no NCCL, which Megatron needs on GPUs", "install requirements/cuda.lock")
    return ok(f"NCCL {version}")


def _linked(links: Mapping[tuple[int, int], str]) -> Iterator[Finding]:
    """How fast a sync between two GPUs can be at most."""
    slow = {pair: link for pair, link in links.items() if not link.startswith("NV")}
    if links and not slow:
        yield ok(f"all GPUs are linked by NVLink ({', '.join(sorted(set(links.values())))})")
    elif slow:
        pairs = ", ".join(f"{i}-{j} ({link})" for (i, j), link in sorted(slow.items()))
        yield ok(f"without NVLink, so that a sync between them goes at the speed of PCIe: GPUs {pairs}")


def _sharing(devices: Sequence[object], no_peers: object, ipc: object, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether processes can read each other's GPU memory, as the transport ``ipc`` does."""
    assert isinstance(no_peers, list)
    if no_peers:
        pairs = ", ".join(f"{i}-{j}" for i, j in no_peers)
        remedy = f"check PCIe ACS and NVLink (nvidia-smi topo -p2p r); for an actor and an engine on two such GPUs {OTHERWISE}"
        yield Finding("warning", f"GPUs {pairs} cannot reach each other's memory", remedy)
    elif len(devices) > 1:
        yield ok("all GPUs reach each other's memory")
    if ipc is None:
        yield ok("another process can open memory of GPU 0 (CUDA IPC)")
    else:
        remedy = f"in a container: docker run --ipc=host; otherwise {OTHERWISE}"
        yield Finding("warning", f"another process cannot open memory of GPU 0 (CUDA IPC): {ipc}", remedy)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if re.search(r"expandable_segments\s*:\s*true", environment.get(name, ""), re.IGNORECASE):
            yield Finding(
                "warning",
                f"{name} switches expandable_segments on: an actor's parameters in them cannot be mapped, and ipc reads a ring beside "
                "them, for a copy more and weight_sync.num_slots buckets of GPU memory",
                f"take expandable_segments out of {name} for the actor, or leave it: syncs are right either way",
            )
    if any(Path(mark).exists() for mark in _CONTAINER_MARKS):
        yield ok("this is a container; engines in another one need its IPC namespace and /dev/shm (--ipc=host) and its process ids (--pid)")
