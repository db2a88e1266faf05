"""How others sync, on the same shards and the same engines: gather whole tensors, then hand them to vLLM's own loaders.

Every class here is collective over the actor ranks; rank 0 holds the engines.
"""

from __future__ import annotations

import pickle
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from rlsync.bench.actor import Actor, Bucket, Clock, synchronize
from rlsync.bench.remote import RemoteEngine
from rlsync.bench.spec import Spec
from rlsync.bench.worker import broadcast, join_group, leave_group
from rlsync.transport.rendezvous import Rendezvous

_HOST = "127.0.0.1"
_PACKED_BYTES = 2**30


class Way(Protocol):
    """One of the peers. ``settling``: steps that it takes until it is as fast as it gets, beside those of the warm-up."""

    remark: str
    settling: int

    def connect(self) -> None: ...

    def transfer(self, clock: Clock) -> None:
        """Give paused engines the actor's present weights; the clock hears of ``gather`` and ``data``."""
        ...

    def close(self) -> None: ...


class Fleet:
    """All engines at once: each call goes to every engine, side by side. Empty on ranks other than 0, where nothing is called."""

    def __init__(self, engines: Sequence[RemoteEngine], timeout_s: float) -> None:
        self.engines, self._timeout_s = tuple(engines), timeout_s
        self._pool = ThreadPoolExecutor(max(1, len(engines)), "bench-engines")

    @property
    def num_workers(self) -> int:
        return sum(engine.num_workers for engine in self.engines)

    def begin(self, method: str, *arguments: Any) -> list[Future[list[Any]]]:
        """Call a method of all workers; wait with ``end``."""
        return [self._pool.submit(e.call_workers, method, arguments, self._timeout_s) for e in self.engines]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker. Returns the results, engines in order."""
        return self.end(self.begin(method, *arguments))

    def end(self, calls: Sequence[Future[list[Any]]]) -> list[Any]:
        return list(chain.from_iterable(call.result() for call in calls))

    def join(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Future[list[Any]]]:
        """Call with arguments made of the number of workers in the engines before."""
        calls, offset = [], 0
        for engine in self.engines:
            calls.append(self._pool.submit(engine.call_workers, method, arguments(offset), self._timeout_s))
            offset += engine.num_workers
        return calls

    def each(self, call: Callable[[RemoteEngine], None]) -> None:
        for done in [self._pool.submit(call, engine) for engine in self.engines]:
            done.result()


class GatherBroadcast:
    """As slime and verl do: gather a bucket of whole tensors, broadcast each of them to all workers, let vLLM load them.

    Collocated on GPUs the bucket is handed over by CUDA IPC instead, because NCCL takes no two ranks on one GPU.
    """

    settling = 0

    def __init__(self, actor: Actor, fleet: Fleet, spec: Spec) -> None:
        self._actor, self._fleet, self._timeout_s = actor, fleet, spec.timeout_s
        self._shared = spec.on_gpu and spec.placement == "collocated"
        self._group: Any = None
        self._rendezvous: Rendezvous | None = None
        self.remark = "by CUDA IPC" if self._shared else f"by {'NCCL' if spec.on_gpu else 'gloo'}"

    def connect(self) -> None:
        if self._shared or self._actor.rank != 0:
            return
        size = 1 + self._fleet.num_workers
        met = self._rendezvous = Rendezvous(_HOST, self._timeout_s)
        joining = self._fleet.join("bench_join", lambda offset: (_HOST, met.port, 1 + offset, size, self._timeout_s))
        self._group = join_group(met.store, 0, size, self._timeout_s, on_gpu=self._actor.device.type == "cuda")
        self._fleet.end(joining)

    def transfer(self, clock: Clock) -> None:
        self._fleet.call("bench_begin")
        clock.lap("data")
        for bucket in self._actor.buckets():
            synchronize(self._actor.device)
            clock.lap("gather")
            (self._hand_over if self._shared else self._broadcast)(bucket)
            clock.lap("data")
        self._fleet.call("bench_finish")
        clock.lap("data")

    def _broadcast(self, bucket: Bucket) -> None:
        if self._actor.rank != 0:
            return
        taking = self._fleet.begin("bench_take", bucket.rows)
        for work in [broadcast(self._group, tensor) for tensor in bucket.tensors().values()]:
            work.wait()
        self._fleet.end(taking)

    def _hand_over(self, bucket: Bucket) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(self._actor.device).uuid)
        said = self._actor.share_bytes(uuid.encode() + b" " + pickle.dumps(reduce_tensor(bucket.memory)[1]))
        handles = {uuid.decode(): handle for uuid, _, handle in (row.partition(b" ") for row in said)}
        self._fleet.call("bench_open", handles, bucket.rows)
        # No rank lets go of its memory before every worker has read it.
        self._actor.settle()
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self._fleet.call("bench_leave")
        leave_group(self._group)
        self._group = self._rendezvous = None


class _Vllm:
    """What vLLM's two backends have in common: the actor's gather before, which vLLM leaves to the trainer."""

    backend: str
    settling = 0

    def __init__(self, actor: Actor, fleet: Fleet, spec: Spec) -> None:
        self._actor, self._fleet = actor, fleet
        self._held = actor.room_for_all()
        self.remark = "packed" if self._held else "packed; not enough memory for the whole model, so gather runs inside data"

    def named(self, clock: Clock, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors: all of them at hand, or gathered as they are asked for. ``keep``: this rank hands them on."""
        if not self._held:
            return chain.from_iterable(list(bucket.tensors().items()) if keep else [] for bucket in self._actor.buckets())
        whole = [list(bucket.tensors().items()) if keep else [] for bucket in self._actor.buckets()]
        synchronize(self._actor.device)
        clock.lap("gather")
        return chain.from_iterable(whole)

    def close(self) -> None:
        self._fleet.call("bench_use", None)


