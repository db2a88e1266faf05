"""``python -m rlsync.cli``: the command line where the console script is not installed."""

from __future__ import annotations

import sys

from rlsync.cli import main

sys.exit(main())
