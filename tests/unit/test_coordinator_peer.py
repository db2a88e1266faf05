"""Claims about a peer's end of the channel."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import Peer
from rlsync.coordinator.server import CoordinatorServer
from rlsync.errors import RlsyncError
from tests.deadlines import HANG_S

HELLO = m.ActorHello("", "", 0, 1, "", "", "", 1, None, "")
REPO = Path(__file__).resolve().parents[2]
# Waits for a message until a moment that it is told, of the clock that all processes have, and says what came. Meanwhile it stops.
WAITING = """
import os, signal, sys, threading, time
from rlsync.coordinator import messages as m
from rlsync.coordinator.client import Peer
peer = Peer(sys.argv[1], m.ActorHello("", "", 0, 1, "", "", "", 1, None, ""))
deadline_s = float(sys.stdin.readline())
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
try:
    print(type(peer.receive(1, deadline_s)).__name__)
except TimeoutError:
    print("TimeoutError")
"""


def test_a_process_that_was_stopped_beyond_its_deadline_hears_what_was_said_meanwhile() -> None:
    """Else ranks would end a sync differently: one that committed, and one that knows of no end. Several, as it is a race."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, contextlib.ExitStack() as ends:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        words = [sys.executable, "-c", WAITING, f"tcp://127.0.0.1:{port}"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        waiting = [subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(REPO)}, **pipes) for _ in range(6)]
        for process in waiting:
            ends.callback(process.kill)
        identities = [router.recv_multipart()[0] for _ in waiting]
        deadline_s = time.monotonic() + 3
        for process in waiting:
            process.stdin.write(f"{deadline_s}\n")
            process.stdin.flush()
        for process in waiting:
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        for identity in identities[:3]:
            router.send_multipart([identity, m.encode(m.Finished(1, b""))])
        time.sleep(max(0.0, deadline_s - time.monotonic()) + 0.2)
        for process in waiting:
            process.send_signal(signal.SIGCONT)
        heard = [process.communicate(timeout=HANG_S)[0].strip() for process in waiting]
    assert sorted(heard) == ["Finished"] * 3 + ["TimeoutError"] * 3


class Hearing:
    """Served by a real server: counts what it hears."""

    def __init__(self) -> None:
        self.heard: SimpleQueue[bytes] = SimpleQueue()

    def receive(self, identity: bytes, raw: bytes, now: float) -> None:
        self.heard.put(raw)

    def lose(self, identity: bytes) -> None: ...

    def expire(self, now: float) -> None: ...

    def fail(self, cause: str) -> None: ...

    def is_awaited(self) -> bool:
        return False

    def process_of(self, identity: bytes) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[CoordinatorServer, Hearing]]:
    served, server = Hearing(), CoordinatorServer("127.0.0.1", 1)
    server.start(served)
    yield server, served
    server.stop()


def test_a_connection_that_the_network_dropped_on_one_side_is_replaced(server: tuple[CoordinatorServer, Hearing]) -> None:
    """As by a NAT that forgets an idle one: the peer is reset, and the coordinator's end is never told."""
    (address, port), legs = urlsplit(server[0].endpoint).netloc.split(":"), list[socket.socket]()
    middle = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = middle.accept()[0], socket.create_connection((address, int(port)))
                legs.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    peer = Peer(f"tcp://127.0.0.1:{middle.getsockname()[1]}", HELLO)
    try:
        assert server[1].heard.get(timeout=HANG_S) == m.encode(HELLO)
        legs[0].shutdown(socket.SHUT_RDWR)
        deadline_s = time.monotonic() + HANG_S
        while len(legs) < 4:
            assert time.monotonic() < deadline_s, "the peer dials again"
            time.sleep(0.05)
        peer.send(m.Joined(1, 1))
        assert server[1].heard.get(timeout=HANG_S) == m.encode(m.Joined(1, 1))
    finally:
        peer.close()
        for leg in (middle, *legs):
            leg.close()


def test_the_kernel_probes_both_ends_of_an_idle_connection(server: tuple[CoordinatorServer, Hearing]) -> None:
    peer = Peer(server[0].endpoint, HELLO)
    server[1].heard.get(timeout=HANG_S)
    port, deadline_s = f":{int(server[0].endpoint.rsplit(':', 1)[1]):04X}", time.monotonic() + HANG_S
    while True:
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        # Local and remote address, state (01: established), queues, and the timer that runs (02: keepalive), with what is left of it.
        timers = [row[5] for row in rows if (row[1].endswith(port) or row[2].endswith(port)) and row[3] == "01"]
        if len(timers) == 2 and all(timer.startswith("02:") for timer in timers):
            break
        assert time.monotonic() < deadline_s, timers
        time.sleep(0.1)
    # In hundredths of a second: within the few minutes after which firewalls forget a connection.
    assert all(int(timer[3:], 16) <= 6100 for timer in timers), timers
    peer.close()


def test_a_hello_that_nobody_would_read_is_refused_where_it_is_made() -> None:
    """Its sender would otherwise be missed until the deadline of the phase."""
    hello = msgspec.structs.replace(HELLO, frozen=tuple((2 * number, 2 * number + 1) for number in range(200_000)))
    with pytest.raises(RlsyncError, match=r"a first message of [\d,]+ bytes, and actor rank 0 reads 1,048,576 of one"):
        Peer("tcp://127.0.0.1:1", hello)


def test_what_a_process_said_last_is_heard_before_its_end() -> None:
    """It says why it ended, and may have arrived since the server looked."""
    heard: list[str] = []

    class Served(Hearing):
        def receive(self, identity: bytes, raw: bytes, now_s: float) -> None:
            heard.append("message")

        def lose(self, identity: bytes) -> None:
            heard.append("end")

    server, ended, poller = CoordinatorServer("127.0.0.1", 1), os.eventfd(0), zmq.Poller()
    peer = Peer(server.endpoint, HELLO)
    try:
        assert server._socket.poll(HANG_S * 1000)
        poller.register(ended, zmq.POLLIN)
        server._pidfds[ended] = b"peer"
        server._bury(Served(), poller, ended)
    finally:
        peer.close()
        server.stop()
    assert heard == ["message", "end"]
