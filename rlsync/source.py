"""Source of a sync: HF-named buckets that actor ranks fill side by side, each with the pieces it owns.

Owns the bucket layout and the copy programs. Knows the shards of a bridge; knows no engine and no channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from rlsync.bridge import AutoBridge
from rlsync.control import BucketEntry
from rlsync.copy.cpu import CopyProgram, bind
from rlsync.geometry import TensorSpec
from rlsync.megatron.model import gather_parameters
from rlsync.placement.huggingface import whole_tensors
from rlsync.plan import build_plan

# Tensors of a bucket start at multiples of this many bytes: a cache line, and enough for any dtype and vector load.
TENSOR_ALIGNMENT = 64


class MegatronSource:
    """Buckets of full HF tensors in layer order, filled by all actor ranks without a gather.

    Each element is copied by the one rank that the plan chose, straight from its parameter into the slot; replicas share
    the work. The plan and its copy programs are built once.

    Attributes:
        buckets: entries of every bucket; the same on all ranks.
        digest: digest of the plan; ranks compare it at connect.
        nbytes: bytes of all buckets without padding.
    """

    def __init__(self, bridge: AutoBridge, models: Sequence[torch.nn.Module], *, bucket_bytes: int) -> None:
        """Plan the copies. Not collective, though every actor rank must call it with the same arguments."""
        shards = bridge.shards(models)
        self._models, self._shards, self._rank = models, shards, dist.get_rank()
        self._plan = build_plan(shards.tensors, shards.placements, [whole_tensors("buckets", shards.tensors)], bucket_bytes=bucket_bytes)
        self.buckets = tuple(_entries(bucket.tensors) for bucket in self._plan.buckets)
        self.digest = self._plan.digest
        self.nbytes = sum(t.nbytes for t in shards.tensors)
        self._programs: dict[tuple[int, int], CopyProgram] = {}

    def begin(self, version: int) -> None:
        """Make the parameters those after the last optimizer step. Collective over the data-parallel groups."""
        gather_parameters(self._models)

    def fill(self, bucket: int, slot: torch.Tensor) -> int:
        """Copy this rank's pieces of a bucket into ``slot`` (1-D uint8); returns the bytes copied.

        Programs are kept per slot address; the slots of a ring do not move.
        """
        key = (bucket, slot.data_ptr())
        if key not in self._programs:
            copies = [c for c in self._plan.buckets[bucket].copies if c.source == self._rank]
            self._programs[key] = bind(copies, self._shards.buffers, bucket_tensors(self.buckets[bucket], slot))
        return self._programs[key].run()


def bucket_tensors(entries: Sequence[BucketEntry], slot: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of a slot (1-D uint8) as the tensors that its entries describe."""
    views = {}
    for entry in entries:
        spec = TensorSpec(entry.name, entry.dtype, tuple(entry.shape))
        flat = slot[entry.offset_bytes : entry.offset_bytes + spec.nbytes].view(getattr(torch, entry.dtype))
        views[entry.name] = flat.view(spec.shape)
    return views


def _entries(tensors: Sequence[TensorSpec]) -> tuple[BucketEntry, ...]:
    entries, cursor = [], 0
    for tensor in tensors:
        entries.append(BucketEntry(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, offset_bytes=cursor))
        cursor += -(-tensor.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
    return tuple(entries)
