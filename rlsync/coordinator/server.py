"""The coordinator's thread: one ROUTER socket, the clock, and the deaths of local peers.

Owns the socket and the thread; every decision is the coordinator's. Runs in the process of actor rank 0.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
import traceback
from typing import Protocol

import zmq

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import GRACE_S, keep_alive, pid_domain
from rlsync.errors import ConfigError

_log = logging.getLogger(__name__)
# Descriptors of a peer on this host: of its connection and of its process.
_FILES_PER_PEER = 2
# Files that the process may open meanwhile.
_SPARE_FILES = 256
_TICK_MS = 200


class Served(Protocol):
    """The state machine behind a server."""

    def receive(self, identity: bytes, raw: bytes, now_s: float) -> None: ...

    def lose(self, identity: bytes) -> None: ...

    def expire(self, now_s: float) -> None: ...

    def fail(self, cause: str) -> None: ...

    def is_awaited(self) -> bool: ...

    def process_of(self, identity: bytes) -> tuple[int, str] | None: ...


def check_bind_host(host: str) -> None:
    """Raise ConfigError unless a server could listen at an address of this host."""
    probe: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    try:
        _bind(probe, host)
    finally:
        probe.close()


def _bind(socket: zmq.Socket[bytes], host: str) -> int:
    """The port of the system's choice. Raises ConfigError."""
    try:
        return socket.bind_to_random_port(f"tcp://{host}")
    except zmq.ZMQError as error:
        raise ConfigError(
            f"weight_sync.bind_host {host}: actor rank 0 cannot listen there ({error.strerror}); name an address of its own host"
        ) from error


class CoordinatorServer:
    """Serves one connection from ``start`` to ``stop``.

    Args:
        bind_host: address to listen on, at a port of the system's choice.
        num_peers: those that will dial in. Raises ConfigError where this process must not have as many open files.

    Raises ConfigError where ``bind_host`` is no address of this host.

    Attributes:
        endpoint: address that peers dial, as ``tcp://127.0.0.1:41321``.
        own_endpoint: the same for a peer in this process, whose messages take no way through the kernel: ``inproc://...``.
    """

    def __init__(self, bind_host: str, num_peers: int) -> None:
        make_room(num_peers)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 1000)
        # Nothing is dropped towards a slow peer: the volume of a sync is a few small messages per bucket.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # A peer whose connection the network has dropped dials again under its identity while this end may still take the former for
        # alive. Without this zmq keeps the former, and swallows all that comes by the new one.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        keep_alive(self._socket)
        port = _bind(self._socket, bind_host)
        self.endpoint, self.own_endpoint = f"tcp://{bind_host}:{port}", f"inproc://rlsync-coordinator-{port}"
        self._socket.bind(self.own_endpoint)
        self._stop = threading.Event()
        self._last_s = 0.0
        self._thread: threading.Thread | None = None
        self._pidfds: dict[int, bytes] = {}
        self._watched: set[bytes] = set()
        self._domain = pid_domain()

    def start(self, served: Served) -> None:
        """Begin to listen on behalf of ``served``, which answers through ``send``."""
        self._thread = threading.Thread(target=self._run, args=(served,), name="rlsync-coordinator", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the socket; queued messages still leave, while the process lives. Idempotent.

        Takes up to GRACE_S where somebody is to come who has to hear of a failure.
        """
        self._last_s = time.monotonic() + GRACE_S
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._socket.close()

    def send(self, identity: bytes, message: m.FromCoordinator) -> None:
        """Queue a message for one peer; only from within ``served``."""
        self._socket.send_multipart([identity, m.encode(message)])

    def _run(self, coordinator: Served) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        try:
            while not self._stop.is_set() or self._has_to_tell(coordinator, poller):
                for source, _ in poller.poll(_TICK_MS):
                    if source is self._socket:
                        self._drain(coordinator, poller)
                    else:
                        self._bury(coordinator, poller, source)
                coordinator.expire(time.monotonic())
        except Exception:
            # A fault of the coordinator is reported to all peers, who would otherwise wait for their deadlines.
            coordinator.fail(f"the coordinator failed: {traceback.format_exc()}")
            raise
        finally:
            for fd in self._pidfds:
                os.close(fd)

    def _has_to_tell(self, coordinator: Served, poller: zmq.Poller) -> bool:
        """At the end: whether somebody is still to come. What was said before the end counts."""
        self._drain(coordinator, poller)
        return coordinator.is_awaited() and time.monotonic() < self._last_s

    def _drain(self, coordinator: Served, poller: zmq.Poller) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                coordinator.receive(frames[0], frames[1], time.monotonic())
                self._watch(frames[0], coordinator, poller)

    def _watch(self, identity: bytes, coordinator: Served, poller: zmq.Poller) -> None:
        """Watch the process of an admitted peer, so that its end is seen at once and not at the deadline."""
        process = None if identity in self._watched else coordinator.process_of(identity)
        if process is None:
            return
        self._watched.add(identity)
        pid, domain = process
        if domain == self._domain:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                coordinator.lose(identity)
                return
            self._pidfds[fd] = identity
            poller.register(fd, zmq.POLLIN)

    def _bury(self, coordinator: Served, poller: zmq.Poller, fd: int) -> None:
        poller.unregister(fd)
        identity = self._pidfds.pop(fd)
        os.close(fd)
        # Its last messages come first: they say why it ended.
        self._drain(coordinator, poller)
        coordinator.lose(identity)


def make_room(num_peers: int) -> None:
    """Raise this process's limit of open files for that many peers. Raises ConfigError where the hard limit is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + _FILES_PER_PEER * num_peers
    if soft == resource.RLIM_INFINITY or needed + _SPARE_FILES <= soft:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{num_peers:,} actor ranks and engine workers need {needed:,} open files here, and this process may have {hard:,}; allow "
            f"more, as with ulimit -Hn {needed + _SPARE_FILES} or, in containers, docker run --ulimit nofile=65536"
        )
    wanted = needed + _SPARE_FILES if hard == resource.RLIM_INFINITY else min(needed + _SPARE_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _log.info("this process may have %d open files now instead of %d: %d actor ranks and engine workers dial in", wanted, soft, num_peers)
