"""One actor rank of a bench: a Megatron model with random weights as training has it, and what every way of syncing asks of it."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlsync.bench.spec import Spec
from rlsync.bench.worker import Row, allocated_bytes, views
from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.source import MegatronSource
from rlsync.copy.cuda import compile_ahead
from rlsync.layout.geometry import whole_tensors
from rlsync.megatron.model import DdpOptions, iter_parameters
from rlsync.megatron.offload import ActorMemory
from rlsync.megatron.parallel import compute_device, initialize_parallel
from rlsync.models.lora import B
from rlsync.plan.planner import build_plan
from rlsync.sync.config import LoraSync
from rlsync.transport.collectives import Exchange, gather_bytes

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Bucket:
    """Whole HF tensors in one piece of memory (1-D uint8)."""

    memory: torch.Tensor
    rows: tuple[Row, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(views(self.memory, self.rows))


class Actor:
    """The model of this rank. Everything here is collective over the actor ranks unless it says otherwise.

    Attributes:
        turned: whether the weights are the negatives of those it began with; those of each adapter's B where there are adapters.
        sources: by what engines get; of an actor without adapters the merged one alone.
    """

    def __init__(self, spec: Spec) -> None:
        # Ranks wait here for rank 0, which waits for engines to start.
        initialize_parallel(spec.topology, seed=spec.seed, timeout_s=spec.start_s)
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), compute_device()
        # As the actor ranks of a run do.
        compile_ahead(self.device)
        bridge = AutoBridge.from_config(spec.config)
        # Gradients are not looked at, and take as little as they can.
        ddp = DdpOptions(use_distributed_optimizer=True, grad_reduce_in_fp32=False)
        self._models = bridge.get_model(ddp=ddp, bf16=True, spec=spec.layers, lora=spec.lora)
        self._bridge, self.source = bridge, MegatronSource(bridge, self._models)
        self.sources: dict[LoraSync, MegatronSource] = {"merged": self.source}
        self._turning: list[torch.Tensor] = [parameter for *_, parameter in iter_parameters(self._models)]
        if spec.lora is not None:
            self.sources["adapter"] = MegatronSource(bridge, self._models, lora="adapter")
            self._turning = _drawn_b(self.sources["adapter"])
        self._memory = ActorMemory(self._models)
        self.turned = False
        self._gather: Exchange | None = None
        self._plan = build_plan(
            self.source.tensors,
            self.source.placements,
            [whole_tensors("whole", self.source.tensors)],
            bucket_bytes=spec.peer_bucket_bytes,
        )

    def turn(self) -> None:
        """Other weights: each the negative of what it was, so that turning twice gives the first ones back bit for bit."""
        with torch.no_grad():
            for tensor in self._turning:
                tensor.data.neg_()
        self.turned = not self.turned
        self.settle()

    def move(self) -> None:
        """Move the weights to other memory, as a step for which they are offloaded does."""
        self._memory.offload("weights")
        self._memory.onload("weights")
        self.settle()

    def save_adapter(self, folder: Path) -> None:
        """In PEFT's form."""
        self._bridge.save_adapter(self._models, folder)

    def settle(self) -> None:
        """All ranks, and what they gave their GPUs to do."""
        synchronize(self.device)
        dist.barrier()

    def share(self, value: Any) -> list[Any]:
        """The JSON-able value of every rank."""
        return [json.loads(said) for said in self.share_bytes(json.dumps(value).encode())]

    def share_bytes(self, value: bytes) -> list[bytes]:
        return gather_bytes(value, device=self.device)

    def memory(self, begin: bool) -> int:
        """This rank's memory, as ``PeerWorker.bench_memory`` has a worker's. Not collective."""
        return allocated_bytes(self.device, begin) if self.device.type == "cuda" else 0

    def rows(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of every HF tensor in the order of ``buckets``. Not collective."""
        return [(t.name, t.dtype, list(t.shape)) for bucket in self._plan.buckets for t in bucket.tensors]

    def buckets(self) -> Iterator[Bucket]:
        """Every HF tensor whole, on every rank, a bucket at a time. The plan is made once, which trainers that gather do not do."""
        if self._gather is None:
            self._gather = Exchange(self._plan, self.source.buffers, device=self.device)
        for index, planned in enumerate(self._plan.buckets):
            offset, rows = 0, []
            for tensor in planned.tensors:
                rows.append((tensor.name, tensor.dtype, list(tensor.shape), offset))
                offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            bucket = Bucket(torch.empty(offset, dtype=torch.uint8, device=self.device), tuple(rows))
            self._gather.deliver(index, [bucket.tensors()])
            yield bucket

    def room_for_all(self) -> bool:
        """Whether every rank has memory for the whole model beside its own part."""
        if self.device.type != "cuda":
            return True
        free = min(self.share(torch.cuda.mem_get_info(self.device)[0]))
        return bool(free > 1.2 * sum(t.nbytes for t in self.source.tensors) + 4 * 2**30)


@torch.no_grad()
def _drawn_b(source: MegatronSource) -> list[torch.Tensor]:
    """Parameters of this rank that hold a B, which begin at zero, with random numbers: the same on ranks that hold the same."""
    names = sorted({piece.buffer for piece in source.placements[source.rank].pieces if piece.tensor.endswith(B)})
    for name in names:
        tensor = source.buffers[name].data
        generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        tensor.normal_(std=0.02, generator=generator)
    return [source.buffers[name] for name in names]


def synchronize(device: torch.device) -> None:
    """Wait for what the GPU has been given to do; nothing on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds by phase, of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begin_s = self._last_s = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as this phase."""
        now_s = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now_s - self._last_s
        self._last_s = now_s

    def stop(self) -> Mapping[str, float]:
        self.seconds["whole"] = time.perf_counter() - self._begin_s
        return self.seconds
