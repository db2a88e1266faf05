"""``rlsync bench --train --profile``: what a GPU does in one step, by kinds of kernels, and how long it does nothing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import torch

# A kernel is of the first kind whose expression is found in its name.
_KINDS: Mapping[str, re.Pattern[str]] = {
    kind: re.compile(pattern, re.IGNORECASE)
    for kind, pattern in {
        "communication": "nccl",
        "attention": "flash|fmha|sdpa|attention|_attn",
        "matrix products": "gemm|nvjet|cutlass|xmma|cublas|splitk",
        "copies": "memcpy|memset",
    }.items()
}
_OTHERS = "others"
KINDS = (*_KINDS, _OTHERS)
_NAMED = 25
# Of a span on the device: its name, and where it begins and ends in microseconds.
Span = tuple[str, float, float]


class Kernel(msgspec.Struct, frozen=True):
    """Launches of one kernel, and the seconds of all of them."""

    name: str
    launches: int
    seconds: float


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one rank, which waits for its GPU behind the passes over microbatches and is not profiled.

    Attributes:
        issued_s: until the host had given the GPU all passes; as long as ``passes_s`` where the GPU waits for the host.
        passes_s: until the GPU had done them.
        optimizer_s: from then to the end: what gradients are reduced and looked at for, and the optimizer.
    """

    issued_s: float
    passes_s: float
    optimizer_s: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One pass on one GPU.

    Attributes:
        seconds: from the beginning of its first kernel to the end of its last.
        busy_s: of that, with at least one kernel at work.
        exposed_communication_s: of that, with kernels of communication at work and no other.
        kinds: seconds of kernels by kind; those that run side by side count each.
        kernels: those that take most, first the longest.
    """

    seconds: float
    busy_s: float
    exposed_communication_s: float
    kinds: dict[str, float]
    kernels: list[Kernel]


def profiled(step: Callable[[], None]) -> Profile:
    """Profile ``step`` on this process's GPU, which it must have; a trace makes the host slower, and kernels hardly."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    cuda = torch.profiler.DeviceType.CUDA
    events = [event for event in profiler.events() if event.device_type == cuda and not event.is_user_annotation]
    return summary((event.name, event.time_range.start, event.time_range.end) for event in events)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), _OTHERS)


def summary(spans: Iterable[Span]) -> Profile:
    """Raises ValueError where nothing ran on the GPU."""
    found = sorted(spans, key=lambda span: span[1])
    if not found:
        raise ValueError("nothing ran on the GPU while it was profiled")
    kinds = dict.fromkeys(KINDS, 0.0)
    launches: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in found:
        kinds[kind_of(name)] += (end - begin) / 1e6
        launches[name].append((end - begin) / 1e6)
    busy = _covered(found)
    computing = _covered([span for span in found if kind_of(span[0]) != "communication"])
    kernels = [Kernel(name, len(each), sum(each)) for name, each in launches.items()]
    return Profile(
        seconds=(max(end for _, _, end in found) - found[0][1]) / 1e6,
        busy_s=busy,
        exposed_communication_s=busy - computing,
        kinds=kinds,
        kernels=sorted(kernels, key=lambda kernel: -kernel.seconds)[:_NAMED],
    )


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of them runs; they are in the order of their beginnings."""
    total, reached = 0.0, float("-inf")
    for _, begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e6
