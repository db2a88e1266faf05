"""One thread for the connections of all gloo groups of a process, where torch has one for each group.

Such a thread looks for messages a hundred times a second. A rank of Megatron makes dozens of groups, a worker of vLLM a dozen, and on few
processors the looks of threads that have nothing to do take up to a quarter of their time.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo

# torch's own number for a group with one device.
_NUM_THREADS = 2


def share_gloo_device() -> None:
    """Have gloo groups that this process makes from now on share one device, and so one thread. Idempotent.

    Left alone are groups whose devices somebody chose, by options or by ``GLOO_SOCKET_IFNAME``.
    """
    plain = ProcessGroupGloo.__init__
    if hasattr(plain, "shares"):
        return

    @functools.wraps(plain)
    def init(self: Any, store: Any, rank: int, size: int, *given: Any, **named: Any) -> None:
        timeout = given[0] if given else named.get("timeout")
        if isinstance(timeout, timedelta) and not os.environ.get("GLOO_SOCKET_IFNAME"):
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout, options._devices, options._threads = timeout, [_device(os.getpid())], _NUM_THREADS
            given, named = (options,), {}
        plain(self, store, rank, size, *given, **named)

    init.shares = True  # type: ignore[attr-defined]
    ProcessGroupGloo.__init__ = init  # type: ignore[method-assign]


@functools.cache
def _device(pid: int) -> Any:
    """Of this process: threads stay behind when it forks."""
    return ProcessGroupGloo.create_default_device()
