"""A real Source over an HF checkpoint folder, and the environment of engines small enough to start in a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from rlsync.coordinator.messages import AdapterFactors
from rlsync.layout.geometry import TensorSpec, whole_tensors
from rlsync.sync import WeightSyncer
from rlsync.sync.packer import Packed
from rlsync.sync.source import Declared

ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # The compiler would take longer than all tests.
    "TORCH_COMPILE_DISABLE": "1",
}
# Blocks of an engine's KV cache: more than tiny models fill. Without it vLLM writes zeros to all of the GiB above, the least it takes.
NUM_BLOCKS = 64


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
    """Whole HF tensors in memory. With several ranks, each holds every ``world_size``-th."""

    def __init__(self, tensors: dict[str, torch.Tensor], *, rank: int = 0, world_size: int = 1) -> None:
        self.tensors = tuple(TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())
        self.placements = tuple(whole_tensors(f"actor {r}", self.tensors[r::world_size]) for r in range(world_size))
        self.stable_memory, self.frozen, self.declared = True, frozenset[str](), Declared()
        self.buffers = {spec.name: tensors[spec.name].contiguous() for spec in self.tensors[rank::world_size]}
        self.on_begin: Callable[[int], None] = lambda version: None

    def begin(self, version: int) -> None:
        self.on_begin(version)

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Other values for the same tensors, in the same memory."""
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[name])


class AdapterSource(FolderSource):
    """Adapters of rank ``r`` beside a frozen base: ``factors`` by their names in PEFT, without its prefix, and scaled."""

    def __init__(self, base: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], r: int) -> None:
        super().__init__(base | factors)
        self.frozen, self.declared = frozenset(base), Declared(adapter=AdapterFactors(r, len(base)))

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        """Other values for these tensors, in the same memory."""
        for name, tensor in tensors.items():
            self.buffers[name].copy_(tensor)


def call_on_fill(syncer: WeightSyncer, call: Callable[[int], None]) -> None:
    """Make a connected syncer call something in its filling thread before each bucket."""
    assert syncer._connection is not None
    packer = syncer._connection.packer
    pack = type(packer).pack

    def wrapped(bucket: int, turn: int) -> Packed:
        call(bucket)
        return pack(packer, bucket, turn)

    packer.pack = wrapped  # type: ignore[method-assign]
