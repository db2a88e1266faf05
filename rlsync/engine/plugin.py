"""Entry point that vLLM calls in each of its processes (group ``vllm.general_plugins``). Imports nothing heavy."""

from __future__ import annotations

BACKEND = "rlsync"


def register() -> None:
    """Make ``weight_transfer_config={"backend": "rlsync"}`` known to this process, let it end with its owner and say what it was told to.

    Idempotent.

    The receiver is composed in ``rlsync.sync.receiver``, which knows engine and transport; vLLM imports it when a model is loaded.
    """
    from rlsync import logs
    from rlsync.engine import owner
    from rlsync.engine.compat import register_backend

    logs.set_up()
    owner.watch()
    register_backend(BACKEND, "rlsync.sync.receiver", "make_receiver")
