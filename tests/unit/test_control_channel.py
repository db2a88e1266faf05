"""Claims about WeightSyncer over the real channel and the real transports, with engines that are a thread and a dictionary.

The engine is the only stand-in: what it does with the tensors is proved on real ones in tests/integration.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from rlsync.control import messages as m
from rlsync.control.peer import Peer
from rlsync.control.server import CoordinatorServer
from rlsync.control.shares import WorkerPart, WorkerShare
from rlsync.engine.inlet import Inlet
from rlsync.engine.pull import Pull
from rlsync.engine.verifier import MismatchError, Verifier
from rlsync.errors import ConfigError, WeightSyncError
from rlsync.geometry import Box, BufferSpec, Piece, Placement, TensorSpec
from rlsync.placement.huggingface import whole_tensors
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from rlsync.sync.filling import Filling
from rlsync.sync.inlets import open_inlet
from rlsync.transport.shm import shm_domain
from rlsync.verification import SAMPLE_PERIOD

TIMEOUT_S = 3.0
SIZES = (16, 40, 8, 24, 32)


class Numbers:
    """A source of five float32 tensors, one in each bucket; with two ranks each holds one half of every tensor."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.stays = rank, world_size, True
        self.tensors = tuple(TensorSpec(f"w{i}", "float32", (n,)) for i, n in enumerate(SIZES))
        self.placements = tuple(half_placement(r, world_size) for r in range(world_size))
        self.buffers = {f"half{i}": torch.zeros(n // world_size) for i, n in enumerate(SIZES)}
        self.on_fill: Callable[[int], None] = lambda bucket: None

    def begin(self, version: int) -> None:
        for i, half in enumerate(self.buffers.values()):
            half.copy_(tensor(version, i)[self.rank * len(half) :][: len(half)])


def half_placement(rank: int, world_size: int) -> Placement:
    halves = [(i, n // world_size) for i, n in enumerate(SIZES)]
    return Placement(
        f"actor {rank}",
        tuple(BufferSpec(f"half{i}", "float32", (n,)) for i, n in halves),
        tuple(Piece(f"w{i}", Box((rank * n,), ((rank + 1) * n,)), f"half{i}", 0, (1,)) for i, n in halves),
    )


def tensor(version: int, bucket: int) -> torch.Tensor:
    return torch.arange(SIZES[bucket]) + 1000.0 * version + 100.0 * bucket


class ThreadEngine:
    """An EngineHandle with two workers, each a Peer that copies buckets into ``weights``. ``domain`` is the /dev/shm it claims to see."""

    def __init__(self, engine_id: str, num_workers: int = 2) -> None:
        self.engine_id, self.num_workers, self.workers = engine_id, num_workers, num_workers
        self.weights: list[dict[str, torch.Tensor]] = [{} for _ in range(num_workers)]
        self.calls: list[str] = []
        # UUIDs of the GPUs that the workers claim to be on.
        self.gpus: list[str | None] = [None] * num_workers
        self.dirty, self.domain, self.inlet_timeout_s = "", shm_domain(), TIMEOUT_S
        self.change_info: Callable[[dict[str, Any]], dict[str, Any]] = lambda info: info
        self.on_bucket: Callable[[int, int], None] = lambda worker, bucket: None
        self.on_hold: Callable[[int, dict[str, torch.Tensor]], None] = lambda worker, weights: None
        self._peers: list[Peer] = []
        self._inlets: list[Inlet] = []
        self._shares: list[WorkerShare] = []
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
        # A pid domain of its own: the deaths of threads cannot be watched.
        place = (info["token"], info["run_id"], info["engine_id"], 0)
        about = (self.workers, "here", self.domain, "threads", 1)
        self._peers = [Peer(info["endpoint"], m.WorkerHello(*place, i, *about, self.gpus[i], "none")) for i in range(self.workers)]
        self._inlets = [None] * self.workers  # type: ignore[list-item]
        self._shares = [None] * self.workers  # type: ignore[list-item]

        def connect(worker: int) -> None:
            peer = self._peers[worker]
            catalogue = peer.receive(0, time.monotonic() + timeout_s)
            assert isinstance(catalogue, m.Catalogue)
            peer.send(m.Recorded(whole_tensors(f"engine {self.engine_id} worker {worker}", catalogue.tensors), "direct"))
            share = peer.receive(0, time.monotonic() + timeout_s)
            assert isinstance(share, m.Share)
            self._shares[worker] = share.worker
            inlet = self._inlets[worker] = open_inlet(share.worker, self.inlet_timeout_s, torch.device("cpu"))
            until(lambda: inlet.join(0), peer, 0, inlet, lambda message: None)
            self.weights[worker] = {t.name: torch.zeros(t.shape) for t in catalogue.tensors}
            peer.send(m.Attached())
            assert isinstance(peer.receive(0, time.monotonic() + timeout_s), m.Connected)
            for bucket, buffers in self._standing(worker).items():
                inlet.prepare(bucket, buffers)

        self._in_workers(connect)

    def _standing(self, worker: int) -> dict[int, dict[str, torch.Tensor]]:
        parts, weights = self._shares[worker].parts, self.weights[worker]
        return {bucket: {s.buffer: weights[s.buffer] for s in part.segments} for bucket, part in enumerate(parts)}

    def pause(self, mode: str, timeout_s: float) -> None:
        self.calls.append(f"pause {mode}")

    def update_weights(self, update_info: dict[str, Any], timeout_s: float) -> None:
        self.calls.append(f"update {update_info['version']}")
        self._in_workers(lambda worker: self._update(worker, update_info["attempt"], update_info["version"]))

    def _update(self, worker: int, attempt: int, version: int) -> None:
        peer, inlet, share = self._peers[worker], self._inlets[worker], self._shares[worker]
        weights, pull = self.weights[worker], Pull(Verifier(share), attempt)
        deadline = time.monotonic() + 10
        try:
            peer.send(m.Joined(attempt, version))
            until(lambda: True if pull.buckets_ready >= 0 else None, peer, attempt, inlet, pull.hear)
            until(lambda: inlet.join(pull.group), peer, attempt, inlet, pull.hear)
            if inlet.lands_ahead:
                inlet.expect(self._standing(worker))
            for bucket, part in enumerate(share.parts):
                pull.bucket = bucket

                def is_ready(bucket: int = bucket) -> bool | None:
                    return True if pull.buckets_ready > bucket else None

                if not inlet.lands_ahead:
                    until(is_ready, peer, attempt, inlet, pull.hear)
                self.on_bucket(worker, bucket)
                arrival = until(lambda bucket=bucket: inlet.fetch(bucket, pull.buckets_ready), peer, attempt, inlet, pull.hear)
                until(is_ready, peer, attempt, inlet, pull.hear)
                if inlet.lands_ahead:
                    arrival.land(self._standing(worker)[bucket])
                else:
                    put(arrival.memory, part, weights)
                self.on_hold(worker, weights)
                pull.verify(bucket, weights)
                peer.send(m.Done(attempt, bucket))
            peer.send(m.Loaded(attempt, pull.times(0)))
            while not isinstance(peer.receive(attempt, deadline), m.Commit):
                pass
            peer.send(m.Committed(attempt))
        except BaseException as error:
            if not isinstance(error, WeightSyncError):
                phase = "verify" if isinstance(error, MismatchError) else "transfer"
                peer.send(m.Failed(attempt, phase, str(error), bucket=pull.bucket))
            inlet.abandon()
            raise

    def resume(self, version: int, timeout_s: float) -> None:
        self.calls.append(f"resume {version}")
        self.dirty = ""

    def mark_dirty(self, reason: str) -> None:
        self.dirty = reason


def put(slot: torch.Tensor, part: WorkerPart, weights: dict[str, torch.Tensor]) -> None:
    for segment in part.segments:
        flat = slot[segment.slot_offset : segment.slot_offset + segment.nbytes].view(torch.float32)
        weights[segment.buffer][segment.buffer_offset : segment.buffer_offset + segment.size].copy_(flat)


def until(poll: Callable[[], Any], peer: Peer, attempt: int, inlet: Inlet, hear: Callable[[Any], None]) -> Any:
    """What ``poll`` gives, asked again after every message and whenever the inlet has news."""
    deadline = time.monotonic() + 10
    while (result := poll()) is None:
        message = peer.receive(attempt, deadline, inlet.fd)
        if message is not None:
            hear(message)
    return result


class Actors:
    """Two actor ranks in two threads, each with its WeightSyncer; every call is made on both and both outcomes are kept."""

    def __init__(self, engines: list[ThreadEngine], **config: Any) -> None:
        self.sources = [Numbers(rank, 2) for rank in range(2)]
        shared: list[bytes] = []
        there = self.there = threading.Event()

        def broadcast(rank: int, payload: bytes) -> bytes:
            if rank == 0:
                shared[:] = [payload]
                there.set()
            assert there.wait(10)
            return shared[0]

        settings = SyncConfig(**{"timeout_s": TIMEOUT_S, "bucket_bytes": 1, **config})
        self.syncers = [
            WeightSyncer(self.sources[rank], engines, settings, rank=rank, world_size=2, broadcast=partial(broadcast, rank))
            for rank in range(2)
        ]

    def both(self, call: Callable[[WeightSyncer], Any]) -> list[Any]:
        outcomes: list[Any] = [None, None]

        def run(rank: int) -> None:
            try:
                outcomes[rank] = call(self.syncers[rank])
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return outcomes

    def connect(self) -> None:
        assert self.both(lambda s: s.connect()) == [None, None]
        for syncer, source in zip(self.syncers, self.sources, strict=True):
            call_on_fill(syncer, lambda bucket, source=source: source.on_fill(bucket))

    def sync(self, version: int) -> SyncReport:
        first, second = self.both(lambda s: s.sync(version))
        assert isinstance(first, SyncReport), first
        assert first == second
        return first

    def failure(self, call: Callable[[WeightSyncer], Any]) -> WeightSyncError:
        """The one error that both ranks raise."""
        first, second = self.both(call)
        assert isinstance(first, WeightSyncError), first
        assert isinstance(second, WeightSyncError), second
        assert str(first) == str(second)
        return first

    def close(self) -> None:
        self.both(lambda s: s.close())


def call_on_fill(syncer: WeightSyncer, call: Callable[[int], None]) -> None:
    """Make a connected syncer call something in its filling thread before each bucket."""
    assert syncer._connection is not None
    filler = syncer._connection.filler
    fill = filler.fill

    def wrapped(bucket: int, turn: int) -> Filling:
        call(bucket)
        return fill(bucket, turn)

    filler.fill = wrapped  # type: ignore[method-assign]


@pytest.fixture
def engines() -> list[ThreadEngine]:
    return [ThreadEngine("e0"), ThreadEngine("e1")]


@pytest.fixture
def actors(engines: list[ThreadEngine]):
    actors = Actors(engines)
    actors.connect()
    yield actors
    actors.close()


def holds(engine: ThreadEngine, version: int) -> bool:
    return all(torch.equal(weights[f"w{i}"], tensor(version, i)) for weights in engine.weights for i in range(len(SIZES)))


def test_every_worker_of_every_engine_gets_what_all_ranks_filled(actors: Actors, engines: list[ThreadEngine]) -> None:
    for version in (1, 2, 7):
        report = actors.sync(version)
        assert all(holds(engine, version) for engine in engines)
        assert not any(holds(engine, version + 1) for engine in engines)
        assert (report.version, report.bytes, report.num_buckets) == (version, 4 * sum(SIZES), 5)
        assert report.max_redundancy == 1.0
        metrics = report.metrics()
        assert metrics["sync/version"] == version
        assert metrics["sync/gb_per_s"] > 0
        assert set(report.engine_s) == {"e0", "e1"}
    assert engines[0].calls[:4] == ["pause abort", "update 1", "resume 1", "pause abort"]


def test_nothing_is_written_before_every_engine_is_paused(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(1)
    paused, begun, pause = threading.Event(), threading.Event(), engines[1].pause

    def pause_late(mode: str, timeout_s: float) -> None:
        assert paused.wait(10)
        pause(mode, timeout_s)

    update = engines[0].update_weights

    def update_weights(update_info: dict[str, Any], timeout_s: float) -> None:
        begun.set()
        update(update_info, timeout_s)

    engines[1].pause, engines[0].update_weights = pause_late, update_weights  # type: ignore[method-assign]
    syncing = threading.Thread(target=lambda: actors.sync(2))
    syncing.start()
    # The other engine is inside its update, and buckets are filled.
    assert begun.wait(10)
    time.sleep(0.3)
    assert holds(engines[0], 1) and holds(engines[1], 1)
    paused.set()
    syncing.join(10)
    assert holds(engines[0], 2) and holds(engines[1], 2)


def test_one_slot_and_many_slots_carry_the_same_bytes(engines: list[ThreadEngine]) -> None:
    for num_slots in (1, 3, 8):
        actors = Actors(engines, num_slots=num_slots)
        actors.connect()
        actors.sync(num_slots)
        assert all(holds(engine, num_slots) for engine in engines)
        actors.close()


def test_filling_overlaps_loading(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines, timeout_s=10)
    events: list[str] = []
    actors.sources[0].on_fill = lambda bucket: events.append(f"fill {bucket}")

    def load(worker: int, bucket: int) -> None:
        time.sleep(0.05)
        events.append(f"loaded {bucket}")

    engines[0].on_bucket = load
    actors.connect()
    actors.sync(1)
    actors.close()
    assert events.index("fill 1") < events.index("loaded 0")
    assert events.index("fill 2") > events.index("loaded 0"), "bucket 2 shares its slot with bucket 0"


def test_an_exception_in_fill_is_the_same_error_everywhere_and_the_next_sync_heals(actors: Actors, engines: list[ThreadEngine]) -> None:
    def boom(bucket: int) -> None:
        if bucket == 3:
            raise ZeroDivisionError("the third is cursed")

    actors.sources[1].on_fill = boom
    error = actors.failure(lambda s: s.sync(1))
    assert (error.phase, error.version, error.bucket, error.engine) == ("transfer", 1, 3, None)
    assert "the third is cursed" in error.cause
    assert "actor rank 1" in error.cause
    assert all("the third is cursed" in engine.dirty for engine in engines)
    actors.sources[1].on_fill = lambda bucket: None
    actors.sync(1)
    assert all(holds(engine, 1) and not engine.dirty for engine in engines)


def test_an_exception_in_a_worker_names_engine_and_bucket(actors: Actors, engines: list[ThreadEngine]) -> None:
    def boom(worker: int, bucket: int) -> None:
        if (worker, bucket) == (1, 2):
            raise KeyError("no such layer")

    engines[1].on_bucket = boom
    error = actors.failure(lambda s: s.sync(1))
    assert error.engine == "e1"
    assert "no such layer" in error.cause
    assert engines[0].dirty, "an engine that loaded everything has not committed either"
    assert "resume 1" not in engines[0].calls


def test_a_filler_that_hangs_is_found_by_the_deadline_and_must_connect_anew(actors: Actors, engines: list[ThreadEngine]) -> None:
    release = threading.Event()
    actors.sources[1].on_fill = lambda bucket: release.wait() if bucket == 1 else None
    started_s = time.monotonic()
    error = actors.failure(lambda s: s.sync(1))
    assert time.monotonic() - started_s < 3 * TIMEOUT_S + 3
    assert "actor rank 1" in error.cause
    assert "fill bucket 1" in error.cause
    retry = actors.failure(lambda s: s.sync(1))
    assert "still inside the source" in retry.cause
    release.set()


@pytest.mark.parametrize(("verify", "found"), [("full", [True] * 3), ("sampled", [True, False, False]), ("off", [False] * 3)])
def test_a_flipped_bit_is_found_where_it_is_verified(engines: list[ThreadEngine], verify: str, found: list[bool]) -> None:
    actors = Actors(engines, verify=verify)
    actors.connect()

    def flip(worker: int, weights: dict[str, torch.Tensor]) -> None:
        if worker == 1:
            weights["w2"].view(torch.int32)[5] ^= 1 << 7

    engines[1].on_hold = flip
    for version, expected in enumerate(found, 1):
        outcomes = actors.both(lambda s, version=version: s.sync(version))
        assert [isinstance(o, WeightSyncError) for o in outcomes] == [expected] * 2, outcomes
        if expected:
            assert (outcomes[0].phase, outcomes[0].engine, outcomes[0].bucket) == ("verify", "e1", 2)
            assert "w2" in outcomes[0].cause
            assert "actor rank 1" in outcomes[0].cause
            assert all(engine.dirty for engine in engines)
    actors.close()


def test_sampling_covers_every_region_within_the_period(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines[:1])
    actors.connect()
    actors.sync(1)

    def flip(worker: int, weights: dict[str, torch.Tensor]) -> None:
        weights["w4"].view(torch.int32)[0] ^= 1

    engines[0].on_hold = flip
    outcomes = [actors.both(lambda s, version=version: s.sync(version))[0] for version in range(2, 2 + SAMPLE_PERIOD)]
    assert sum(isinstance(o, WeightSyncError) for o in outcomes) == 1
    actors.close()


def test_a_worker_that_hangs_is_found_by_the_deadline(actors: Actors, engines: list[ThreadEngine]) -> None:
    release = threading.Event()
    engines[1].on_bucket = lambda worker, bucket: release.wait(20) if worker == 0 and bucket == 2 else None
    error = actors.failure(lambda s: s.sync(1))
    release.set()
    assert (error.engine, error.bucket, error.phase) == ("e1", 2, "transfer")


def test_an_actor_rank_that_does_not_enter_is_found_by_the_deadline(actors: Actors) -> None:
    with pytest.raises(WeightSyncError, match=r"actor rank 1.*enter sync"):
        actors.syncers[0].sync(1)


def test_ranks_that_disagree_on_the_version_fail(actors: Actors) -> None:
    versions = iter((1, 2))
    lock = threading.Lock()

    def call(syncer: WeightSyncer) -> SyncReport:
        with lock:
            version = next(versions)
        return syncer.sync(version)

    outcomes = actors.both(call)
    assert all(isinstance(o, WeightSyncError) and "started version" in str(o) for o in outcomes)


def test_versions_only_grow(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(3)
    calls = list(engines[0].calls)
    for version in (3, 2):
        error = actors.failure(lambda s, version=version: s.sync(version))
        assert "versions only grow" in error.cause
    assert engines[0].calls == calls, "no engine was touched"
    assert not engines[0].dirty


def test_a_wrong_token_is_turned_away(engines: list[ThreadEngine]) -> None:
    engines[1].change_info = lambda info: {**info, "token": "guess"}
    actors = Actors(engines)
    error = actors.failure(lambda s: s.connect())
    assert error.phase == "connect"
    assert engines[1].dirty


def test_a_wrong_number_of_workers_is_named(engines: list[ThreadEngine]) -> None:
    engines[0].num_workers = 4
    error = Actors(engines).failure(lambda s: s.connect())
    assert "engine e0" in error.cause or "e0" in str(error)


def test_different_digests_are_refused(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines)
    actors.sources[1].placements = tuple(reversed(actors.sources[1].placements))
    error = actors.failure(lambda s: s.connect())
    assert "digest" in error.cause


def test_a_full_shared_memory_is_the_same_error_on_all_ranks(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines, num_slots=2**36)
    error = actors.failure(lambda s: s.connect())
    assert "bytes free, the ring needs" in error.cause


def test_connect_after_close_starts_over(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(1)
    actors.close()
    error = actors.failure(lambda s: s.sync(2))
    assert "not connected" in error.cause


def test_an_engine_is_added_by_a_new_connection_and_gets_the_present_version(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(4)
    added = ThreadEngine("e2")
    actors.close()
    actors.there.clear()
    assert actors.both(lambda s: s.connect([*engines, added])) == [None, None]
    report = actors.sync(4)
    assert all(holds(engine, 4) for engine in (*engines, added))
    assert set(report.engine_s) == {"e0", "e1", "e2"}


def test_the_report_counts_what_failed_before_and_knows_its_floor(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sources[0].on_fill = lambda bucket: 1 // 0
    actors.failure(lambda s: s.sync(1))
    assert actors.syncers[0].health.dirty == {"e0", "e1"}
    actors.sources[0].on_fill = lambda bucket: None
    report = actors.sync(1)
    assert (report.failures, report.engines_dirty) == ({"transfer": 1}, 0)
    assert report.floor_s is not None
    assert 0 < report.floor_s < report.seconds


def test_a_coordinator_that_is_gone_is_noticed(actors: Actors) -> None:
    server = actors.syncers[0]._server
    assert server is not None
    server.stop()
    with pytest.raises(WeightSyncError, match="heard from the coordinator"):
        actors.syncers[1].sync(1)


def test_errors_cross_processes() -> None:
    error = WeightSyncError(phase="transfer", cause="why", engine="e0", version=3, bucket=1)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.bucket, copy.engine) == (str(error), 1, "e0")


@pytest.mark.parametrize(
    "settings",
    [
        {"bucket_bytes": 0},
        {"num_slots": 0},
        {"timeout_s": 0},
        {"sink": "copy"},
        {"verify": "some"},
        {"transport": "pigeon"},
        {"bind_host": "0.0.0.0"},
        {"pause_mode": "stop"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"weight_sync.{next(iter(settings))}"):
        SyncConfig(**settings)


def test_who_was_stopped_beyond_its_deadline_hears_what_happened_meanwhile() -> None:
    class Failing:
        def receive(self, identity: bytes, raw: bytes, now: float) -> None:
            server.send(identity, m.Error(attempt=0, phase="transfer", cause="it took too long"))

        def lose(self, identity: bytes) -> None: ...

        def expire(self, now: float) -> None: ...

        def fail(self, cause: str) -> None: ...

        def process_of(self, identity: bytes) -> None: ...

    server = CoordinatorServer("127.0.0.1")
    server.start(Failing())
    peer = Peer(server.endpoint, m.ActorHello("", "", 0, 1, "", "", "", 1, None, ""))
    with pytest.raises(WeightSyncError, match="it took too long"):
        peer.receive(0, time.monotonic() - 1)
    with pytest.raises(TimeoutError):
        peer.receive(0, time.monotonic() - 1)
    peer.close()
    server.stop()
