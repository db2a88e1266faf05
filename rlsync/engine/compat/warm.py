"""All that processes of an engine import. Imported once, by the process that they are forked from; it has no threads and starts none."""

from __future__ import annotations

import setproctitle
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401

# The first call finds where a title has room, which is beside the environment as long as that is what the process began with.
setproctitle.getproctitle()
