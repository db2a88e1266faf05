"""Who takes part in a connection: whom rank 0 expects, who has dialled in, whether they fit together, and who reads whose memory.

Sends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlsync.coordinator import messages as m
from rlsync.errors import first_few


@dataclass(frozen=True, slots=True)
class Expected:
    """Who has to dial in, and what they are told.

    ``engines`` maps engine ids to their numbers of workers; ``digests`` are those of the actor ranks' sources.
    """

    token: str
    run_id: str
    num_actors: int
    engines: Mapping[str, int]
    digests: tuple[str, ...]
    timeout_s: float
    manifest: m.Manifest


@dataclass(slots=True)
class Member:
    identity: bytes
    hello: m.ActorHello | m.WorkerHello
    recorded: m.Recorded | None = None
    attached: bool = False
    lost: bool = False
    # Closed its connection between syncs: it may go on, in another.
    left: bool = False

    @property
    def engine(self) -> str | None:
        return self.hello.engine_id if isinstance(self.hello, m.WorkerHello) else None

    @property
    def place(self) -> int:
        """Actor rank, or the worker's number among all workers of its engine."""
        hello = self.hello
        return hello.actor_rank if isinstance(hello, m.ActorHello) else hello.worker

    def __str__(self) -> str:
        who = f"actor rank {self.place}" if self.engine is None else self.hello
        return f"{who} (pid {self.hello.pid} on {self.hello.host})"


class Roster:
    """The members by identity, in the order in which they came, and the engines whose call to connect has returned.

    The cost of a message must not grow with the number of members, so no lookup that a message of a sync needs iterates over all.
    """

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self.members: dict[bytes, Member] = {}
        self.answered: set[str] = set()
        self._by_place: dict[tuple[str | None, int], Member] = {}
        self._size = expected.num_actors + sum(expected.engines.values())
        # In order, made when they are asked for.
        self._actors: list[Member] | None = None
        self._workers: list[Member] | None = None

    def admit(self, peer: Member) -> None:
        """Let a member in."""
        self.members[peer.identity] = self._by_place[peer.engine, peer.place] = peer
        self._actors = self._workers = None

    def actors(self) -> Sequence[Member]:
        """The actor ranks, in the order of their ranks."""
        if self._actors is None:
            self._actors = sorted((p for p in self.members.values() if p.engine is None), key=lambda p: p.place)
        return self._actors

    def workers(self) -> Sequence[Member]:
        """The workers: by engine, in the order in which rank 0 named these, and then by number."""
        if self._workers is None:
            order = {engine: index for index, engine in enumerate(self.expected.engines)}
            members = [p for p in self.members.values() if p.engine is not None]
            self._workers = sorted(members, key=lambda p: (order.get(p.engine or "", len(order)), p.place))
        return self._workers

    def twin(self, peer: Member) -> Member | None:
        """The member that already stands where ``peer`` wants to."""
        return self._by_place.get((peer.engine, peer.place))

    def not_here(self) -> set[tuple[str | None, int]]:
        """Who has not dialled in: engine id, or None for an actor rank, and the number there."""
        return set(self._wanted()) - self._by_place.keys()

    def _wanted(self) -> list[tuple[str | None, int]]:
        """Everybody, in order, as the keys of ``_by_place``."""
        wanted: list[tuple[str | None, int]] = [(None, rank) for rank in range(self.expected.num_actors)]
        return wanted + [(engine, place) for engine, count in self.expected.engines.items() for place in range(count)]

    def is_complete(self) -> bool:
        """Whether everybody has dialled in."""
        return len(self.members) == self._size

    def is_recorded(self) -> bool:
        """Whether everybody is here and every worker has said what it holds."""
        return self.is_complete() and all(p.recorded is not None for p in self.workers())

    def is_attached(self) -> bool:
        """Whether everybody is here and has taken its assignment."""
        return self.is_complete() and all(p.attached for p in self.members.values())

    def reports(self) -> m.Reports:
        """Everybody, for the plan."""
        actors = tuple(p.hello for p in self.actors() if isinstance(p.hello, m.ActorHello))
        workers = self.workers()
        hellos = tuple(p.hello for p in workers if isinstance(p.hello, m.WorkerHello))
        return m.Reports(actors, hellos, tuple(p.recorded for p in workers if p.recorded is not None))

    def mismatch(self, peer: Member) -> str | None:
        """Why a member with the right token cannot take part, or None."""
        hello, expected = peer.hello, self.expected
        if isinstance(hello, m.ActorHello):
            if hello.world_size != expected.num_actors or not 0 <= hello.actor_rank < expected.num_actors:
                return f"{peer} counts {hello.world_size} actor ranks, actor rank 0 counts {expected.num_actors}"
            if hello.digest != expected.digests[hello.actor_rank]:
                known = expected.digests[hello.actor_rank]
                return f"{peer} holds what has digest {hello.digest[:16]}, actor rank 0 expects {known[:16]}; their models differ"
            return None
        if hello.engine_id not in expected.engines:
            return f"{peer} is of an engine that nobody expects; expected are {', '.join(expected.engines)}"
        workers = expected.engines[hello.engine_id]
        if workers % hello.world_size or peer.place >= workers:
            return (
                f"{peer}: its engine has world size {hello.world_size} (dp index {hello.dp_index}), while its handle announced "
                f"{workers} workers; start the engine with the announced tensor, pipeline and data parallel sizes"
            )
        return None

    def name_findings(self, engine: str) -> list[str]:
        """Names are judged on the union of an engine's workers: with pipeline stages each takes only its own."""
        reports = [p.recorded for p in self.workers() if p.engine == engine and p.recorded is not None]
        unused = set.intersection(*(set(r.unused_names) for r in reports))
        findings = list(dict.fromkeys(f for r in reports for f in r.findings))
        if unused:
            findings.append(f"engine {engine} takes no tensor named {first_few(sorted(unused))}")
        return [f if engine in f else f"engine {engine}: {f}" for f in findings]

    def absent(self) -> list[tuple[str | None, str]]:
        """The members that the connection waits for: engine id, or None for an actor rank, and a description."""
        late: list[tuple[str | None, str]] = []
        is_recorded = self.is_recorded()
        for engine, place in self._wanted():
            peer = self._by_place.get((engine, place))
            if peer is None:
                name = f"actor rank {place}" if engine is None else f"engine {engine} worker {place}"
                late.append((engine, f"{name}, which has not dialled in"))
            elif peer.engine is not None and peer.recorded is None:
                late.append((engine, f"{peer}, which has not said what it holds"))
            elif is_recorded and not peer.attached:
                late.append((engine, f"{peer}, which has not taken its assignment"))
        if self.is_attached():
            stuck = [e for e in self.expected.engines if e not in self.answered]
            late += [(e, f"engine {e}, whose workers are connected, but whose init_weight_transfer has not returned") for e in stuck]
        return late


