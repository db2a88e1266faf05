"""What the links of this machine carry, measured: ``python -m rlsync.bench.floors SPEC``, a process of its own that ends before
anything else touches a GPU, so that its contexts take nobody's memory.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from rlsync.bench import spec as specs
from rlsync.copy.speed import copy_gb_per_s

_BYTES = 2**30
_ROUNDS = 5
_COPIES = 4
_CPU_BYTES = 2**28
CONVENTION = (
    "10^9 bytes per second that arrive: a copy on one GPU reads as many bytes again from the same memory; torch's copy_, the best of "
    f"{_ROUNDS} rounds"
)


def measure(spec: specs.Spec) -> dict[str, Any]:
    """``same_gb_per_s`` by GPU (``cpu`` without one), ``peer_gb_per_s`` by ``source->destination``, and what the GPUs are."""
    if not spec.on_gpu:
        speed = copy_gb_per_s(torch.ones(_CPU_BYTES, dtype=torch.uint8))
        return {"convention": CONVENTION, "same_gb_per_s": {"cpu": speed}, "peer_gb_per_s": {}, "gpu_bytes": None, "gpus": []}
    engines = [gpu for worker in spec.engine_gpus for gpu in worker]
    pairs = [(source, gpu) for gpu in engines for source in spec.actor_gpus if source != gpu]
    used = sorted({*engines, *spec.actor_gpus})
    properties = {gpu: torch.cuda.get_device_properties(gpu) for gpu in used}
    return {
        "convention": CONVENTION,
        "same_gb_per_s": {str(gpu): gb_per_s(gpu, gpu) for gpu in used},
        "peer_gb_per_s": {f"{source}->{gpu}": gb_per_s(source, gpu) for source, gpu in pairs},
        "gpu_bytes": min(p.total_memory for p in properties.values()),
        "gpus": [{"index": gpu, "name": p.name, "uuid": str(p.uuid), "bytes": p.total_memory} for gpu, p in properties.items()],
    }


def gb_per_s(source: int, destination: int) -> float:
    """Rate of a copy from one GPU to another, or to itself, by CONVENTION; of several copies in a row, so that launches do not count."""
    given = torch.ones(_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    taken = torch.empty(_BYTES, dtype=torch.uint8, device=f"cuda:{destination}")
    best_s = float("inf")
    for _ in range(1 + _ROUNDS):
        _synchronize(source, destination)
        begin_s = time.perf_counter()
        for _ in range(_COPIES):
            taken.copy_(given)
        _synchronize(source, destination)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return _COPIES * _BYTES / 1e9 / best_s


def _synchronize(*devices: int) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


def main(path: str) -> None:
    spec = specs.read(path)
    specs.write_file(spec.floors_path, json.dumps(measure(spec)))


if __name__ == "__main__":
    main(sys.argv[1])
