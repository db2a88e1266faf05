"""Messages of the sync channel and their wire form. Owns the vocabulary; knows no sockets and no process.

Every message that belongs to a sync carries ``attempt``, the count of ``sync`` calls since connect, so that an answer
to a failed sync is never taken for one to the next. Counters (``buckets_ready``, ``buckets_writable``) are cumulative:
a message that is read late says no less than one that is read in time.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeVar

import msgspec

from rlsync.errors import ConfigError
from rlsync.geometry import DTYPE_BYTES

MAX_MESSAGE_BYTES = 256 * 2**20


class BucketEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one HF tensor lies in its bucket. ``dtype`` is torch's name without the prefix, as ``"bfloat16"``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Buckets = tuple[tuple[BucketEntry, ...], ...]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base that gives every message its type tag."""


# From a peer to the coordinator.


class WorkerHello(Message):
    """First message of an engine worker. ``host`` names it in errors; ``shm_domain`` tells whose /dev/shm it sees."""

    token: str
    run_id: str
    engine_id: str
    dp_index: int
    worker_rank: int
    world_size: int
    host: str
    shm_domain: str
    pid_domain: str
    pid: int
    gpu_uuid: str | None
    vllm_version: str


class ActorHello(Message):
    """First message of an actor rank. ``digest`` is that of its BucketSource."""

    token: str
    run_id: str
    actor_rank: int
    world_size: int
    host: str
    shm_domain: str
    pid_domain: str
    pid: int
    digest: str


class Attached(Message):
    """The ring is mapped. A worker also lists HF names its model did not take and parameters that nothing would fill."""

    unused_names: tuple[str, ...] = ()
    unfilled_parameters: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


class Start(Message):
    """An actor rank has entered ``sync(version)``."""

    attempt: int
    version: int


class Filled(Message):
    """This actor rank's pieces of a bucket are in its slot."""

    attempt: int
    bucket: int
    nbytes: int


class Joined(Message):
    """A worker is inside its update and waits for buckets."""

    attempt: int
    version: int


class Done(Message):
    """Nothing of this worker refers to the bucket's slot any more."""

    attempt: int
    bucket: int


class Loaded(Message):
    """A worker's model holds every bucket and is post-processed."""

    attempt: int
    load_s: float
    finalize_s: float


class Committed(Message):
    """The worker has declared the version."""

    attempt: int


class Finish(Message):
    """Actor rank 0: every engine serves the version. ``report`` is the encoded SyncReport, handed to all actor ranks."""

    attempt: int
    report: bytes


class Failed(Message):
    """Something went wrong at this peer."""

    attempt: int
    phase: str
    cause: str
    engine: str | None = None
    bucket: int | None = None


class Goodbye(Message):
    """This peer closes on purpose; its process may end."""


# From the coordinator to a peer.


class Welcome(Message):
    """The ring to map; for a worker also the bucket table."""

    ring_path: str
    ring_token: str
    num_slots: int
    slot_bytes: int
    num_buckets: int
    buckets: Buckets = ()


class Connected(Message):
    """Every peer has mapped the ring."""


class Writable(Message):
    """Buckets ``[0, buckets_writable)`` may be filled."""

    attempt: int
    buckets_writable: int


class Ready(Message):
    """Buckets ``[0, buckets_ready)`` are complete in their slots."""

    attempt: int
    buckets_ready: int


class Commit(Message):
    """Every worker of every engine holds the version: declare it."""

    attempt: int
    version: int


class AllCommitted(Message):
    """Every worker has declared the version. ``load_s`` and ``finalize_s`` are those of the slowest worker."""

    attempt: int
    load_s: float
    finalize_s: float


class Finished(Message):
    """The sync is complete on all sides."""

    attempt: int
    report: bytes


class Error(Message):
    """Fields of a WeightSyncError, the same for every peer."""

    attempt: int
    phase: str
    cause: str
    engine: str | None = None
    version: int | None = None
    bucket: int | None = None


FromPeer = WorkerHello | ActorHello | Attached | Start | Filled | Joined | Done | Loaded | Committed | Finish | Failed | Goodbye
FromCoordinator = Welcome | Connected | Writable | Ready | Commit | AllCommitted | Finished | Error

_encoder = msgspec.msgpack.Encoder()
_from_peer = msgspec.msgpack.Decoder(FromPeer, strict=True)
_from_coordinator = msgspec.msgpack.Decoder(FromCoordinator, strict=True)

encode = _encoder.encode
M = TypeVar("M")


def decode_from_peer(raw: bytes) -> FromPeer:
    """Raises msgspec.ValidationError or msgspec.DecodeError on anything that is not one of the messages."""
    return _from_peer.decode(raw)


def decode_from_coordinator(raw: bytes) -> FromCoordinator:
    """Raises msgspec.ValidationError or msgspec.DecodeError on anything that is not one of the messages."""
    return _from_coordinator.decode(raw)


def bytes_needed(buckets: Buckets) -> int:
    """Bytes of the largest bucket, which every slot of a ring must have."""
    return max((entry.offset_bytes + entry.nbytes for bucket in buckets for entry in bucket), default=0)


def buckets_digest(buckets: Buckets) -> str:
    """Hash of the table; equal tables on two ranks have equal digests."""
    return hashlib.sha256(encode(buckets)).hexdigest()


def check_buckets(buckets: Buckets) -> None:
    """Raise ConfigError naming every entry that is doubled, misaligned, overlapping or of an unknown dtype."""
    findings, seen = [], set()
    for index, bucket in enumerate(buckets):
        end = 0
        for entry in sorted(bucket, key=lambda e: e.offset_bytes):
            if entry.name in seen:
                findings.append(f"{entry.name} is in the table twice")
            seen.add(entry.name)
            if entry.dtype not in DTYPE_BYTES:
                findings.append(f"{entry.name} has dtype {entry.dtype}, known are {', '.join(DTYPE_BYTES)}")
                continue
            if entry.offset_bytes % DTYPE_BYTES[entry.dtype]:
                findings.append(f"{entry.name} lies at byte {entry.offset_bytes}, which {entry.dtype} does not divide")
            if entry.offset_bytes < end:
                findings.append(f"{entry.name} overlaps its neighbour in bucket {index}")
            end = entry.offset_bytes + entry.nbytes
    if not seen:
        findings.append("no tensor in any bucket")
    if findings:
        raise ConfigError("bucket table: " + "; ".join(findings))
