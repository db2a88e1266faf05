"""Ctrl-C and SIGTERM stay heard where the CUDA runtime compiler has run. Knows no CUDA."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def heard_afterwards() -> Iterator[None]:
    """Handlers of SIGINT and SIGTERM that are Python's go on to interrupt what the main thread waits for. In any thread.

    NVRTC takes these two signals while it compiles and gives them back through ``signal(3)``, which sets ``SA_RESTART``. The system then
    resumes what the main thread waits for, a lock for instance, and Python does not come to run its handler before that wait is over:
    Ctrl-C does nothing, and an idle engine core has to be killed in the end. Found with NVRTC 13.0 by the flags of ``sigaction(2)``
    before and after ``nvrtcCompileProgram``.
    """
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                signal.siginterrupt(number, True)
