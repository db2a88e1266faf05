"""Prints what the installed vLLM supports, after loading its plug-ins as a worker would. Run by ``probes``."""

from __future__ import annotations

import json

from rlsync.engine.compat.engine import supported
from rlsync.engine.plugin import BACKEND
from rlsync.engine.worker import RlsyncTransferEngine

if __name__ == "__main__":
    assert callable(RlsyncTransferEngine)
    print(json.dumps(supported(BACKEND)))
