"""Prints what torch says of this machine's GPUs, and whether two processes can share their memory. Run by ``probes``."""

from __future__ import annotations

import json
from typing import Any

import torch

_TRIAL_S = 60.0
_SIZE = 1000


def facts() -> dict[str, Any]:
    """``torch``, ``cuda`` and ``nccl``: versions, None for a CPU build; ``devices``; ``no_peers``: pairs that cannot reach each
    other's memory; ``ipc``: None, or what went wrong when another process opened memory of GPU 0."""
    with_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = torch.cuda.nccl.version() if with_nccl else None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "devices": [_device(i) for i in range(count)],
        "no_peers": [(i, j) for i in range(count) for j in range(count) if i < j and not torch.cuda.can_device_access_peer(i, j)],
        "ipc": _ipc_trial(count) if count else None,
    }


def _device(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return {"name": found.name, "uuid": str(found.uuid), "free_bytes": free_bytes, "total_bytes": total_bytes}


def _ipc_trial(count: int) -> str | None:
    """Another process reads memory of GPU 0, on the last GPU where there are several."""
    context = torch.multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=read_shared, args=(there, count - 1), daemon=True)
    child.start()
    there.close()
    memory = torch.arange(_SIZE, device="cuda:0")
    try:
        here.send(memory)
        if not here.poll(_TRIAL_S):
            return f"the other process did not answer within {_TRIAL_S:g} s"
        answer: str | int = here.recv()
        return None if answer == sum(range(_SIZE)) else f"the other process says {answer}"
    except (RuntimeError, OSError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        child.kill()
        child.join()


def read_shared(connection: Any, index: int) -> None:
    """The other process: answers with the sum of the memory it was given, or with what went wrong."""
    try:
        connection.send(int(connection.recv().to(f"cuda:{index}").sum()))
    except RuntimeError as error:
        connection.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    print(json.dumps(facts()))
