"""Who owns an engine, so that its processes end when that process does, however it ends. Knows processes; imports no vLLM.

vLLM's engine core outlives a parent that was killed, and keeps its memory and its workers for ever.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

from rlsync.coordinator.client import pid_domain

_VARIABLE = "RLSYNC_ENGINE_OWNER"
_THREAD = "rlsync-owner"
_POLL_S = 1.0
_GRACE_S = 5.0


def declare() -> None:
    """Make this process the owner of the engines that it starts from now on."""
    os.environ[_VARIABLE] = f"{os.getpid()}@{pid_domain()}"


def watch() -> None:
    """End this process when its owner has ended. Idempotent; nothing without an owner, in the owner, and on another host."""
    pid, _, domain = os.environ.get(_VARIABLE, "").partition("@")
    if domain != pid_domain() or int(pid) == os.getpid() or any(t.name == _THREAD for t in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(int(pid),), name=_THREAD, daemon=True).start()


def _watch(pid: int) -> None:
    try:
        owner = psutil.Process(pid)
        # A pid that is used again is another process to psutil.
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        pass
    # First so that vLLM removes its shared memory, then whatever it waits for.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
