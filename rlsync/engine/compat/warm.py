"""Imports all that processes of an engine do, once, in the process that they are forked from; it has no threads and starts none."""

from __future__ import annotations

import gc
from importlib import import_module

import setproctitle

# Nothing of an import is garbage, and to look for some takes a sixth of the time.
gc.disable()
for name in ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
    import_module(name)
gc.enable()
# The first call finds where a title has room, which is beside the environment as long as that is what the process began with.
setproctitle.getproctitle()
