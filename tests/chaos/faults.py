"""The faults of a campaign: a table of what is done to whom and when, and of what the error then has to say.

A row causes its fault for real: signals to processes, bytes in shared memory, messages on the channel, a full file system. Judges nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlsync.coordinator import messages as m
from rlsync.plan.packing import side_by_side
from rlsync.transport.shm import Ring
from tests.chaos.actors import Actors
from tests.chaos.engines import Engines, Standing
from tests.chaos.leaks import SHM
from tests.chaos.tap import BUCKET_LEVELS, MOMENTS, Moment, Tap

if TYPE_CHECKING:
    from tests.chaos.drawing import Draw

_FILLER = SHM / "chaos-filler"
# What the file system keeps free: enough for engines to go on, too little for the ring of a connection with these settings.
_KEPT_BYTES = 8 * 2**20
_LARGE_RING = {"num_slots": 256, "transport": "shm"}


@dataclass
class Scene:
    """What a fault works on.

    Attributes:
        draw: what was drawn. moment: when it is to happen, or None where it is there from the start.
        victim, worker: an engine and one of its workers.
        version: the version that is due.
        threads: what the fault does beside the sync. revived_s: when what was stopped went on.
    """

    engines: Engines
    actors: Actors
    tap: Tap
    draw: Draw
    moment: Moment | None
    victim: str
    worker: int
    version: int
    threads: list[threading.Thread] = field(default_factory=list)
    revived_s: float | None = None

    @property
    def standing(self) -> Standing:
        return self.engines.standing[self.victim]

    def bucket(self) -> int:
        """The bucket that a fault in one of the three bucket phases is about."""
        syncer = self.actors.syncer
        assert syncer is not None and syncer._plan is not None
        return round(BUCKET_LEVELS[self.draw.phase] * (len(syncer._plan.parts) - 1))

    def send_to_worker(self, identity: bytes | None, raw: Callable[[], bytes]) -> None:
        """Have the coordinator send bytes to the victim, or to ``identity`` as long as it has not dialled in."""
        tap = self.tap
        assert tap.coordinator is not None and tap.server is not None
        server, coordinator = tap.server, tap.coordinator

        def send() -> None:
            workers = coordinator._roster.workers()
            wanted = [p.identity for p in workers if (p.engine, p.place) == (self.victim, self.worker)]
            to = wanted[0] if wanted else identity
            assert to is not None
            # Who has dialled in may be of another engine.
            self.victim = coordinator._roster.members[to].engine or self.victim
            server._socket.send_multipart([to, raw()])

        if identity is not None:
            send()
        else:
            tap.run_in_thread(send)


Act = Callable[[Scene, "bytes | None"], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One row.

    Attributes:
        phases: in which it is caused.
        act: what happens at the moment, told whom the message that passes is for. None: ``prepare`` does it all.
        names_engine: whether the error has to name the engine that is hit. says: words of its cause.
        exact_bucket: whether it has to name the bucket that is hit.
        may_commit: phases in which the fault can come too late, so that the sync commits on all engines.
        costs_engine: whether the engine has to be started anew. loses_peer: whether the connection cannot be used again.
        moments: those of a phase that fit; all by default.
        prepare, undo: what comes before the call and after it.
        settings: of the connection, beside those that are drawn.
        keeps_from_starting: whether an engine that is started meanwhile does not come up.
        versions: what ranks 0 and 1 enter a sync with, from the version that is due. untouched: whether engines go on serving.
    """

    name: str
    phases: tuple[str, ...]
    act: Act | None
    names_engine: bool = False
    says: str = ""
    exact_bucket: bool = False
    may_commit: tuple[str, ...] = ()
    costs_engine: bool = False
    loses_peer: bool = False
    moments: tuple[Moment, ...] | None = None
    prepare: Callable[[Scene], None] | None = None
    undo: Callable[[Scene], None] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    keeps_from_starting: bool = False
    versions: Callable[[int], tuple[int, int]] = lambda version: (version, version)
    untouched: bool = False

    def moments_in(self, phase: str) -> tuple[Moment, ...]:
        """The moments of a phase at which this fault can be caused."""
        if self.act is None:
            return ()
        return self.moments if self.moments is not None else MOMENTS[phase]


def _kill_rank(scene: Scene, _: bytes | None) -> None:
    scene.actors.kill()


def _stop_rank(scene: Scene, _: bytes | None) -> None:
    scene.actors.stop()


def _kill_worker(scene: Scene, _: bytes | None) -> None:
    scene.standing.kill(scene.standing.workers[scene.worker])


def _stop_worker(scene: Scene, _: bytes | None) -> None:
    scene.standing.stop(scene.standing.workers[scene.worker])


def _kill_core(scene: Scene, _: bytes | None) -> None:
    scene.standing.kill(scene.standing.core)


def _stop_core(scene: Scene, _: bytes | None) -> None:
    scene.standing.stop(scene.standing.core)


def _close_engine(scene: Scene, _: bytes | None) -> None:
    thread = threading.Thread(target=scene.standing.engine.close, name=f"closing {scene.victim}", daemon=True)
    scene.threads.append(thread)
    thread.start()


