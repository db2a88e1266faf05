"""Which wire a group is made of, and on which memory it carries messages."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlsync.coordinator.assignments import GroupInfo
from rlsync.transport.boxes import Wire
from rlsync.transport.gloo import GlooWire
from rlsync.transport.nccl import NcclWire


def message_device(group: GroupInfo, device: torch.device | None) -> torch.device:
    """Where messages lie. ``device``: of this process, or None where it has none."""
    if group.transport == "gloo":
        return torch.device("cpu")
    assert device is not None, "nccl was planned for a process without a GPU"
    return device


def wire_maker(group: GroupInfo, timeout_s: float, device: torch.device | None) -> Callable[[int], Wire]:
    """Makes the wire of a group of a given number. ``timeout_s``: of the phases."""
    if group.transport == "gloo":
        return lambda number: GlooWire(group, number, timeout_s)
    return lambda number: NcclWire(group, number, timeout_s, message_device(group, device))
