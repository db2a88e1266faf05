"""Who takes part in a connection: whom rank 0 expects, who has dialled in, and whether they fit together. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlsync.control import messages as m


@dataclass(frozen=True, slots=True)
class Expected:
    """Who has to dial in, and what they are told. ``engines`` maps engine ids to their numbers of workers."""

    token: str
    run_id: str
    num_actors: int
    engines: Mapping[str, int]
    digest: str
    host: str
    shm_domain: str
    timeout_s: float
    welcome: m.Welcome


@dataclass(slots=True)
class Member:
    identity: bytes
    hello: m.ActorHello | m.WorkerHello
    attached: m.Attached | None = None
    lost: bool = False

    @property
    def engine(self) -> str | None:
        return self.hello.engine_id if isinstance(self.hello, m.WorkerHello) else None

    @property
    def place(self) -> int:
        """Actor rank, or the worker's number among all workers of its engine."""
        hello = self.hello
        return hello.actor_rank if isinstance(hello, m.ActorHello) else hello.dp_index * hello.world_size + hello.worker_rank

    def __str__(self) -> str:
        who = f"actor rank {self.place}" if self.engine is None else f"engine {self.engine} worker {self.place}"
        return f"{who} (pid {self.hello.pid} on {self.hello.host})"


class Roster:
    """The members by identity, in the order in which they came."""

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self.members: dict[bytes, Member] = {}

    def actors(self) -> list[Member]:
        return [p for p in self.members.values() if p.engine is None]

    def workers(self) -> list[Member]:
        return [p for p in self.members.values() if p.engine is not None]

    def twin(self, peer: Member) -> Member | None:
        """The member that already stands where ``peer`` wants to."""
        return next((p for p in self.members.values() if (p.engine, p.place) == (peer.engine, peer.place)), None)

    def is_attached(self) -> bool:
        """Whether everybody is here and has mapped the ring."""
        count = self.expected.num_actors + sum(self.expected.engines.values())
        return sum(p.attached is not None for p in self.members.values()) == count

    def mismatch(self, peer: Member) -> str | None:
        """Why a member with the right token cannot take part, or None."""
        hello, expected = peer.hello, self.expected
        if hello.shm_domain != expected.shm_domain:
            return (
                f"{peer} does not share /dev/shm with actor rank 0 on {expected.host}; the shm transport needs actor and engine "
                "on one host (and one /dev/shm where they run in containers)"
            )
        if isinstance(hello, m.ActorHello):
            if hello.world_size != expected.num_actors or not 0 <= hello.actor_rank < expected.num_actors:
                return f"{peer} counts {hello.world_size} actor ranks, actor rank 0 counts {expected.num_actors}"
            if hello.digest != expected.digest:
                return f"{peer} has plan digest {hello.digest[:16]}, actor rank 0 has {expected.digest[:16]}; their models differ"
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
        reports = [p.attached for p in self.members.values() if p.engine == engine and p.attached is not None]
        unused = set.intersection(*(set(r.unused_names) for r in reports))
        unfilled = set().union(*(r.unfilled_parameters for r in reports))
        findings = list(dict.fromkeys(f for r in reports for f in r.findings))
        if unused:
            findings.append(f"engine {engine} takes no tensor named {some(sorted(unused))}")
        if unfilled:
            findings.append(f"no tensor of the table fills {some(sorted(unfilled))} of engine {engine}")
        return findings

    def absent(self) -> list[str]:
        """Whom the connection waits for, in words."""
        here = {(p.engine, p.place): p for p in self.members.values()}
        wanted: list[tuple[str | None, int, str]] = [(None, rank, f"actor rank {rank}") for rank in range(self.expected.num_actors)]
        wanted += [(e, place, f"engine {e} worker {place}") for e, count in self.expected.engines.items() for place in range(count)]
        late = []
        for engine, place, name in wanted:
            peer = here.get((engine, place))
            if peer is None:
                late.append(f"{name}, which has not dialled in")
            elif peer.attached is None:
                late.append(f"{peer}, which has not mapped the ring")
        return late


def some(items: list[str], limit: int = 8) -> str:
    """The first few of many, for a sentence."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
