"""The vocabulary of the sync channel and its wire form: every message by name, and how it becomes bytes and is read again.

Every message that belongs to a sync carries ``attempt``, the count of ``sync`` calls since connect, so that an answer
to a failed sync is never taken for one to the next. Counters (``buckets_ready``, ``buckets_writable``) are cumulative:
a message that is read late says no less than one that is read in time. Knows no sockets and no process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, TypeVar

import msgspec

from rlsync.errors import RlsyncError
from rlsync.layout.geometry import Placement, TensorSpec
from rlsync.plan.packing import PackedPart
from rlsync.plan.transports import Memory

MAX_TEXT = 2**16
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Name = Annotated[str, msgspec.Meta(max_length=1024)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base that gives every message its type tag."""


class Sum(msgspec.Struct, frozen=True, array_like=True):
    """Checksum of one region of what a destination takes."""

    destination: Count
    region: Count
    value: int


# What a transport's two ends tell each other through the coordinator, which does not look into it.
Opaque = bytes


class WorkerAssignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a worker needs to take part.

    ``digest`` is that of the plan, ``destination`` the worker's in it; ``parts`` are by bucket. Its bytes come through ``transport``, whose
    receiver is made of ``end``. ``imports`` are the actor ranks whose exports it reads.
    """

    digest: str
    num_slots: int
    verify: str
    destination: int
    parts: tuple[PackedPart, ...]
    transport: str
    end: Opaque
    imports: tuple[int, ...] = ()


class ActorAssignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an actor rank needs to take part. ``ends``: by transport, of what its sender is made."""

    digest: str
    num_slots: int
    verify: str
    num_buckets: int
    ends: dict[str, Opaque]


class RankExport(msgspec.Struct, frozen=True, array_like=True):
    """What an actor rank exports, in the words of the transport that reads it."""

    actor_rank: Count
    export: Opaque


class WorkerHello(Message):
    """First message of an engine worker. ``host`` names it in errors; ``shm_domain`` tells whose /dev/shm it sees."""

    token: Name
    run_id: Name
    engine_id: Name
    dp_index: Count
    worker_rank: Count
    world_size: Count
    host: Name
    shm_domain: Name
    pid_domain: Name
    pid: Count
    gpu_uuid: str | None
    vllm_version: Name


class ActorHello(Message):
    """First message of an actor rank. ``digest`` is that of its source's tensors and of its own placement.

    ``memory`` is where its buffers are; those of a rank without any are stable.
    """

    token: Name
    run_id: Name
    actor_rank: Count
    world_size: Count
    host: Name
    shm_domain: Name
    pid_domain: Name
    pid: Count
    gpu_uuid: str | None
    digest: Name
    memory: Memory = "host"


class Recorded(Message):
    """What a worker holds, as its own loaders were seen to fill it, and the sink that will take it.

    ``unused_names`` are HF names that its model did not take, ``findings`` what cannot work. ``remark`` says why a sink
    that moves more bytes was taken, where one was.
    """

    placement: Placement
    sink: Name
    unused_names: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    remark: Text = ""


class Planned(Message):
    """Actor rank 0: the assignments of everybody, actor ranks in order, workers in the order in which ``Reports`` named them.

    It comes in parts, because all assignments may be more than a message may be: each goes on where the one before has ended.
    """

    actors: tuple[ActorAssignment, ...]
    workers: tuple[WorkerAssignment, ...]

    def parts(self) -> Iterator[Planned]:
        """As it is sent."""
        for actor in self.actors:
            yield Planned((actor,), ())
        for worker in self.workers:
            yield Planned((), (worker,))


class Attached(Message):
    """The peer has taken its assignment: memory is mapped. An actor rank says what it exports, by transport."""

    exports: dict[str, Opaque] = {}


class Answered(Message):
    """Actor rank 0: an engine has answered a call. ``connect`` has attempt 0."""

    attempt: Count
    engine: Name
    call: Literal["connect", "pause", "update", "resume"]


class Start(Message):
    """An actor rank has entered ``sync(version)``."""

    attempt: Count
    version: int


class Exported(Message):
    """What this actor rank exports, by transport, where it lies elsewhere since it last said so; before its first ``Filled`` of a sync."""

    attempt: Count
    exports: dict[str, Opaque]


class Filled(Message):
    """This actor rank's regions of a bucket are readable. ``sums`` are the checksums of those that are verified."""

    attempt: Count
    bucket: Count
    nbytes: Count
    sums: tuple[Sum, ...] = ()


class Joined(Message):
    """A worker is inside its update, its engine being paused, and waits for buckets."""

    attempt: Count
    version: int


class Done(Message):
    """Nothing of this worker refers to the bucket's slot any more."""

    attempt: Count
    bucket: Count


class WorkerTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one worker in one sync, and bytes of memory that it took beside what it always has.

    ``wait_s``: for buckets. ``pull_s``: taking them in. ``verify_s``: checksums. ``finalize_s``: after the last bucket.
    """

    wait_s: float
    pull_s: float
    verify_s: float
    finalize_s: float
    extra_bytes: Count


class Loaded(Message):
    """A worker's model holds and has verified every bucket, and is post-processed.

    In a comparison it holds what it held, and ``differences`` names what the buckets would have changed.
    """

    attempt: Count
    times: WorkerTimes
    differences: tuple[str, ...] = ()


class Committed(Message):
    """The worker has declared the version."""

    attempt: Count


class Finish(Message):
    """Actor rank 0: every engine serves the version. ``report`` is the encoded SyncReport, handed to all actor ranks."""

    attempt: Count
    report: bytes


class Failed(Message):
    """Something went wrong at this peer."""

    attempt: Count
    phase: Name
    cause: Text
    engine: str | None = None
    bucket: Count | None = None


class Goodbye(Message):
    """This peer closes on purpose; its process may end."""


class State(Message):
    """To an inspection: a hash by path of everything that a worker computes from."""

    hashes: dict[str, str]


class Manifest(Message):
    """To a worker: the HF tensors that there are, in the order of the source, and the sink that is asked for."""

    tensors: tuple[TensorSpec, ...]
    sink: Name


class Reports(Message):
    """To actor rank 0: everybody is here, and names are judged. Actor ranks in order; ``records[i]`` is of ``workers[i]``.

    It comes in parts, because what hundreds of workers hold is more than a message may be: the first has everybody, each of the others
    goes on with the records.
    """

    actors: tuple[ActorHello, ...]
    workers: tuple[WorkerHello, ...]
    records: tuple[Recorded, ...]

    def parts(self) -> Iterator[Reports]:
        """As it is sent."""
        yield Reports(self.actors, self.workers, ())
        for record in self.records:
            yield Reports((), (), (record,))

    def joined(self, part: Reports) -> Reports:
        """With the next part."""
        return Reports(self.actors + part.actors, self.workers + part.workers, self.records + part.records)


class Assignment(Message):
    """What a peer has to do with each bucket."""

    actor: ActorAssignment | None = None
    worker: WorkerAssignment | None = None


class Connected(Message):
    """To a worker: every peer has taken its assignment, and this is exported to it. To an actor rank: and every engine has returned."""

    exports: tuple[RankExport, ...] = ()


class Writable(Message):
    """Buckets ``[0, buckets_writable)`` may be filled. ``group`` is the number of the group that carries messages."""

    attempt: Count
    buckets_writable: Count
    group: Count = 0


class Ready(Message):
    """Buckets ``[0, buckets_ready)`` are complete. ``sums`` are checksums of what this worker takes that it was not yet told.

    ``group`` is the number of the group that carries messages. ``exports`` are those that were renewed since ``Connected``.
    """

    attempt: Count
    buckets_ready: Count
    sums: tuple[Sum, ...] = ()
    group: Count = 0
    exports: tuple[RankExport, ...] = ()


class Commit(Message):
    """Every worker of every engine holds the version: declare it."""

    attempt: Count
    version: int


class AllCommitted(Message):
    """Every worker has declared the version. ``times`` and ``differences`` are by worker, in the order of ``Reports``."""

    attempt: Count
    times: tuple[WorkerTimes, ...]
    differences: tuple[tuple[str, ...], ...] = ()


class Finished(Message):
    """The sync is complete on all sides."""

    attempt: Count
    report: bytes


class Error(Message):
    """Fields of a WeightSyncError, the same for every peer."""

    attempt: Count
    phase: Name
    cause: Text
    engine: str | None = None
    version: int | None = None
    bucket: Count | None = None


MAX_MESSAGE_BYTES = 256 * 2**20
# A first message is a hello, and whoever sends more is not one of ours.
MAX_HELLO_BYTES = 16 * 2**10

FromPeer = (
    WorkerHello | ActorHello | Recorded | Planned | Attached | Answered | Start | Exported | Filled | Joined | Done | Loaded | Committed
    | Finish | Failed | Goodbye | State
)  # fmt: skip
FromCoordinator = Manifest | Reports | Assignment | Connected | Writable | Ready | Commit | AllCommitted | Finished | Error

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_from_peer = msgspec.msgpack.Decoder(FromPeer, strict=True)
_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator, strict=True)


def encode(message: FromPeer | FromCoordinator) -> bytes:
    """Raises RlsyncError for more than the other side takes, which would hang up without a word."""
    raw = _encoder.encode(message)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise RlsyncError(f"{type(message).__name__} takes {len(raw):,} bytes, and a message may have {MAX_MESSAGE_BYTES:,}")
    return raw


def shortened(text: str) -> str:
    """A cause that fits into a message: the end is kept, where tracebacks say what happened."""
    return text if len(text) <= MAX_TEXT else "... " + text[4 - MAX_TEXT :]


def decode_from_peer(raw: bytes) -> FromPeer:
    """Raises msgspec.ValidationError or msgspec.DecodeError on anything that is not one of the messages."""
    return _decode(_from_peer, raw)


def decode_from_coordinator(raw: bytes) -> FromCoordinator:
    """Raises msgspec.ValidationError or msgspec.DecodeError on anything that is not one of the messages."""
    return _decode(_from_coordinator, raw)


def _decode(decoder: msgspec.msgpack.Decoder[M], raw: bytes) -> M:
    try:
        return decoder.decode(raw)
    except (UnicodeDecodeError, RecursionError, OverflowError) as error:
        # msgspec lets some errors of what it reads with through.
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from None
