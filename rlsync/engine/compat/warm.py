"""Imports all that processes of an engine do, once, in the process that they are forked from; it has no threads and starts none."""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module

import setproctitle

from rlsync.gc_pause import gc_paused

# vLLM imports Ray where it can, for engines that spread over its nodes, and Ray reads from the environment whose worker it is when it is
# imported. Such engines are not forked from here; Ray's own workers may be.
has_ray = "ray" in sys.modules
if not has_ray:
    sys.modules["ray"] = None  # type: ignore[assignment]
with gc_paused(collect_after=False):
    for name in ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
        import_module(name)
    import_module("rlsync.engine.compat.engine").override_kernels_ahead()
if not has_ray:
    del sys.modules["ray"]
if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    # Nothing is lost with that process; taking apart what it imported takes a second. Those that are forked from it do not come by here.
    atexit.register(os._exit, 0)
# The first call finds where a title has room, which is beside the environment as long as that is what the process began with.
setproctitle.getproctitle()
