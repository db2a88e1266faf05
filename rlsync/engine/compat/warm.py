"""Imports all that processes of an engine do, once, in the process that they are forked from; it has no threads and starts none."""

from __future__ import annotations

from importlib import import_module

import setproctitle

from rlsync.engine.forking import imports_without_collection

with imports_without_collection():
    for name in ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
        import_module(name)
# The first call finds where a title has room, which is beside the environment as long as that is what the process began with.
setproctitle.getproctitle()
