"""Claims about a WeightSyncer that connects and syncs over the real channel and the real transports.

The engine is the only stand-in: what it does with the tensors is proved on real ones in tests/integration.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from rlsync.coordinator import messages as m
from rlsync.coordinator import server
from rlsync.errors import ConfigError, WeightSyncError
from rlsync.sync import SyncConfig, WeightSyncer
from rlsync.sync.syncer import ConnectInfo
from tests.phases import passed_deadline
from tests.thread_actors import SIZES, Actors, Numbers, holds
from tests.thread_engines import ThreadEngine


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


def test_engines_are_told_which_sync_they_pause_for_and_which_has_failed(actors: Actors, engines: list[ThreadEngine]) -> None:
    """Its pause is in a thread of its own, and may come behind what ends the sync."""
    heard: list[tuple[str, str]] = []
    pause = engines[0].pause

    def paused(mode: str, sync: str, timeout_s: float) -> None:
        heard.append(("pause", sync))
        pause(mode, sync, timeout_s)

    engines[0].pause = paused  # type: ignore[method-assign]
    engines[0].mark_dirty = lambda reason, sync="": heard.append(("dirty", sync))  # type: ignore[method-assign]
    actors.sync(1)
    actors.sources[0].on_fill = lambda bucket: 1 // 0
    actors.failure(lambda s: s.sync(2))
    actors.sources[0].on_fill = lambda bucket: None
    actors.sync(2)
    assert [kind for kind, _ in heard] == ["pause", "pause", "dirty", "pause"]
    first, failed, dirty, last = (sync for _, sync in heard)
    assert failed == dirty and len({first, failed, last, ""}) == 4


def test_nothing_is_written_before_every_engine_is_paused(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(1)
    paused, begun, pause = threading.Event(), threading.Event(), engines[1].pause

    def pause_late(mode: str, sync: str, timeout_s: float) -> None:
        assert paused.wait(60)
        pause(mode, sync, timeout_s)

    update = engines[0].update_weights

    def update_weights(update_info: dict[str, Any], timeout_s: float) -> None:
        begun.set()
        update(update_info, timeout_s)

    engines[1].pause, engines[0].update_weights = pause_late, update_weights  # type: ignore[method-assign]
    syncing = threading.Thread(target=lambda: actors.sync(2))
    syncing.start()
    # The other engine is inside its update, and buckets are filled.
    assert begun.wait(60)
    time.sleep(0.3)
    assert holds(engines[0], 1) and holds(engines[1], 1)
    paused.set()
    syncing.join(60)
    assert holds(engines[0], 2) and holds(engines[1], 2)


def test_one_slot_and_many_slots_carry_the_same_bytes(engines: list[ThreadEngine]) -> None:
    for num_slots in (1, 3, 8):
        actors = Actors(engines, num_slots=num_slots)
        actors.connect()
        actors.sync(num_slots)
        assert all(holds(engine, num_slots) for engine in engines)
        actors.close()


def test_filling_overlaps_loading(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines, timeout_s=60)
    events: list[str] = []
    filled = threading.Event()

    def fill(bucket: int) -> None:
        events.append(f"fill {bucket}")
        if bucket == 1:
            filled.set()

    def load(worker: int, bucket: int) -> None:
        assert filled.wait(30), "bucket 1 is not filled before bucket 0 is loaded"
        events.append(f"loaded {bucket}")

    actors.sources[0].on_fill = fill

    engines[0].on_bucket = load
    actors.connect()
    actors.sync(1)
    actors.close()
    assert events.index("fill 2") > events.index("loaded 0"), "bucket 2 shares its slot with bucket 0"


def test_a_thread_that_calls_sync_while_another_is_inside_is_refused_and_disturbs_nothing(
    actors: Actors, engines: list[ThreadEngine]
) -> None:
    inside, may_end = threading.Event(), threading.Event()

    def fill(bucket: int) -> None:
        inside.set()
        assert may_end.wait(60)

    actors.sources[0].on_fill = fill
    syncing = threading.Thread(target=actors.sync, args=(1,))
    syncing.start()
    assert inside.wait(60)
    with pytest.raises(WeightSyncError, match=r"in begin .version 2.: another thread is inside sync"):
        actors.syncers[0].sync(2)
    may_end.set()
    syncing.join(60)
    assert all(holds(engine, 1) for engine in engines)
    actors.sync(2)


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


def test_a_rank_that_dials_when_the_connection_has_failed_hears_why(engines: list[ThreadEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0, whose engine has failed, would have closed the coordinator."""
    monkeypatch.setattr(server, "GRACE_S", 60.0)
    engines[1].change_info = lambda info: {**info, "token": "guess"}
    actors, failed, dial = Actors(engines), threading.Event(), WeightSyncer._dial
    engines[0].mark_dirty = lambda reason, sync="": failed.set()  # type: ignore[method-assign]

    def dial_late(info: ConnectInfo) -> None:
        assert failed.wait(60)
        time.sleep(0.5)
        dial(actors.syncers[1], info)

    actors.syncers[1]._dial = dial_late  # type: ignore[method-assign]
    error = actors.failure(lambda s: s.connect())
    assert (error.phase, error.engine) == ("connect", "e1")


