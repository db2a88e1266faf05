"""A process of a bench: ``python -m rlsync.bench.member MODULE ARGUMENT...`` runs that module.

It ends with whoever started it from its beginning on, because what the modules import takes seconds. Imports nothing heavy itself.
"""

from __future__ import annotations

import runpy
import sys

from rlsync.engine.plugin import watch_owner

if __name__ == "__main__":
    watch_owner()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
