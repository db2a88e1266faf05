"""Claims about a peer's end of the channel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from rlsync.coordinator import messages as m

REPO = Path(__file__).resolve().parents[2]
# Waits for a message for as long as it is told, and says what came.
WAITING = """
import sys, time
from rlsync.coordinator import messages as m
from rlsync.coordinator.client import Peer
peer = Peer(sys.argv[1], m.ActorHello("", "", 0, 1, "", "", "", 1, None, ""))
try:
    print(type(peer.receive(1, time.monotonic() + float(sys.argv[2]))).__name__)
except TimeoutError:
    print("TimeoutError")
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("said", [True, False])
def test_a_process_that_was_stopped_beyond_its_deadline_hears_what_was_said_meanwhile(said: bool) -> None:
    """Else ranks would end a sync differently: one that committed, and one that knows of no end."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        for _ in range(3):
            words = [sys.executable, "-c", WAITING, f"tcp://127.0.0.1:{port}", "1.5"]
            process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
            identity, _ = router.recv_multipart()
            # It waits by now, with most of its time left.
            time.sleep(0.3)
            process.send_signal(signal.SIGSTOP)
            if said:
                router.send_multipart([identity, m.encode(m.Finished(1, b""))])
            time.sleep(2)
            began_s = time.monotonic()
            process.send_signal(signal.SIGCONT)
            output, _ = process.communicate(timeout=20)
            assert output.strip() == ("Finished" if said else "TimeoutError")
            assert time.monotonic() - began_s < 5
