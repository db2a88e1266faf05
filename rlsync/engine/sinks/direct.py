"""Buffers that are written where the engine computes with them. Owns no memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlsync.engine.sinks.choice import owner


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor; parameters of vLLM are subclasses that follow their views."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()


class DirectBuffers:
    """Live parameters and buffers by name, looked up each time: the engine may have been put to sleep in between."""

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        self._owners = {name: owner(model, name) for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def __getitem__(self, name: str) -> torch.Tensor:
        module, attribute = self._owners[name]
        return plain(getattr(module, attribute))
