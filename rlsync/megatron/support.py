"""What Megatron-Core can do in this environment, for ``rlsync doctor``. Builds no model and no process group."""

from __future__ import annotations

from importlib.util import find_spec

import megatron.core

from rlsync.megatron.cpu import enable_cpu


def supported() -> dict[str, str | bool]:
    """``version``; ``on_cpu``: runs without CUDA; ``transformer_engine`` and ``apex``: are installed.

    Changes torch for the whole process, as ``enable_cpu`` does: ask in a process that ends. Raises where Megatron lacks what is
    substituted.
    """
    return {
        "version": megatron.core.__version__,
        "on_cpu": enable_cpu(),
        "transformer_engine": find_spec("transformer_engine") is not None,
        "apex": find_spec("apex") is not None,
    }
