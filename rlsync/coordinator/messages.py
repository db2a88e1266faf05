"""The messages of the sync channel and their wire form (msgpack, tagged and bounded).

Every message that belongs to a sync carries ``attempt``, the count of ``sync`` calls since connect, so that an answer
to a failed sync is never taken for one to the next. Counters (``buckets_ready``, ``buckets_writable``) are cumulative:
a message that is read late loses nothing. Knows no sockets and no process.
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


class AdapterFactors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Low-rank adapters among the tensors of a source: ``lora_A`` and ``lora_B`` of each adapted module, by their names in PEFT.

    ``r`` is their rank, ``first`` the number of the first of them; all tensors from there on are factors. What an engine gets is scaled.
    """

    r: Count
    first: Count


# Bytes that one end of a transport sends to the other through the coordinator, which does not decode them.
Opaque = bytes


class WorkerAssignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a worker needs to take part.

    ``digest`` is that of the plan, ``destination`` the worker's in it; ``parts`` are by bucket. Its bytes come through ``transport``;
    ``end`` holds the arguments of its receiver, encoded. ``imports`` are the actor ranks whose exports it reads. The first ``num_frozen``
    buckets hold what the actor does not train; a sync brings them to workers that have lost them, or never had them.
    """

    digest: str
    num_slots: int
    verify: str
    destination: int
    parts: tuple[PackedPart, ...]
    transport: str
    end: Opaque
    imports: tuple[int, ...] = ()
    num_frozen: Count = 0


class ActorAssignment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything an actor rank needs to take part. ``ends``: by transport, the arguments of its sender, encoded. ``num_frozen``: as of a
    worker."""

    digest: str
    num_slots: int
    verify: str
    num_buckets: int
    ends: dict[str, Opaque]
    num_frozen: Count = 0


class RankExport(msgspec.Struct, frozen=True, array_like=True):
    """The export of an actor rank, encoded by the transport that reads it."""

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

    @property
    def worker(self) -> int:
        """Number among all workers of the engine, those of its data-parallel replicas one after the other."""
        return self.dp_index * self.world_size + self.worker_rank

    def __str__(self) -> str:
        return f"engine {self.engine_id} worker {self.worker}"


class ActorHello(Message):
    """First message of an actor rank. ``digest`` is that of its source's tensors and of its own placement.

    ``memory`` is where its buffers are; those of a rank without any are stable. ``frozen``: tensors of which it holds a part that it does
    not train, as half-open ranges of their numbers in the source's order.
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
    frozen: tuple[tuple[Count, Count], ...] = ()


class Recorded(Message):
    """The placement of a worker, recorded from its own loaders, and the sink it will use.

    ``unused_names`` are HF names that its model did not load; ``findings`` are reasons against a sync. ``remark`` says why a sink that
    moves more bytes was chosen, if one was.
    """

    placement: Placement
    sink: Name
    unused_names: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    remark: Text = ""


class Planned(Message):
    """Actor rank 0: the assignments of everybody, actor ranks in order, workers in the order in which ``Reports`` named them.

    Sent in parts, because all assignments together may exceed a message: each part continues the one before.
    """

    actors: tuple[ActorAssignment, ...]
    workers: tuple[WorkerAssignment, ...]

    def parts(self) -> Iterator[Planned]:
        """This message in the parts in which it is sent."""
        for actor in self.actors:
            yield Planned((actor,), ())
        for worker in self.workers:
            yield Planned((), (worker,))


class Attached(Message):
    """The peer has accepted its assignment: memory is mapped. ``exports``: of an actor rank, by transport."""

    exports: dict[str, Opaque] = {}


class Answered(Message):
    """Actor rank 0: an engine has answered a call, ``sync`` when it serves. ``connect`` has attempt 0."""

    attempt: Count
    engine: Name
    call: Literal["connect", "sync"]


class Start(Message):
    """An actor rank has entered ``sync(version)``. ``without_frozen``: of rank 0, engines hold what is frozen, and it is not sent."""

    attempt: Count
    version: int
    without_frozen: bool = False


class Exported(Message):
    """New exports of this actor rank, by transport, because memory has moved; sent before its first ``Filled`` of a sync."""

    attempt: Count
    exports: dict[str, Opaque]


class Filled(Message):
    """This actor rank's regions of a bucket are readable. Of buckets that are not sent, the first ones, a single message speaks for all up
    to ``bucket``; so do ``Summed`` and ``Done``.

    ``sums`` are the checksums of those that are verified. None: they follow in ``Summed``, because the regions are read where they are, and
    readers need not wait for their checksums.
    """

    attempt: Count
    bucket: Count
    nbytes: Count
    sums: tuple[Sum, ...] | None = ()


class Summed(Message):
    """This actor rank's checksums of a bucket whose ``Filled`` had None for them."""

    attempt: Count
    bucket: Count
    sums: tuple[Sum, ...]


class Joined(Message):
    """A worker is inside its update, its engine being paused, and waits for buckets."""

    attempt: Count
    version: int


