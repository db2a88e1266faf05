"""Whether a main thread that waits for a lock hears SIGTERM while it waits, in a process of its own. Owns no test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.deadlines import HANG_S

_SCRIPT = """
import ctypes, os, signal, threading, time
lock = threading.Lock()
lock.acquire()
ended = []
def end(by):
    ended.append(by)
    if len(ended) == 1:
        lock.release()
signal.signal(signal.SIGTERM, lambda *_: end("the signal"))
{before}
def kill():
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep({wait_s})
    end("the time")
threading.Thread(target=kill, daemon=True).start()
lock.acquire()
print("ENDED BY", ended[0])
"""


def ends_a_wait(before: str, wait_s: float) -> bool:
    """Whether the signal's handler ends a wait for a lock, that ends ``wait_s`` after the signal by itself; ``before`` is run first."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", _SCRIPT.format(before=before, wait_s=wait_s)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.rsplit("ENDED BY ", 1)[1] == "the signal\n"
