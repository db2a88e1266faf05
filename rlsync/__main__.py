"""``python -m rlsync``: the command line where the console script is not installed."""

from __future__ import annotations

import sys

from rlsync.cli import main

if __name__ == "__main__":
    sys.exit(main())
