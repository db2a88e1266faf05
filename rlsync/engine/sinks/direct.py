"""Buffers that are written where the engine computes with them. Owns no memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from rlsync.engine.sinks.choice import owner


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor; parameters of vLLM are subclasses that follow their views."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()


class DirectBuffers:
    """Live parameters and buffers by name, looked at each time: the engine may have got others in between."""

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        self._owners = {name: owner(model, name) for name in names}
        self._known: dict[tuple[str, ...], _Group] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def __getitem__(self, name: str) -> torch.Tensor:
        module, attribute = self._owners[name]
        return plain(getattr(module, attribute))

    def group(self, names: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
        """Several at once. Costs next to nothing where they are the tensors that they were the last time, at the same addresses."""
        known = self._known.get(names)
        if known is None or not known.is_current():
            owners = [self._owners[name] for name in names]
            live = tuple((module, attribute, getattr(module, attribute)) for module, attribute in owners)
            known = _Group({name: self[name] for name in names}, live, tuple(tensor.data_ptr() for _, _, tensor in live))
            self._known[names] = known
        return known.buffers


@dataclass(frozen=True, slots=True)
class _Group:
    """Buffers as ordinary tensors, and the live ones with their modules, attributes and addresses."""

    buffers: Mapping[str, torch.Tensor]
    live: tuple[tuple[torch.nn.Module, str, torch.Tensor], ...]
    addresses: tuple[int, ...]

    def is_current(self) -> bool:
        return all(
            # Most are parameters, and getattr would look for them in three tables.
            (module._parameters.get(attribute, tensor) is tensor and module._buffers.get(attribute, tensor) is tensor)
            and tensor.data_ptr() == address
            for (module, attribute, tensor), address in zip(self.live, self.addresses, strict=True)
        )
