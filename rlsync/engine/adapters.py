"""Low-rank adapters in one worker: where the factors of a version land, and the slot from which requests of that version compute.

A version lands beside the slots, in buffers that are the same in every sync, and is copied into a slot that no request uses once it is
verified. So a sync that fails takes nothing from requests in flight. Knows no channel and no bucket.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from rlsync.engine.compat import lora
from rlsync.errors import RlsyncError
from rlsync.layout.geometry import BufferSpec


class AdapterSlots:
    """The slots of a worker's model, over all connections.

    Attributes:
        staging: buffers that a sync writes, by the names of ``lora.stacks``; of the present connection.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._adapters: list[int | None] = [None] * len(lora.manager_of(model).lora_index_to_id)
        # How vLLM calls adapters that go by another number here.
        self._names: dict[int, int] = {}
        self._r = 0
        self._written: list[torch.Tensor] = []
        self._others: list[torch.Tensor] = []
        self._pending: tuple[int, int] | None = None
        self.staging: Mapping[str, torch.Tensor] = {}

    def connect(self, buffers: Sequence[BufferSpec], r: int) -> None:
        """Make room for a version: ``buffers`` of one slot, as they were recorded, of adapters of rank ``r``."""
        held = lora.stacks(self._model)
        self.staging = {buffer.name: torch.zeros_like(held[buffer.name][:1]) for buffer in buffers}
        self._r, self._pending = r, None
        self._written = [held[name] for name in self.staging]
        # Of layers that have no adapter: they add nothing.
        self._others = [tensor for name, tensor in held.items() if name not in self.staging]

    def fill(self, adapter_id: int, in_use: Collection[int]) -> None:
        """Copy what has landed into a slot, for adapter ``adapter_id``, a number greater than all before.

        ``in_use`` are adapters of requests in flight. It goes into an empty slot, or that of the oldest adapter: a request that was
        cancelled may be in the engine for a moment still. Raises RlsyncError where each slot has an adapter in use.
        """
        free = [slot for slot, adapter in enumerate(self._adapters) if adapter is None or adapter not in in_use]
        if not free:
            raise RlsyncError(
                f"all {len(self._adapters)} slots hold adapters of requests that still run ({', '.join(map(str, self._adapters))}); "
                "start the engine with more max_loras, or sync with pause_mode abort"
            )
        slot = min(free, key=lambda free_slot: self._adapters[free_slot] or 0)
        former, self._adapters[slot] = self._adapters[slot], None
        if former is not None:
            lora.forget(self._model, self._names.pop(former, former))
        torch._foreach_copy_([tensor[slot : slot + 1] for tensor in self._written], list(self.staging.values()))
        if self._others:
            # Each time: sleep may have left anything there.
            torch._foreach_zero_([tensor[slot : slot + 1] for tensor in self._others])
        self._pending = slot, adapter_id

    def commit(self) -> None:
        """Let requests run on what was filled last."""
        assert self._pending is not None, "commit follows fill"
        slot, adapter_id = self._pending
        self._adapters[slot], self._pending = adapter_id, None
        self.register()

    def rename(self, adapter_id: int, name: int) -> None:
        """Have vLLM call adapter ``adapter_id`` by the number ``name``. Raises RlsyncError where no slot has it."""
        if adapter_id not in self._adapters:
            raise RlsyncError(f"no slot holds adapter {adapter_id}; there are {', '.join(map(str, self._adapters))}")
        lora.forget(self._model, self._names.get(adapter_id, adapter_id))
        self._names[adapter_id] = name
        self.register()

    def register(self) -> None:
        """Tell vLLM of all slots; again where it has forgotten them, as it does at the end of every update of weights. Idempotent."""
        lora.register(self._model, [None if held is None else self._names.get(held, held) for held in self._adapters], self._r)
