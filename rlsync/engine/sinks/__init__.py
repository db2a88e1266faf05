"""Destinations of a bucket's bytes inside a worker.

A sink has ``open``, ``write`` for each bucket in order, and ``close``; after an error ``abandon`` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from rlsync.transport.ends import Arrival


class Sink(Protocol):
    """Called by the transfer engine of a worker. Every call raises on failure; only ``abandon`` may follow then."""

    @property
    def peak_extra_bytes(self) -> int:
        """Peak memory of the sink itself, over all syncs so far."""
        ...

    @property
    def differences(self) -> Sequence[str]:
        """Paths of tensors that differ from the buckets, for a sink that compares; empty for one that writes."""
        ...

    def open(self, standing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Begin; the model holds no version until ``close`` returns.

        Args:
            standing: what the method of that name has given for this sync, by bucket, without those for which it gave None.
        """
        ...

    def standing(self, bucket: int) -> Mapping[str, torch.Tensor] | None:
        """The buffers that ``write`` will have this bucket land in, where they are the same in every sync; otherwise None."""
        ...

    def write(self, bucket: int, arrival: Arrival, landed: Callable[[Mapping[str, torch.Tensor]], None]) -> None:
        """Take in bucket ``bucket``. Buckets come in order.

        Calls ``landed`` when the bytes are in place, before anything else is made of them: with this bucket's buffers, contiguous
        and in checkpoint layout. Nothing refers to the arrival when it returns; the caller synchronises CUDA.
        """
        ...

    def close(self) -> None:
        """Complete everything derived from the weights. The model then holds the version."""
        ...

    def abandon(self) -> None:
        """After an error: end any reload in progress, so that the next ``open`` works."""
        ...


def owner(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a parameter or registered buffer, and its name there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor; parameters of vLLM are subclasses that follow their views."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach()
