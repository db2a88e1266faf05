"""What the coordinator says to an engine worker or an actor rank. Knows no wire form, and not when it is said."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from rlsync.control.fields import Count, Message, Name, Sum, Text
from rlsync.control.from_peers import ActorHello, Recorded, WorkerHello, WorkerTimes
from rlsync.control.loans import Loan
from rlsync.control.shares import ActorShare, WorkerShare
from rlsync.layout.geometry import TensorSpec


class Catalogue(Message):
    """To a worker: the HF tensors that there are, in the order of the source, and the sink that is asked for."""

    tensors: tuple[TensorSpec, ...]
    sink: Name


class Surveyed(Message):
    """To actor rank 0: everybody is here, and names are judged. Actor ranks in order; ``records[i]`` is of ``workers[i]``.

    It comes in parts, because what hundreds of workers hold is more than a message may be: the first has everybody, each of the others
    goes on with the records.
    """

    actors: tuple[ActorHello, ...]
    workers: tuple[WorkerHello, ...]
    records: tuple[Recorded, ...]

    def parts(self) -> Iterator[Surveyed]:
        """As it is sent."""
        yield Surveyed(self.actors, self.workers, ())
        for record in self.records:
            yield Surveyed((), (), (record,))

    def joined(self, part: Surveyed) -> Surveyed:
        """With the next part."""
        return Surveyed(self.actors + part.actors, self.workers + part.workers, self.records + part.records)


class Share(Message):
    """What a peer has to do with each bucket."""

    actor: ActorShare | None = None
    worker: WorkerShare | None = None


class Lender(msgspec.Struct, frozen=True, array_like=True):
    """An actor rank and what it lends."""

    actor_rank: Count
    loan: Loan


class Connected(Message):
    """To a worker: every peer has taken its share, and this is lent. To an actor rank: and every engine has returned from its call."""

    loans: tuple[Lender, ...] = ()


class Writable(Message):
    """Buckets ``[0, buckets_writable)`` may be filled. ``group`` is the number of the group that carries messages."""

    attempt: Count
    buckets_writable: Count
    group: Count = 0


class Ready(Message):
    """Buckets ``[0, buckets_ready)`` are complete. ``sums`` are checksums of this worker's stream that it was not yet told.

    ``group`` is the number of the group that carries messages. ``loans`` are those that were renewed since ``Connected``.
    """

    attempt: Count
    buckets_ready: Count
    sums: tuple[Sum, ...] = ()
    group: Count = 0
    loans: tuple[Lender, ...] = ()


class Commit(Message):
    """Every worker of every engine holds the version: declare it."""

    attempt: Count
    version: int


class AllCommitted(Message):
    """Every worker has declared the version. ``times`` and ``differences`` are by worker, in the order of ``Surveyed``."""

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
