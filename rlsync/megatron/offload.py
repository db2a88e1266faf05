"""Which memory of an actor rank lies on its device: weights, gradients and optimizer state move to the host and back.

Whole storages move, so that every view of them (parameters in DDP's buffers, buckets, shards) stays what it is; only
addresses change. Must not know engines, syncs or when it is time to move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

from rlsync.copy.writes import HostMemory
from rlsync.errors import RlsyncError
from rlsync.megatron.model import gather_parameters
from rlsync.megatron.parallel import compute_device

Part = Literal["weights", "grads", "optimizer"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, slots=True)
class _Away:
    """A storage without memory, its size, and where the host holds its bytes; None for bytes that nobody needs."""

    storage: torch.UntypedStorage
    nbytes: int
    offset: int | None


class ActorMemory:
    """Moves the memory of one rank's model chunks and of their optimizer. Everything is resident at first.

    Host memory is pinned where there is CUDA, taken at a part's first ``offload``, and kept.

    Args:
        models: chunks of this rank, wrapped in Megatron's DistributedDataParallel where they have gradients.
        optimizer: of these chunks, from ``build_optimizer``; None as long as there is none.
    """

    def __init__(self, models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None = None) -> None:
        self._models, self._optimizer = models, optimizer
        self._away: dict[Part, tuple[_Away, ...]] = {}
        self._host = {part: HostMemory() for part in PARTS}

    def is_resident(self, part: Part) -> bool:
        """Whether a part is where it can be used."""
        return part not in self._away

    def offload(self, *parts: Part) -> int:
        """Move these parts to the host; what is there already stays. Returns the bytes of device memory given back.

        They are given back to the device, for other processes, and not kept in torch's cache. Gradients are dropped and not
        copied: they are zero after ``onload``. Collective over the DP group where weights go, which are gathered before.
        """
        going = [part for part in PARTS if part in parts and self.is_resident(part)]
        if "weights" in going:
            gather_parameters(self._models)
        if "grads" in going and self._optimizer is not None:
            self._optimizer.zero_grad()  # main gradients are copies of what goes, or views of it
        found = {part: self._copied(part) for part in going}
        if going and compute_device().type == "cuda":
            # Another process gets the memory next: copies, and whatever else uses it on any stream, must have ended.
            torch.cuda.synchronize()
        self._away.update(found)
        for away in (away for part in going for away in found[part]):
            away.storage.resize_(0)
        if going and compute_device().type == "cuda":
            torch.cuda.empty_cache()  # else the engine on this GPU would not get it
        return sum(away.nbytes for part in going for away in found[part])

    def onload(self, *parts: Part) -> int:
        """Move these parts to the device again, to other addresses; what is there already stays. Not collective.

        Returns the bytes of device memory taken. Raises RlsyncError, with everything as before, where there is no room for them.
        """
        coming = [part for part in PARTS if part in parts and not self.is_resident(part)]
        taken: list[_Away] = []
        try:
            for away in (away for part in coming for away in self._away[part]):
                away.storage.resize_(away.nbytes)
                taken.append(away)
        except torch.OutOfMemoryError as error:
            for away in taken:
                away.storage.resize_(0)
            raise RlsyncError(
                f"no room on the device for the actor's {' and '.join(coming)}, {_gib(self._away, coming):.2f} GiB: {error}; is the "
                "engine on this device asleep? Lower rollout.gpu_memory_utilization where it is not meant to sleep"
            ) from error
        for part in coming:
            for away in self._away.pop(part):
                if away.offset is None:
                    _bytes_of(away.storage).zero_()
                else:
                    self._host[part].read(away.offset, _bytes_of(away.storage))
        if coming and compute_device().type == "cuda":
            torch.cuda.synchronize()  # engines may read weights from here on, which no stream of theirs waits for
        return sum(away.nbytes for away in taken)

    def _copied(self, part: Part) -> tuple[_Away, ...]:
        """The part's storages, their bytes on the way to the host."""
        if part == "grads":
            return tuple(_Away(storage, storage.nbytes(), None) for storage in _storages(_gradients(self._models)))
        storages = _storages(p for model in self._models for p in model.parameters())
        if part == "optimizer" and self._optimizer is None:
            return ()
        if part == "optimizer":
            # Main parameters of a fp32 model are views of the model's own.
            others = {s.data_ptr() for s in (*storages, *_storages(_gradients(self._models)))}
            assert self._optimizer is not None
            storages = [s for s in _storages(_optimizer_tensors(self._optimizer)) if s.data_ptr() not in others]
        _check_movable(part, storages)
        found, offset = [], 0
        for storage in storages:
            self._host[part].write(offset, _bytes_of(storage))
            found.append(_Away(storage, storage.nbytes(), offset))
            offset += storage.nbytes()
        return tuple(found)


def _gradients(models: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    for model in models:
        if isinstance(model, DistributedDataParallel):
            yield from (buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers))


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Main parameters and state; what ``optimizer_cpu_offload`` keeps in the host is filtered out by its device."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for inner in (part.optimizer for part in parts if part.optimizer is not None):
        # The one that spreads over both devices has an optimizer for each.
        for each in (inner, *getattr(inner, "sub_optimizers", ())):
            yield from (p for group in each.param_groups for p in group["params"])
            yield from (value for state in each.state.values() for value in state.values() if isinstance(value, Tensor))


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage on this rank's device once, those without memory left out."""
    kind = compute_device().type
    found = (t.untyped_storage() for t in tensors if t.device.type == kind)
    return list({s.data_ptr(): s for s in found if s.nbytes()}.values())


def _check_movable(part: Part, storages: Iterable[torch.UntypedStorage]) -> None:
    fixed = sum(1 for storage in storages if not storage.resizable())
    if fixed:
        raise RlsyncError(
            f"{fixed} storages of the actor's {part} cannot be offloaded: others use their memory too (numpy(), shared memory)"
        )


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _gib(away: dict[Part, tuple[_Away, ...]], parts: Sequence[Any]) -> float:
    return sum(a.nbytes for part in parts for a in away[part]) / 2**30
