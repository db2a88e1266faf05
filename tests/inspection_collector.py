"""Asking the workers of running engines what they hold, beside any connection. Sends nothing but refusals; opens no socket."""

from __future__ import annotations

import hmac
import threading
from collections.abc import Mapping

import msgspec

from rlsync.coordinator import messages as m
from rlsync.coordinator.state_machine import Sender

Place = tuple[str, int]


class Inspection:
    """Collects one ``State`` from every worker; fed by a server like a Coordinator.

    Attributes:
        states: (engine id, worker's number in its engine) -> hashes by path.
        complete: set when all are here.
    """

    def __init__(self, token: str, run_id: str, engines: Mapping[str, int], send: Sender) -> None:
        self._token, self._run_id, self._send = token, run_id, send
        self._expected = {(engine, place) for engine, count in engines.items() for place in range(count)}
        self._members: dict[bytes, m.WorkerHello] = {}
        self.states: dict[Place, dict[str, str]] = {}
        self.complete = threading.Event()

    def receive(self, identity: bytes, raw: bytes, now: float) -> None:
        """Take one message. What is no message, and who has no token, disturbs nobody."""
        hello = self._members.get(identity)
        if hello is None and len(raw) > m.MAX_HELLO_BYTES:
            return
        try:
            message = m.decode_from_peer(raw)
        except msgspec.MsgspecError:
            return
        if isinstance(message, m.WorkerHello):
            if hmac.compare_digest(message.token.encode(), self._token.encode()) and message.run_id == self._run_id:
                self._members[identity] = message
            else:
                cause = f"engine {message.engine_id} came with a wrong token; it belongs to another run"
                self._send(identity, m.Error(attempt=0, phase="connect", cause=cause))
        elif isinstance(message, m.State) and hello is not None:
            self.states[hello.engine_id, hello.dp_index * hello.world_size + hello.worker_rank] = message.hashes
            if self.states.keys() >= self._expected:
                self.complete.set()

    def absent(self) -> list[Place]:
        """Workers that have not answered."""
        return sorted(self._expected - self.states.keys())

    def lose(self, identity: bytes) -> None:
        """Nothing: who is gone does not answer, and the deadline says so."""

    def expire(self, now: float) -> None:
        """Nothing: the caller waits for ``complete`` with a deadline of its own."""

    def fail(self, cause: str) -> None:
        """Nothing: as for ``expire``."""

    def process_of(self, identity: bytes) -> tuple[int, str] | None:
        """Nobody's death is watched."""
        return None
