"""Engines that are a thread for each worker and a dictionary of weights: the only stand-in of the claims about the channel.

Owns an engine's side of a sync over real channels and transports. Knows no vLLM and nothing of the actor's side.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from rlsync.coordinator import messages as m
from rlsync.coordinator.client import Peer
from rlsync.engine.handles import SyncOrder, call_in_turn
from rlsync.engine.pull import MismatchError, Pull, Verifier
from rlsync.errors import RlsyncError, WeightSyncError
from rlsync.layout.geometry import whole_tensors
from rlsync.plan.packing import PackedPart
from rlsync.transport.ends import Arrival, PackedArrival, Receiver, make_receiver
from rlsync.transport.ipc import IpcReceiver
from rlsync.transport.shm import shm_domain

# Of each phase of a sync, of which none takes a hundredth; see tests/phases.py for those that pass.
TIMEOUT_S = 60.0


class ThreadEngine:
    """An EngineHandle with two workers, each a Peer that copies buckets into ``weights``. ``domain`` is the /dev/shm it claims to see."""

    def __init__(self, engine_id: str, num_workers: int = 2) -> None:
        self.engine_id, self.num_workers, self.workers = engine_id, num_workers, num_workers
        self.weights: list[dict[str, torch.Tensor]] = [{} for _ in range(num_workers)]
        self.calls: list[str] = []
        # UUIDs of the GPUs that the workers claim to be on.
        self.gpus: list[str | None] = [None] * num_workers
        # And the host; no pid domain is anybody's, as the deaths of threads cannot be watched.
        self.host, self.pid_domain = "here", "threads"
        self.dirty, self.domain = "", shm_domain()
        # The sync that has failed last.
        self.over = ""
        # Whether what is frozen can be summed where it lies, or has a form of its own since it landed.
        self.shows_weights = True
        self.change_info: Callable[[dict[str, Any]], dict[str, Any]] = lambda info: info
        self.on_bucket: Callable[[int, int], None] = lambda worker, bucket: None
        self.on_hold: Callable[[int, dict[str, torch.Tensor]], None] = lambda worker, weights: None
        self._peers: list[Peer] = []
        self._receivers: list[Receiver] = []
        self._assignments: list[m.WorkerAssignment] = []
        self._verifiers: list[Verifier] = []
        # Buckets that the workers have taken in the last sync.
        self.taken: list[list[int]] = [[] for _ in range(num_workers)]
        # As in an engine, where a call waits until the workers have left the one before, also one that the actor gave up.
        self._turn = threading.Lock()

    def _in_workers(self, call: Callable[[int], None]) -> None:
        with self._turn:
            self._in_threads(call)

    def _in_threads(self, call: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def run(worker: int) -> None:
            try:
                call(worker)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(self.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise RuntimeError("worker failed") from errors[0]

    def init_weight_transfer(self, init_info: dict[str, Any], timeout_s: float) -> None:
        info = self.change_info(dict(init_info))
        for former in self._receivers:
            if isinstance(former, IpcReceiver):
                former.close()  # before it dials, as a worker of vLLM does
        place = (info["token"], info["run_id"], info["engine_id"], 0)
        about = (self.workers, self.host, self.domain, self.pid_domain, 1)
        self._peers = [Peer(info["endpoint"], m.WorkerHello(*place, i, *about, self.gpus[i], "none")) for i in range(self.workers)]
        self._receivers = [None] * self.workers  # type: ignore[list-item]
        self._assignments = [None] * self.workers  # type: ignore[list-item]
        self._verifiers = [None] * self.workers  # type: ignore[list-item]

        def connect(worker: int) -> None:
            peer = self._peers[worker]
            manifest = peer.receive(0, time.monotonic() + timeout_s)
            assert isinstance(manifest, m.Manifest)
            peer.send(m.Recorded(whole_tensors(f"engine {self.engine_id} worker {worker}", manifest.tensors), "direct"))
            told = peer.receive(0, time.monotonic() + timeout_s)
            assert isinstance(told, m.Assignment) and told.worker is not None
            self._assignments[worker], self._verifiers[worker] = told.worker, Verifier(told.worker)
            receiver = self._receivers[worker] = make_receiver(told.worker, TIMEOUT_S, torch.device("cpu"))
            until(lambda: receiver.join(0), peer, 0, receiver, lambda message: None)
            self.weights[worker] = {t.name: torch.zeros(t.shape) for t in manifest.tensors}
            peer.send(m.Attached())
            connected = peer.receive(0, time.monotonic() + timeout_s)
            assert isinstance(connected, m.Connected)
            receiver.prepare(self._standing(worker), connected.exports)

        self._in_workers(connect)

    def _standing(self, worker: int) -> dict[int, dict[str, torch.Tensor]]:
        parts, weights = self._assignments[worker].parts, self.weights[worker]
        return {bucket: {s.buffer: weights[s.buffer] for s in part.segments} for bucket, part in enumerate(parts)}

    def sync(self, order: SyncOrder) -> float:
        def update() -> None:
            if self.over == order.sync:
                raise RlsyncError("the sync has failed")
            self.update_weights(dict(order.update_info), order.update_s)

        return call_in_turn(
            {
                "pause": lambda: self.pause(order.pause_mode, order.sync, order.phase_s),
                "update": update,
                "resume": lambda: self.resume(order.version, order.phase_s),
            }
        )

    def pause(self, mode: str, sync: str, timeout_s: float) -> None:
        self.calls.append(f"pause {mode}")

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        self.calls.append(f"update {update_info['version']}")
        self._in_workers(lambda worker: self._update(worker, update_info["attempt"], update_info["version"]))

    def _update(self, worker: int, attempt: int, version: int) -> None:
        peer, receiver, assignment = self._peers[worker], self._receivers[worker], self._assignments[worker]
        weights, pull, taken = self.weights[worker], Pull(self._verifiers[worker], attempt), list[int]()
        self.taken[worker] = taken
        deadline = time.monotonic() + 60
        try:
            peer.send(m.Joined(attempt, version))
            until(lambda: True if pull.buckets_ready >= 0 else None, peer, attempt, receiver, pull.hear)
            until(lambda: receiver.join(pull.group), peer, attempt, receiver, pull.hear)
            first = assignment.num_frozen if pull.without_frozen else 0
            with receiver.receiving(self._standing(worker), first):
                if first:
                    pull.bucket = first - 1
                    pull.verify_held(dict.fromkeys(range(first), weights) if self.shows_weights else {})
                    until(lambda: True if pull.buckets_ready >= first else None, peer, attempt, receiver, pull.hear)
                    peer.send(m.Done(attempt, first - 1))
                for bucket, part in enumerate(assignment.parts[first:], first):
                    pull.bucket = bucket

                    def is_ready(bucket: int = bucket) -> bool | None:
                        return True if pull.buckets_ready > bucket else None

                    def fetch(bucket: int = bucket) -> Arrival | None:
                        exports, pull.exports = pull.exports, ()
                        return receiver.fetch(bucket, pull.buckets_ready, exports)

                    taken.append(bucket)
                    if not receiver.lands_ahead:
                        until(is_ready, peer, attempt, receiver, pull.hear)
                    self.on_bucket(worker, bucket)
                    arrival = until(fetch, peer, attempt, receiver, pull.hear)
                    until(is_ready, peer, attempt, receiver, pull.hear)
                    if isinstance(arrival, PackedArrival):
                        put(arrival.memory, part, weights)
                    else:
                        arrival.land(self._standing(worker)[bucket])
                    self.on_hold(worker, weights)
                    pull.verify(bucket, weights)
                    peer.send(m.Done(attempt, bucket))
                until(lambda: True if pull.buckets_summed >= len(assignment.parts) else None, peer, attempt, receiver, pull.hear)
                pull.conclude()
            peer.send(m.Loaded(attempt, pull.times(0)))
            while not isinstance(peer.receive(attempt, deadline), m.Commit):
                pass
            peer.send(m.Committed(attempt))
            while not isinstance(peer.receive(attempt, deadline), m.Serve):
                pass
        except BaseException as error:
            if not isinstance(error, WeightSyncError):
                phase = "verify" if isinstance(error, MismatchError) else "transfer"
                peer.send(m.Failed(attempt, phase, str(error), bucket=pull.bucket))
            receiver.abandon()
            raise

    @property
    def state(self) -> str:
        return "dirty" if self.dirty else "clean"

    def resume(self, version: int, timeout_s: float) -> None:
        self.calls.append(f"resume {version}")
        self.dirty = ""

    def mark_dirty(self, reason: str, sync: str = "") -> None:
        self.dirty, self.over = reason, sync


def put(slot: torch.Tensor, part: PackedPart, weights: dict[str, torch.Tensor]) -> None:
    for segment in part.segments:
        flat = slot[segment.slot_offset : segment.slot_offset + segment.nbytes].view(torch.float32)
        weights[segment.buffer][segment.buffer_offset : segment.buffer_offset + segment.size].copy_(flat)


def until(poll: Callable[[], Any], peer: Peer, attempt: int, receiver: Receiver, hear: Callable[[Any], None]) -> Any:
    """What ``poll`` gives, asked again after every message and whenever the receiver has news."""
    deadline = time.monotonic() + 60
    while (result := poll()) is None:
        message = peer.receive(attempt, deadline, receiver.fd)
        if message is not None:
            hear(message)
    return result
