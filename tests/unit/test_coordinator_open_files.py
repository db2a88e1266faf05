"""A listener makes room for all who will dial in, or says that it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from tests.deadlines import HANG_S

# Serves ``peers`` in a process that begins with few open files, and tells how many were heard.
_SERVER = """
import resource, sys, threading
soft, hard, peers = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from rlsync.coordinator import server as served
{before}
class Counting:
    def __init__(self):
        self.heard, self.all = set(), threading.Event()
    def receive(self, identity, raw, now):
        self.heard.add(identity)
        if len(self.heard) == peers:
            self.all.set()
    def lose(self, identity): ...
    def expire(self, now): ...
    def fail(self, cause): ...
    def is_awaited(self): ...
    def process_of(self, identity): ...
counting = Counting()
server = served.CoordinatorServer("127.0.0.1", peers)
server.start(counting)
print(server.endpoint, flush=True)
counting.all.wait(float({wait_s}))
print(len(counting.heard), flush=True)
"""
PEERS = 150


def serve(soft: int, hard: int, *, before: str = "", wait_s: float = 60) -> subprocess.Popen[str]:
    script = _SERVER.format(before=before, wait_s=wait_s)
    command = [sys.executable, "-c", script, str(soft), str(hard), str(PEERS)]
    repo = Path(__file__).resolve().parents[2]
    return subprocess.Popen(command, cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# The second is the negative control: a listener that makes no room hears some of them.
@pytest.mark.parametrize(("before", "heard", "wait_s"), [("", True, 60), ("served.make_room = lambda num_peers: None", False, 1)])
def test_more_peers_than_the_soft_limit_allows_are_heard(before: str, heard: bool, wait_s: float) -> None:
    process = serve(100, 4096, before=before, wait_s=wait_s)
    assert process.stdout is not None
    endpoint = process.stdout.readline().strip()
    with zmq.Context() as context:
        sockets = [context.socket(zmq.DEALER) for _ in range(PEERS)]
        for socket in sockets:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(endpoint)
            socket.send(b"here")
        said, errors = process.communicate(timeout=HANG_S)
        for socket in sockets:
            socket.close()
    assert (int(said or -1) == PEERS) == heard, (said, errors)


def test_a_hard_limit_that_is_too_low_is_named() -> None:
    _, errors = serve(100, 300).communicate(timeout=HANG_S)
    assert "150 actor ranks and engine workers need " in errors and "this process may have 300; allow more" in errors
