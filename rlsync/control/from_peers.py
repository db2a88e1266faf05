"""What an engine worker or an actor rank says to the coordinator. Knows no wire form and no answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from rlsync.control.fields import Count, Message, Name, Sum, Text
from rlsync.control.loans import Loan
from rlsync.control.shares import ActorShare, WorkerShare
from rlsync.layout.geometry import Placement
from rlsync.plan.packing import Memory


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

    ``memory`` is where its buffers are; those of a rank without any are lendable.
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
    """Actor rank 0: the shares of everybody, actor ranks in order, workers in the order in which ``Surveyed`` named them.

    It comes in parts, because all shares may be more than a message may be: each goes on where the one before has ended.
    """

    actors: tuple[ActorShare, ...]
    workers: tuple[WorkerShare, ...]

    def parts(self) -> Iterator[Planned]:
        """As it is sent."""
        for actor in self.actors:
            yield Planned((actor,), ())
        for worker in self.workers:
            yield Planned((), (worker,))


class Attached(Message):
    """The peer has taken its share: memory is mapped. An actor rank says what it lends."""

    loan: Loan | None = None


class Answered(Message):
    """Actor rank 0: an engine has answered a call. ``connect`` has attempt 0."""

    attempt: Count
    engine: Name
    call: Literal["connect", "pause", "update", "resume"]


class Start(Message):
    """An actor rank has entered ``sync(version)``."""

    attempt: Count
    version: int


class Lent(Message):
    """What this actor rank lends lies elsewhere since it last said so; comes before its first ``Filled`` of a sync."""

    attempt: Count
    loan: Loan


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
