"""All that an engine's processes import. Imported once, by the process that they are forked from; it has no threads and starts none."""

from __future__ import annotations

import multiprocessing

import setproctitle
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401
from vllm.v1.executor import multiproc_executor

# Of an engine's core, for its workers.
multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
# The first call finds where a title has room, which is beside the environment as long as that is what the process began with.
setproctitle.getproctitle()
