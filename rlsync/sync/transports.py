"""Which transport serves which worker, from what everybody said of itself. Pure; opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlsync.coordinator.messages import ActorHello, Surveyed, WorkerHello
from rlsync.coordinator.roster import Member, some
from rlsync.errors import ConfigError

# Transports that carry messages between the members of a group.
GROUPS = frozenset({"gloo", "nccl"})


def choose_transports(survey: Surveyed, requested: str) -> tuple[str, ...]:
    """By worker of the survey. Raises ConfigError where the transport that is asked for does not reach a worker."""
    if requested == "auto":
        chosen = [next(name for name, finding in _FINDINGS.items() if finding(survey, w) is None) for w in survey.workers]
        # There is one group, and all its members speak alike.
        return tuple("gloo" if name in GROUPS and "gloo" in chosen else name for name in chosen)
    findings = [found for worker in survey.workers if (found := _FINDINGS[requested](survey, worker)) is not None]
    if findings:
        raise ConfigError(f"weight_sync.transport is {requested}, but: {some(list(dict.fromkeys(findings)), separator='; ')}")
    return (requested,) * len(survey.workers)


def _ipc_finding(survey: Surveyed, worker: WorkerHello) -> str | None:
    """Why a worker cannot read the actor's device memory, or None."""
    if worker.gpu_uuid is None:
        return f"{_name(worker)} has no GPU"
    host = [actor for actor in survey.actors if actor.memory == "host"]
    if host:
        return f"the parameters of {_some(host)} are in host memory"
    away = [actor for actor in survey.actors if _boot_id(actor) != _boot_id(worker)]
    if away:
        return f"{_name(worker)} is not on the host of {_some(away)}"
    same = [actor for actor in survey.actors if (actor.pid_domain, actor.pid) == (worker.pid_domain, worker.pid)]
    return f"{_name(worker)} and {_name(same[0])} are one process, which cannot map its own memory" if same else None


def _shm_finding(survey: Surveyed, worker: WorkerHello) -> str | None:
    """Why a worker does not see the ring, or None."""
    home = survey.actors[0]
    peers: tuple[ActorHello | WorkerHello, ...] = (*survey.actors, worker)
    strangers = [peer for peer in peers if peer.shm_domain != home.shm_domain]
    if not strangers:
        return None
    return (
        f"{_some(strangers)} does not share /dev/shm with actor rank 0 on {home.host}; the shm "
        "transport needs actor and engine on one host (and one /dev/shm where they run in containers); "
        "weight_sync.transport: auto serves such workers by gloo"
    )


def _nccl_finding(survey: Surveyed, worker: WorkerHello) -> str | None:
    """Why NCCL cannot connect a worker and the actor ranks, or None."""
    if worker.gpu_uuid is None:
        return f"{_name(worker)} has no GPU"
    host = [actor for actor in survey.actors if actor.memory == "host" or actor.gpu_uuid is None]
    if host:
        return f"the parameters of {_some(host)} are in host memory"
    others: tuple[ActorHello | WorkerHello, ...] = (*survey.actors, *(w for w in survey.workers if w is not worker))
    places: dict[str | None, ActorHello | WorkerHello] = {worker.gpu_uuid: worker}
    for other in others:
        twin = places.setdefault(other.gpu_uuid, other)
        if twin is not other and other.gpu_uuid is not None:
            return (
                f"{_name(twin)} and {_name(other)} share the GPU {other.gpu_uuid}, and NCCL takes one member on each; "
                "weight_sync.transport: auto serves such workers otherwise"
            )
    return None


# In the order in which they are preferred: why a worker cannot be served so, or None.
_FINDINGS: dict[str, Callable[[Surveyed, WorkerHello], str | None]] = {
    "ipc": _ipc_finding,
    "shm": _shm_finding,
    "nccl": _nccl_finding,
    "gloo": lambda survey, worker: None,
}


def _boot_id(hello: ActorHello | WorkerHello) -> str:
    """Of the booted kernel, the first part of both domains."""
    return hello.pid_domain.partition(":")[0]


def _name(hello: ActorHello | WorkerHello) -> str:
    return str(Member(b"", hello))


def _some(hellos: Sequence[ActorHello | WorkerHello]) -> str:
    return some([_name(hello) for hello in hellos])
