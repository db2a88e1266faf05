"""How soon a main thread that waits for a lock hears SIGTERM, in a process of its own. Owns no test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WAIT_S = 3.0
_SCRIPT = """
import ctypes, os, signal, threading, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(time.monotonic()))
{before}
killed = []
def kill():
    killed.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGTERM)
lock = threading.Lock()
lock.acquire()
threading.Timer(0.2, kill).start()
threading.Timer({wait_s}, lock.release).start()
lock.acquire()
print("HEARD", heard[0] - killed[0])
"""


def seconds_until_heard(before: str) -> float:
    """From the signal to its handler, which comes after ``WAIT_S`` at the latest; ``before`` is run first."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", _SCRIPT.format(before=before, wait_s=WAIT_S)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.rsplit("HEARD ", 1)[1])
