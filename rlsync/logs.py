"""Where rlsync's messages go when somebody wants to see them: one variable for actor ranks, engine workers and commands alike."""

from __future__ import annotations

import logging
import os
import sys
from datetime import datetime

from rlsync.errors import ConfigError

VARIABLE = "RLSYNC_LOGGING_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def set_up(default: str | None = None) -> None:
    """Print messages of the level that the variable names, and above, to stderr; each with time, process and thread.

    Times are those of the host's clock to the microsecond, so that the lines of all its processes can be put in order. Without the
    variable it is ``default``, for this process and those that it starts; where that is None too, logging stays as it is. Idempotent.

    Raises ConfigError for a level that is none.
    """
    level = os.environ.get(VARIABLE) or default
    if level is None:
        return
    if level not in LEVELS:
        raise ConfigError(f"RLSYNC_LOGGING_LEVEL is {level!r}; known are {', '.join(LEVELS)}")
    os.environ[VARIABLE] = level
    logger = logging.getLogger("rlsync")
    logger.setLevel(level)
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.addHandler(_Handler())
        # Or those who have a handler of their own would have everything twice.
        logger.propagate = False


class _Handler(logging.StreamHandler):
    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(process)d %(threadName)s %(name)s: %(message)s"))


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created).strftime("%m-%d %H:%M:%S.%f")
