"""Prints what Megatron-Core supports here. Run by ``probes``."""

from __future__ import annotations

import json

from rlsync.megatron.support import supported

if __name__ == "__main__":
    print(json.dumps(supported()))