class VllmNccl(_Vllm):
    """vLLM's ``nccl`` backend, packed.

    Each of its transfers takes two new streams of torch's 32, and torch keeps memory by stream: until all have been taken it allocates.
    """

    settling = 16

    def connect(self) -> None:
        from rlsync.engine.compat import transfer

        if self._actor.rank != 0:
            return
        size, port = 1 + self._fleet.num_workers, _free_port()
        self._fleet.call("bench_use", "nccl")
        joining = self._fleet.join("init_weight_transfer_engine", lambda offset: (transfer.nccl_init_info(_HOST, port, 1 + offset, size),))
        self._group = transfer.nccl_trainer_group(_HOST, port, size)
        self._fleet.end(joining)

    def transfer(self, clock: Clock) -> None:
        from rlsync.engine.compat import transfer

        named = self.named(clock, keep=self._actor.rank == 0)
        if self._actor.rank != 0:
            list(named)
            return
        self._fleet.call("start_weight_update")
        taking = self._fleet.begin("update_weights", transfer.nccl_update_info(self._actor.rows()))
        transfer.nccl_send(named, self._group)
        self._fleet.end(taking)
        self._fleet.call("finish_weight_update")
        clock.lap("data")


class VllmIpc(_Vllm):
    """vLLM's ``ipc`` backend, packed."""

    def connect(self) -> None:
        self._fleet.call("bench_use", "ipc")
        self._fleet.call("init_weight_transfer_engine", {})
        self._buffer_bytes = max(_PACKED_BYTES, *(t.nbytes for t in self._actor.source.tensors))

    def transfer(self, clock: Clock) -> None:
        from rlsync.engine.compat import transfer

        named = self.named(clock, keep=True)
        self._fleet.call("start_weight_update")
        transfer.ipc_send(named, self._buffer_bytes, lambda told: self._fleet.call("update_weights", told))
        self._fleet.call("finish_weight_update")
        clock.lap("data")


class VllmFolder:
    """Adapters as vLLM takes them without a sync: the actor writes PEFT's folder into memory, and vLLM reads it under a new number."""

    settling = 0

    def __init__(self, actor: Actor, fleet: Fleet, spec: Spec) -> None:
        self._actor, self._fleet = actor, fleet
        self._folder = Path("/dev/shm", f"rlsync-bench-{spec.token[:12]}")
        # Above those of any sync.
        self._number = 10**6
        self.remark = f"through {self._folder.parent}"

    def connect(self) -> None:
        """Nothing: the first transfer makes the folder."""

    def transfer(self, clock: Clock) -> None:
        self._actor.save_adapter(self._folder)
        clock.lap("gather")
        self._number += 1
        self._fleet.call("bench_load_adapter", str(self._folder), self._number)
        clock.lap("data")

    def close(self) -> None:
        if self._actor.rank == 0:
            shutil.rmtree(self._folder)


WAYS: dict[str, Callable[[Actor, Fleet, Spec], Way]] = {
    "gather-broadcast": GatherBroadcast,
    "vllm-nccl": VllmNccl,
    "vllm-ipc": VllmIpc,
    "vllm-folder": VllmFolder,
}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])
