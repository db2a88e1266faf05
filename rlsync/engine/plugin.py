"""Entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``), and the owner with whom these end.

vLLM's engine core outlives a parent that was killed, and keeps its memory and its workers for ever. Imports no vLLM and nothing heavy.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import psutil

from rlsync.coordinator.client import pid_domain

BACKEND = "rlsync"
_OWNER_VARIABLE = "RLSYNC_ENGINE_OWNER"
_OWNER_THREAD = "rlsync-owner"
_POLL_S = 1.0
_GRACE_S = 5.0


def register() -> None:
    """Register the backend of ``weight_transfer_config={"backend": "rlsync"}``, set up logging, and end this process with its owner.

    Where engines on CPU are forked, cores fork their workers, those of ``vllm serve`` too. Idempotent. vLLM imports
    ``rlsync.engine.worker`` when a model is loaded.
    """
    from rlsync import logs
    from rlsync.engine import forking
    from rlsync.engine.compat import engine as compat
    from rlsync.transport.gloo_device import share_gloo_device

    logs.set_up()
    watch_owner()
    compat.register_backend(BACKEND, "rlsync.engine.worker", "RlsyncTransferEngine")
    if "vllm.v1.engine.core" in sys.modules:
        # An engine's core asks for its plug-ins when it is made; other processes have no use for the import.
        from rlsync.engine.compat import core

        core.add_update()
    if forking.is_asked_for() and compat.runs_on_cpu():
        compat.fork_workers()
        compat.sleep_between_looks()
        share_gloo_device()


def declare_owner() -> None:
    """Make this process the owner of the engines that it starts from now on."""
    os.environ[_OWNER_VARIABLE] = f"{os.getpid()}@{pid_domain()}"


def watch_owner() -> None:
    """End this process when its owner has ended. Idempotent; nothing without an owner, in the owner, and on another host."""
    pid, _, domain = os.environ.get(_OWNER_VARIABLE, "").partition("@")
    if domain != pid_domain() or int(pid) == os.getpid() or any(t.name == _OWNER_THREAD for t in threading.enumerate()):
        return
    threading.Thread(target=_watch, args=(int(pid),), name=_OWNER_THREAD, daemon=True).start()


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
