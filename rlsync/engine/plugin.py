"""Entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``). Imports nothing heavy."""

from __future__ import annotations

BACKEND = "rlsync"


def register() -> None:
    """Make ``weight_transfer_config={"backend": "rlsync"}`` known to this process, let it end with its owner and say what it was told to.

    Idempotent.

    vLLM imports ``rlsync.engine.worker`` when a model is loaded.
    """
    from rlsync import logs
    from rlsync.engine import owner
    from rlsync.engine.compat import register_backend

    logs.set_up()
    owner.watch()
    register_backend(BACKEND, "rlsync.engine.worker", "RlsyncTransferEngine")