def test_an_error_of_one_rank_alone_while_it_connects_is_told_to_the_others(engines: list[ThreadEngine]) -> None:
    actors = Actors(engines)

    def attach(*_: object) -> threading.Thread:
        raise KeyboardInterrupt("of rank 1")

    actors.syncers[1]._attach = attach  # type: ignore[method-assign]
    first, second = actors.both(lambda s: s.connect())
    assert isinstance(second, KeyboardInterrupt)
    assert isinstance(first, WeightSyncError) and "KeyboardInterrupt: of rank 1" in first.cause


def test_a_wrong_number_of_workers_is_named(engines: list[ThreadEngine]) -> None:
    engines[0].num_workers = 4
    with passed_deadline("engine e0 worker 2", "engine e0 worker 3"):
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


def test_a_new_connection_may_be_of_a_new_source(actors: Actors, engines: list[ThreadEngine]) -> None:
    actors.sync(1)
    actors.close()
    actors.there.clear()
    before, actors.sources = actors.sources, [Numbers(rank, 2) for rank in range(2)]
    assert actors.both(lambda s: s.connect(source=actors.sources[s._rank])) == [None, None]
    for source in before:
        source.begin(7)
    actors.sync(2)
    assert all(holds(engine, 2) for engine in engines)
    taken = [half for source in before for half in source.buffers.values()]
    assert all(float(half[0]) >= 7000.0 for half in taken), "the former source is not asked"


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


def test_what_everybody_is_told_together_may_be_more_than_a_message_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many engines, of which a message holds what one worker has and does, and not what all have and do."""
    engines = [ThreadEngine(f"e{i}") for i in range(6)]
    sizes: dict[str, list[int]] = defaultdict(list)
    encode = m.encode

    def measured(message: Any) -> bytes:
        raw = encode(message)
        sizes[type(message).__name__].append(len(raw))
        return raw

    monkeypatch.setattr(m, "encode", measured)
    for limit in (m.MAX_MESSAGE_BYTES, 0):
        monkeypatch.setattr(m, "MAX_MESSAGE_BYTES", limit or max(max(found) for found in sizes.values()))
        actors = Actors(engines, timeout_s=30.0)
        actors.connect()
        actors.sync(1)
        assert all(holds(engine, 1) for engine in engines)
        actors.close()
    assert min(sum(sizes["Recorded"]), sum(sizes["Assignment"])) / 2 > m.MAX_MESSAGE_BYTES, "by one sync of the two: all of it is more"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_message_that_is_too_large_is_everybodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """zmq hangs up on whoever sends it, without a word."""
    monkeypatch.setattr(m, "MAX_MESSAGE_BYTES", 6000)
    actors = Actors([ThreadEngine("e0", 30)])
    errors = actors.both(lambda syncer: syncer.connect())
    assert all("bytes, and a message may have 6,000" in str(error) for error in errors), errors
    actors.close()


def test_a_handle_that_lacks_a_call_of_a_sync_is_refused_before_any_engine_is_asked() -> None:
    class Former:
        """As handles were before an engine's part of a sync became one call."""

        engine_id, num_workers, dirty = "former", 1, ""

        def mark_dirty(self, reason: str, sync: str = "") -> None:
            self.dirty = reason

        def init_weight_transfer(self, info: dict[str, Any], timeout_s: float) -> None:
            raise AssertionError("asked")

    whole = ThreadEngine("whole")
    syncer = WeightSyncer(Numbers(0, 1), [whole, Former()], SyncConfig(timeout_s=1))
    with pytest.raises(WeightSyncError, match="the handle of engine former, a Former, has no sync; EngineHandle"):
        syncer.connect()
    assert whole.calls == []