class ExportRegistry:
    """Exports of the actor ranks, the workers that import them, and what each worker was told. By transport."""

    def __init__(self) -> None:
        self._exports: dict[tuple[int, str], bytes] = {}
        self._is_renewed: set[tuple[int, str]] = set()
        self._imports: dict[bytes, list[tuple[int, str]]] = {}
        self._told: dict[bytes, int] = {}

    def add_reader(self, identity: bytes, transport: str, imports: tuple[int, ...]) -> None:
        """A worker reads what these actor ranks export."""
        self._imports[identity] = [(rank, transport) for rank in imports]

    def add(self, actor_rank: int, exports: Mapping[str, bytes]) -> None:
        """The first exports of an actor rank."""
        self._exports.update(((actor_rank, transport), export) for transport, export in exports.items())

    def renew(self, actor_rank: int, exports: Mapping[str, bytes]) -> None:
        """New exports of an actor rank, in place of its former ones."""
        self.add(actor_rank, exports)
        self._is_renewed.update((actor_rank, transport) for transport in exports)

    def first(self, identity: bytes) -> tuple[m.RankExport, ...]:
        """The exports that a worker imports."""
        return self._of(self._imports[identity])

    def renewed(self, identity: bytes, attempt: int) -> tuple[m.RankExport, ...]:
        """The exports that were renewed since ``first``; once per attempt, because a worker may have missed those of a failed attempt."""
        if self._told.get(identity) == attempt:
            return ()
        self._told[identity] = attempt
        return self._of([key for key in self._imports[identity] if key in self._is_renewed])

    def _of(self, keys: Sequence[tuple[int, str]]) -> tuple[m.RankExport, ...]:
        return tuple(m.RankExport(key[0], self._exports[key]) for key in keys if key in self._exports)