class Done(Message):
    """This worker no longer reads the bucket's slot."""

    attempt: Count
    bucket: Count


class WorkerTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one worker in one sync, and its peak of extra memory.

    ``wait_s``: waiting for buckets. ``pull_s``: copying them. ``verify_s``: checksums. ``finalize_s``: work after the last bucket.
    """

    wait_s: float
    pull_s: float
    verify_s: float
    finalize_s: float
    extra_bytes: Count


class Loaded(Message):
    """A worker's model has every bucket, verified and post-processed.

    In a comparison the model is unchanged, and ``differences`` names the tensors that the buckets would have changed.
    """

    attempt: Count
    times: WorkerTimes
    differences: tuple[str, ...] = ()


class Committed(Message):
    """The worker has declared the version, and stays inside its update until ``Serve``."""

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
    """To an inspection: path -> hash of every tensor and setting that a worker computes from."""

    hashes: dict[str, str]


class Manifest(Message):
    """To a worker: all HF tensors of the source, in its order, the configured sink, and which of the tensors are adapters."""

    tensors: tuple[TensorSpec, ...]
    sink: Name
    adapter: AdapterFactors | None = None


class Reports(Message):
    """To actor rank 0: all peers have connected, and tensor names match. Actor ranks in order; ``records[i]`` is of ``workers[i]``.

    Sent in parts, because the records of hundreds of workers exceed a message: the first part has all hellos, each of the others adds
    records.
    """

    actors: tuple[ActorHello, ...]
    workers: tuple[WorkerHello, ...]
    records: tuple[Recorded, ...]

    def parts(self) -> Iterator[Reports]:
        """This message in the parts in which it is sent."""
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
    """To a worker: all peers have their assignments; ``exports`` are those it reads. To an actor rank: all engines have answered, too."""

    exports: tuple[RankExport, ...] = ()


class Writable(Message):
    """Buckets ``[0, buckets_writable)`` may be filled. ``group`` is the number of the group that carries messages.

    ``without_frozen``: of frozen buckets checksums alone are due. ``verifies_all``: checksums of all regions are due, whosever turn it is.
    ``all_joined``: every worker is inside its update, so that no engine goes on.
    """

    attempt: Count
    buckets_writable: Count
    group: Count = 0
    without_frozen: bool = False
    verifies_all: bool = False
    all_joined: bool = False


class Ready(Message):
    """Buckets ``[0, buckets_ready)`` are readable, and the checksums of ``[0, buckets_summed)`` are known. ``sums`` are those of this
    worker's regions that were not sent before.

    ``group`` is the number of the group that carries messages. ``exports`` are those renewed since ``Connected``. ``without_frozen``:
    frozen buckets bring checksums alone. ``verifies_all``: all regions are verified, whosever turn it is.
    """

    attempt: Count
    buckets_ready: Count
    sums: tuple[Sum, ...] = ()
    group: Count = 0
    exports: tuple[RankExport, ...] = ()
    without_frozen: bool = False
    verifies_all: bool = False
    buckets_summed: Count = 0


class Commit(Message):
    """Every worker of every engine holds the version: declare it."""

    attempt: Count
    version: int


class Serve(Message):
    """To a worker that has committed: every worker of every engine has, and its engine may answer from the version."""

    attempt: Count


class AllCommitted(Message):
    """Every worker has declared the version. ``times`` and ``differences`` are by worker, in the order of ``Reports``.

    ``begin_s``: seconds from the first ``Start`` until every worker had joined.
    """

    attempt: Count
    times: tuple[WorkerTimes, ...]
    differences: tuple[tuple[str, ...], ...] = ()
    begin_s: float = 0.0


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
# A first message is a hello; a larger one comes from a stranger. An actor rank's may name a frozen range in each of 100,000 experts.
MAX_HELLO_BYTES = 2**20

FromPeer = (
    WorkerHello | ActorHello | Recorded | Planned | Attached | Answered | Start | Exported | Filled | Summed | Joined | Done | Loaded
    | Committed | Finish | Failed | Goodbye | State
)  # fmt: skip
FromCoordinator = Manifest | Reports | Assignment | Connected | Writable | Ready | Commit | Serve | AllCommitted | Finished | Error

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_from_peer = msgspec.msgpack.Decoder(FromPeer, strict=True)
_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator, strict=True)


def encode(message: FromPeer | FromCoordinator) -> bytes:
    """Raises RlsyncError for a message larger than MAX_MESSAGE_BYTES: the other side would close the connection without a reason."""
    raw = _encoder.encode(message)
    if len(raw) > MAX_MESSAGE_BYTES:
        raise RlsyncError(f"{type(message).__name__} takes {len(raw):,} bytes, and a message may have {MAX_MESSAGE_BYTES:,}")
    return raw


def shortened(text: str) -> str:
    """A cause cut to fit a message. The end is kept: tracebacks name the error there."""
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
        # Errors that msgspec does not wrap.
        raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from None