def test_what_cannot_be_connected_is_said_before_anybody_is_asked() -> None:
    source, config = Numbers(0, 1), SyncConfig(timeout_s=1)
    engine = ThreadEngine("unstarted")
    engine.num_workers = 0
    for engines, words in (([engine], "engine unstarted has no workers: start"), ([], "rank 0 needs the handle of at least one engine")):
        with WeightSyncer(source, [ThreadEngine("whole")], config) as syncer, pytest.raises(WeightSyncError, match=words):
            syncer.connect(engines=engines)
    for options, words in (
        ({"rank": 2, "world_size": 2}, "rank 2 is none of 2 actor ranks"),
        ({"rank": 1, "world_size": 2}, "the source has placements of 1 actor ranks, and world_size is 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            WeightSyncer(source, [engine], config, broadcast=bytes, **options)
    whole = ThreadEngine("whole")
    with WeightSyncer(source, [whole], config) as syncer:
        syncer.connect()
        calls = list(whole.calls)
        for version in (1.5, "2", None, 2**63):
            with pytest.raises(ConfigError, match=r"sync: version is .*; it must be"):
                syncer.sync(version)  # type: ignore[arg-type]
        assert whole.calls == calls and not whole.dirty
        assert syncer.sync(np.int64(3)).version == 3  # type: ignore[arg-type]
    for key, number in (("num_slots", 1.5), ("bucket_bytes", True), ("bucket_bytes", "1")):
        with pytest.raises(ConfigError, match=f"weight_sync.{key} is {number!r}; it must be a whole number"):
            SyncConfig(**{key: number})


class _Unreachable(ThreadEngine):
    """An engine whose handle cannot say what it is asked, as one of somebody else's whose process is gone."""

    @property
    def num_workers(self) -> int:
        raise LookupError("nobody there")

    @num_workers.setter
    def num_workers(self, number: int) -> None:
        pass


def test_whatever_keeps_rank_0_from_listening_is_everybodys_error_and_leaves_nothing() -> None:
    """Other ranks wait for its word in a collective, which has no deadline of a sync."""
    actors = Actors([_Unreachable("gone")])
    before = _coordinators()
    try:
        error = actors.failure(lambda s: s.connect())
    finally:
        actors.close()
    assert error.phase == "connect" and "LookupError" in error.cause and "nobody there" in error.cause
    assert _coordinators() <= before


def test_a_broadcast_that_fails_leaves_no_coordinator_and_no_clean_engine(engines: list[ThreadEngine]) -> None:
    def broadcast(payload: bytes) -> bytes:
        raise RuntimeError("the process group has timed out")

    before = _coordinators()
    syncer = WeightSyncer(Numbers(0, 2), engines, SyncConfig(), world_size=2, broadcast=broadcast)
    with pytest.raises(RuntimeError, match="timed out"):
        syncer.connect()
    assert _coordinators() <= before
    assert all("timed out" in engine.dirty for engine in engines) and syncer.health.failures["connect"] == 1


def _coordinators() -> set[int | None]:
    """Their threads."""
    return {thread.ident for thread in threading.enumerate() if thread.name == "rlsync-coordinator"}
