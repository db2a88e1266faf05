"""The dialling side of the channel, the same for actor ranks and engine workers. Owns a socket; starts no thread."""

from __future__ import annotations

import logging
import math
import os
import time
import uuid

import msgspec
import zmq

from rlsync.coordinator import messages as m
from rlsync.errors import RlsyncError, WeightSyncError

_log = logging.getLogger(__name__)
# The coordinator's deadline comes first, and names the peer that is late; a peer's own, so much later, is for a coordinator that is gone.
GRACE_S = 2.0
# How long queued messages may still leave after ``close``; the coordinator may be gone.
_LINGER_MS = 1000
# A stopped process (SIGSTOP) has the messages of the meantime this long after it goes on.
_LAST_LOOK_S = 0.5
# A poll that ends this much too late means that the process was stopped, not slow.
_OVERSLEPT_S = 0.1
# Between two syncs nothing is sent, maybe for hours. Probes of an idle connection keep firewalls and NAT from forgetting it, which they
# may do after a few minutes; unanswered, they end it within two minutes, and zmq dials again.
_PROBED_AFTER_S, _PROBED_EVERY_S, _NUM_PROBES = 60, 15, 4


class Peer:
    """One connection to the coordinator. Not thread-safe: one thread sends and receives.

    ``receive`` returns messages of the given attempt and raises the error that the coordinator sends to all peers.

    Raises RlsyncError for a hello that is larger than ``MAX_HELLO_BYTES``.

    Attributes:
        heard_s: value of ``time.monotonic`` when the coordinator was last heard, or the connection made.
    """

    def __init__(self, endpoint: str, hello: m.ActorHello | m.WorkerHello) -> None:
        size = len(m.encode(hello))
        if size > m.MAX_HELLO_BYTES:
            raise RlsyncError(f"a first message of {size:,} bytes, and actor rank 0 reads {m.MAX_HELLO_BYTES:,} of one")
        self._endpoint = endpoint
        # The process's shared context: one of its own would wait for its sockets when the collector takes both.
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, uuid.uuid4().bytes)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        keep_alive(self._socket)
        self._socket.connect(endpoint)
        self.heard_s = time.monotonic()
        self.send(hello)

    def send(self, message: m.FromPeer) -> None:
        """Queue a message; never blocks. A cause that is too long keeps its end.

        Where zmq has closed the connection for good, after bytes that are no message of this channel, the message is dropped: the
        other side ends by its deadlines.
        """
        if isinstance(message, m.Failed):
            message = msgspec.structs.replace(message, cause=m.shortened(message.cause))
        raw = m.encode(message)
        try:
            self._socket.send(raw, zmq.NOBLOCK)
        except zmq.Again:
            _log.warning("the connection to %s is broken, and a message (%s) stays unsent", self._endpoint, type(message).__name__)

    def receive(self, attempt: int, deadline: float, wake_fd: int | None = None) -> m.FromCoordinator | None:
        """Next message of ``attempt`` (0: of the connection itself).

        Args:
            deadline: value of ``time.monotonic`` after which TimeoutError is raised.
            wake_fd: return None as soon as this descriptor is readable, unless a message is here first.

        Raises WeightSyncError when the coordinator says so.
        """
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if wake_fd is not None:
            poller.register(wake_fd, zmq.POLLIN)
        while True:
            began_s = time.monotonic()
            patience_s = max(deadline - began_s, _LAST_LOOK_S)
            events = dict(poller.poll(math.ceil(patience_s * 1000)))
            now_s = time.monotonic()
            # A process that was stopped polls once more: the messages that it missed say what happened meanwhile.
            if not events and now_s >= deadline and now_s - began_s - patience_s < _OVERSLEPT_S:
                raise TimeoutError
            if self._socket in events:
                message = self._decode(self._socket.recv())
                self.heard_s = time.monotonic()
                # What is of another attempt is over, also a failure between two syncs: the next one begins behind it.
                if getattr(message, "attempt", 0) == attempt:
                    if isinstance(message, m.Error):
                        raise to_exception(message)
                    return message
            elif wake_fd is not None and wake_fd in events:
                return None

    def _decode(self, raw: bytes) -> m.FromCoordinator:
        try:
            return m.decode_from_coordinator(raw)
        except msgspec.MsgspecError as error:
            raise WeightSyncError(phase="connect", cause=f"{self._endpoint} sent what is no message of this channel: {error}") from error

    def close(self) -> None:
        """Close the socket; queued messages still leave, while the process lives. Idempotent."""
        self._socket.close()


def keep_alive(socket: zmq.Socket[bytes]) -> None:
    """Have the kernel probe connections of a socket that is not yet bound or connected. Not zmq's heartbeat, which a stopped process
    (SIGSTOP) does not answer: its messages of the meantime would be lost with its connection."""
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _PROBED_AFTER_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _PROBED_EVERY_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, _NUM_PROBES)


def to_exception(error: m.Error) -> WeightSyncError:
    return WeightSyncError(phase=error.phase, cause=error.cause, engine=error.engine, version=error.version, bucket=error.bucket)


def pid_domain() -> str:
    """Equal in two processes exactly when a pid means the same process to both: kernel and pid namespace."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
