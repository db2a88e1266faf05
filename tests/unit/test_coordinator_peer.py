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
from tests.deadlines import HANG_S

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


@pytest.mark.parametrize("said", [True, False])
def test_a_process_that_was_stopped_beyond_its_deadline_hears_what_was_said_meanwhile(said: bool) -> None:
    """Else ranks would end a sync differently: one that committed, and one that knows of no end. Several, as it is a race."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        words = [sys.executable, "-c", WAITING, f"tcp://127.0.0.1:{port}", "1.5"]
        environment = {**os.environ, "PYTHONPATH": str(REPO)}
        waiting = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
        identities = [router.recv_multipart()[0] for _ in waiting]
        # They wait by now, with most of their time left.
        time.sleep(0.3)
        for process in waiting:
            process.send_signal(signal.SIGSTOP)
        for identity in identities if said else ():
            router.send_multipart([identity, m.encode(m.Finished(1, b""))])
        time.sleep(2)
        for process in waiting:
            process.send_signal(signal.SIGCONT)
        assert [process.communicate(timeout=HANG_S)[0].strip() for process in waiting] == ["Finished" if said else "TimeoutError"] * 3
