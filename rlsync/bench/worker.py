"""What ``rlsync bench`` adds to a vLLM worker: other ways to take weights, and a look at what it holds and used.

A ``worker_extension_cls``, so that all ways are measured on the same engines. No sync uses it. Imports no vLLM until it is called.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore

# (name, dtype, shape, offset in bytes) of a tensor in a bucket.
Row = Sequence[Any]


def join_group(store: Store, rank: int, size: int, timeout_s: float, *, on_gpu: bool) -> Any:
    """A process group of the actor's rank 0 and all engine workers, beside the default groups. Collective over its members."""
    room, limit = PrefixStore("gather-broadcast", store), timedelta(seconds=timeout_s)
    if on_gpu:
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = limit
        return torch.distributed.ProcessGroupNCCL(room, rank, size, options)
    return torch.distributed.ProcessGroupGloo(room, rank, size, limit)


def broadcast(group: Any, tensor: torch.Tensor) -> Any:
    """Begin to broadcast a tensor of member 0; returns its work handle."""
    options = torch.distributed.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def leave_group(group: Any) -> None:
    """Abort this process's part of a group, or nothing for None. Does not wait for other members."""
    # Not there in a build without NCCL; gloo's ends with its last reference.
    nccl: Any = getattr(torch.distributed, "ProcessGroupNCCL", None)
    if nccl is not None and isinstance(group, nccl):
        group.abort()


class PeerWorker:
    """Methods that vLLM mixes into its worker. Each begins with ``bench_``, as vLLM refuses names that a worker has."""

    bench_group: Any = None
    bench_own: Any = None
    weight_transfer_engine: Any
    device: Any
    rank: int
    model_runner: Any
    vllm_config: Any

    def bench_model(self) -> Any:
        return self.model_runner.get_model()

    # gather-broadcast.

    def bench_join(self, host: str, port: int, rank_offset: int, size: int, timeout_s: float) -> None:
        store = TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
        self.bench_group = join_group(store, rank_offset + self.rank, size, timeout_s, on_gpu=self.bench_on_gpu())

    def bench_leave(self) -> None:
        leave_group(self.bench_group)
        self.bench_group = None

    def bench_on_gpu(self) -> bool:
        return bool(self.device.type == "cuda")

    def bench_begin(self) -> None:
        """vLLM's own loaders write into the live parameters on GPUs, as slime and verl use them; packed ones on CPU need a reload."""
        from rlsync.engine.compat import reload as compat_reload

        if not self.bench_on_gpu():
            compat_reload.begin_whole_reload(self.bench_model())

    def bench_take(self, rows: Sequence[Row]) -> None:
        """Receive one bucket, a broadcast for each tensor, and load it."""
        tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype), device=self.device) for name, dtype, shape, _ in rows}
        for work in [broadcast(self.bench_group, tensor) for tensor in tensors.values()]:
            work.wait()
        self._bench_load(tensors)

    def bench_open(self, handles: Mapping[str, bytes], rows: Sequence[Row]) -> None:
        """Load one bucket from memory of the actor rank on the same GPU; ``handles`` by GPU UUID."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(pickle.loads(handles[str(torch.cuda.get_device_properties(self.device).uuid)]))
        # The mapping has to be opened in this device's context, whatever number it has over there.
        arguments[6] = self.device.index
        self._bench_load(dict(views(rebuild_cuda_tensor(*arguments), rows)))

    def _bench_load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        from rlsync.engine.compat import reload as compat_reload

        compat_reload.load_weights(self.bench_model(), list(tensors.items()))
        if self.bench_on_gpu():
            torch.cuda.current_stream(self.device).synchronize()

    def bench_finish(self) -> None:
        from rlsync.engine.compat import engine as compat
        from rlsync.engine.compat import reload as compat_reload

        if not self.bench_on_gpu():
            with compat.config_scope(self.vllm_config):
                compat_reload.finish_whole_reload(self.bench_model(), self.vllm_config.model_config)

    # vLLM's own weight transfer.

    def bench_use(self, backend: str | None) -> None:
        """Put another of vLLM's weight-transfer engines in the place of rlsync's; None puts rlsync's back."""
        from rlsync.engine.compat import transfer

        former = transfer.replace_engine(self, backend, self.bench_own)
        self.bench_own = former if backend is not None else None

    # vllm-folder.

    def bench_load_adapter(self, folder: str, adapter_id: int) -> None:
        """vLLM's own way of a PEFT folder into a slot."""
        from rlsync.engine.compat import lora

        self.model_runner.add_lora(lora.request(adapter_id, str(adapter_id), folder))
        if self.bench_on_gpu():
            torch.cuda.current_stream(self.device).synchronize()

    # What it holds and used.

    def bench_let_go(self) -> None:
        """Leave the connection of the case before, so that its memory is not counted to the next one."""
        self.weight_transfer_engine.shutdown()

    def bench_fingerprint(self) -> str:
        """Hash of the weights: on CPU of all state that the model computes from; on a GPU of checksums of its tensors, which is quick.

        Of slots for adapters that of the newest one.
        """
        from rlsync.copy.checksum import checksums
        from rlsync.engine.compat import lora
        from rlsync.engine.state import state_hashes

        model = self.bench_model()
        if self.bench_on_gpu():
            tensors = dict([*model.named_parameters(), *model.named_buffers()])
            if (slot := lora.newest_slot(model)) is not None:
                tensors |= {name: tensor[slot] for name, tensor in lora.stacks(model).items() if tensor.ndim > 1}
            found: list[Any] = sorted(zip(tensors, checksums(list(tensors.values())), strict=True))
        else:
            found = sorted(state_hashes(model).items())
        return hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()

    def bench_memory(self, begin: bool) -> int:
        """Bytes that torch has allocated: now, after its cache was emptied (``begin``), or at most since then. 0 on CPU."""
        if not self.bench_on_gpu():
            return 0
        return allocated_bytes(self.device, begin)


def allocated_bytes(device: torch.device, begin: bool) -> int:
    """Bytes that torch has allocated on a CUDA device: now, after its cache was emptied (``begin``), or at most since then."""
    if begin:
        # What an earlier case left in the cache would hide what the next one takes.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return torch.cuda.max_memory_allocated(device)


def views(bucket: torch.Tensor, rows: Sequence[Row]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket (1-D uint8), by name."""
    for name, dtype, shape, offset in rows:
        kind = getattr(torch, dtype)
        nbytes = torch.Size(shape).numel() * kind.itemsize
        yield name, bucket[offset : offset + nbytes].view(kind).view(*shape)