def _attempt(scene: Scene) -> int:
    assert scene.actors.syncer is not None
    return scene.actors.syncer._attempt


def _unusable_message(scene: Scene, identity: bytes | None) -> None:
    scene.send_to_worker(identity, lambda: m.encode(m.Writable(_attempt(scene), 0)))


def _noise(scene: Scene, identity: bytes | None) -> None:
    scene.send_to_worker(identity, lambda: b"\xc1 no message of any channel")


def _flip(scene: Scene, _: bytes | None) -> None:
    """One bit of one region that a worker reads, after every rank has filled it and before a worker is told."""
    syncer, bucket = scene.actors.syncer, scene.bucket()
    assert syncer is not None and syncer._plan is not None
    ring = syncer._endpoints.hosted.get("shm")
    assert isinstance(ring, Ring)
    row = syncer._plan.parts[bucket]
    destinations = [d for d, part in enumerate(row) if part.regions]
    destination = destinations[scene.worker % len(destinations)]
    slot = ring.slot(bucket % ring.num_slots)
    slot[side_by_side(part.nbytes for part in row)[destination] + row[destination].regions[-1].slot_offset] ^= 1


def _fill_shm(scene: Scene, _: bytes | None) -> None:
    free = os.statvfs(SHM).f_bavail * os.statvfs(SHM).f_frsize
    fd = os.open(_FILLER, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, free - _KEPT_BYTES)
    finally:
        os.close(fd)


def _empty_shm(scene: Scene) -> None:
    _FILLER.unlink(missing_ok=True)


def _order_wrongly(field_name: str) -> Callable[[Scene], None]:
    """The next update of the victim is told one less than what is going on, as its version or its attempt."""

    def prepare(scene: Scene) -> None:
        engine = scene.standing.engine
        update = type(engine).update_weights

        def wrong(info: dict[str, Any], timeout_s: float) -> None:
            update(engine, {**info, field_name: info[field_name] - 1}, timeout_s)

        engine.update_weights = wrong  # type: ignore[method-assign, assignment]

    return prepare


def _order_rightly(scene: Scene) -> None:
    vars(scene.standing.engine).pop("update_weights", None)


def _curse(scene: Scene) -> None:
    scene.actors.tell("curse", scene.bucket())


def _bless(scene: Scene) -> None:
    scene.actors.tell("curse", -1)


_ALL = tuple(MOMENTS)
_BUCKETS = tuple(BUCKET_LEVELS)
_LATE = ("commit", "resume")
_RANK_1 = "actor rank 1"
_ONLY_GROW = "versions only grow"
_REPORTED = (Moment("connect", "sent", "Reports"),)

FAULTS: tuple[Fault, ...] = (
    Fault("kill actor rank 1", _ALL, _kill_rank, says=_RANK_1, may_commit=_LATE, loses_peer=True),
    # A rank fills as far as there are slots before the workers hear of the first bucket, and then has nothing left to do.
    Fault("stop actor rank 1", _ALL, _stop_rank, says=_RANK_1, may_commit=(*_BUCKETS, "verify", *_LATE)),
    Fault("kill worker", _ALL, _kill_worker, True, may_commit=("resume",), costs_engine=True, loses_peer=True),
    Fault("stop worker", _ALL, _stop_worker, True, may_commit=("resume",)),
    Fault("kill engine core", _ALL, _kill_core, True, may_commit=("resume",), costs_engine=True, loses_peer=True),
    Fault("stop engine core", _ALL, _stop_core, True, may_commit=("resume",)),
    Fault("close engine", _ALL, _close_engine, True, may_commit=("connect", *_LATE), costs_engine=True, loses_peer=True),
    Fault("unusable message to worker", _ALL, _unusable_message, True, may_commit=("verify", *_LATE)),
    Fault("noise to worker", (*_BUCKETS, "verify", "commit"), _noise, True, may_commit=("verify", "commit"), loses_peer=True),
    Fault("flipped bit", _BUCKETS, _flip, says="not what was sent", exact_bucket=True, settings={"transport": "shm"}),
    Fault("exception in a source", _BUCKETS, None, says="is cursed", exact_bucket=True, prepare=_curse, undo=_bless),
    Fault(
        "full /dev/shm", ("connect",), _fill_shm,
        says="shared memory: /dev/shm has", moments=_REPORTED, undo=_empty_shm, settings=_LARGE_RING, keeps_from_starting=True,
    ),
    Fault("stale version", ("begin",), None, says=_ONLY_GROW, versions=lambda v: (v - 2, v - 2), untouched=True),
    Fault("repeated version", ("begin",), None, says=_ONLY_GROW, versions=lambda v: (v - 1, v - 1), untouched=True),
    Fault("versions that differ between ranks", ("begin",), None, says="started version", versions=lambda v: (v, v + 1)),
    Fault(
        "stale version told to a worker", ("begin",), None, True, "joined version", prepare=_order_wrongly("version"), undo=_order_rightly,
    ),
    Fault(
        "stale attempt told to a worker", ("begin",), None, True, "joined attempt", prepare=_order_wrongly("attempt"), undo=_order_rightly,
    ),
    Fault("engine added", ("idle",), None, costs_engine=True),
)  # fmt: skip
ADDED = FAULTS[-1]
