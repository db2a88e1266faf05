"""A real BucketSource over an HF checkpoint folder, and engines small enough to start in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from rlsync.control import BucketEntry, buckets_digest
from rlsync.geometry import TensorSpec
from rlsync.plan import cut_buckets

ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The compiler would take longer than all tests.
    "TORCH_COMPILE_DISABLE": "1",
}


def read_folder(folder: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of ``model.safetensors`` in layer order: embedding, layers ascending, norm, head."""
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def order(name: str) -> tuple[int, int, str]:
        parts = name.split(".")
        if "layers" in parts:
            return 1, int(parts[parts.index("layers") + 1]), name
        return {"embed_tokens": 0, "norm": 2, "lm_head": 3}[parts[-2]], 0, name

    return {name: tensors[name] for name in sorted(tensors, key=order)}


class FolderSource:
    """Fills buckets from tensors in memory. With several ranks, each copies every ``world_size``-th tensor of a bucket."""

    def __init__(self, tensors: dict[str, torch.Tensor], bucket_bytes: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.tensors, self.rank, self.world_size = tensors, rank, world_size
        specs = [TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()]
        self.buckets = tuple(_entries(group) for group in cut_buckets(specs, bucket_bytes))
        self.digest = buckets_digest(self.buckets)
        self.nbytes = sum(t.nbytes for t in tensors.values())
        self.on_begin: Callable[[int], None] = lambda version: None
        self.on_fill: Callable[[int], None] = lambda bucket: None

    def begin(self, version: int) -> None:
        self.on_begin(version)

    def fill(self, bucket: int, slot: torch.Tensor) -> int:
        self.on_fill(bucket)
        filled = 0
        for entry in self.buckets[bucket][self.rank :: self.world_size]:
            source = self.tensors[entry.name].contiguous().view(-1).view(torch.uint8)
            slot[entry.offset_bytes : entry.offset_bytes + source.numel()].copy_(source)
            filled += source.numel()
        return filled


def _entries(specs: tuple[TensorSpec, ...]) -> tuple[BucketEntry, ...]:
    entries, cursor = [], 0
    for spec in specs:
        entries.append(BucketEntry(spec.name, spec.dtype, spec.shape, cursor))
        cursor += -(-spec.nbytes // 64) * 64
    return tuple(entries)
