"""The worker processes of a run, actor ranks and the engines that it may have: placement, start, calls and end.

Owns their number and layout. Knows no step, data or reward.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import ray

from rlsync.engine.handles import Completion, Prompt
from rlsync.engine.handles.ray import CONTROL_GROUP, ENGINE_CLOSE_S, ENGINE_GRACE_S, ENGINE_STATE_S, ENGINE_THREADS, RayEngine
from rlsync.errors import RlsyncError, WeightSyncError
from rlsync.layout.topology import Topology
from rlsync.megatron.environment import rank_environment
from rlsync.models import model_of
from workers.actor import ActorRank
from workers.cluster import Cluster
from workers.colocation import ActorPart, check_overlap, plan_colocation
from workers.config import AnyConfig, actor_topology, validate_engines_on_machine, validate_machine, validate_world
from workers.forked_workers import ForkedEngine, ForkedRank
from workers.metrics import largest
from workers.model_folder import read_hf_config
from workers.placement import components_of, resolve_placement
from workers.remote import Call, Worker, WorkerSilentError, collect, collect_answered, collect_streamed
from workers.rollout import RolloutEngine, engine_arguments, some_with_logprobs

T = TypeVar("T")
_RANK_CLOSE_S = 5.0


class _Round:
    """The prompts that one engine answers in a call of ``generate``.

    Attributes:
        first: number of the first one.
        num_left: without an answer yet.
        ended_s: when the last answer came.
    """

    def __init__(self, begun_s: float, first: int, num_prompts: int) -> None:
        self.begun_s, self.first, self.num_left, self.ended_s = begun_s, first, num_prompts, begun_s

    def answered(self, count: int) -> None:
        """So many more."""
        if count:
            self.num_left, self.ended_s = self.num_left - count, time.monotonic()


class WorkerGroup:
    """Actor ranks and engines of one run. A context manager around ``start``: leaving it ends every process, also after a failed start.

    Attributes:
        topology: layout of the actor's ranks.
        colocation_plan: memory that actor and engines move in a step.
    """

    def __init__(self, config: AnyConfig, cluster: Cluster, rank_class: type[ActorRank]) -> None:
        self._config, self._cluster, self._rank_class = config, cluster, rank_class
        self._placement = resolve_placement(config.cluster.component_placement, cluster.num_devices, components_of(config))
        self.topology: Topology = actor_topology(config.actor.model, validate_world(config, len(self._placement.actor)))
        check_overlap(config, self._placement.mode)
        validate_machine(config, on_gpu=cluster.num_gpus > 0)
        hf_config = read_hf_config(Path(config.model_path), config.model_key)
        validate_engines_on_machine(config, hf_config, on_gpu=cluster.num_gpus > 0)
        self._ranks: list[Worker] = []
        self._engines: list[Worker] = []
        self._handles: list[RayEngine] = []
        self.colocation_plan = plan_colocation(config, self._placement.mode, on_gpu=cluster.num_gpus > 0)
        self._arguments = engine_arguments(
            config,
            on_gpu=cluster.num_gpus > 0,
            can_sleep=self.colocation_plan.sleep_level > 0,
            takes_pictures=model_of(hf_config).vision is not None,
        )
        self._num_replaced = 0
        self._aside: list[Future[Any]] = []
        self._rounds: list[_Round] = []
        self._counted_s = 0.0

    @property
    def description(self) -> str:
        """Numbers of ranks and engines and their layout, for the screen."""
        at, size = self.topology, self._config.rollout.tensor_parallel_size
        axes = (("TP", at.tp_size), ("PP", at.pp_size), ("CP", at.cp_size), ("DP", at.dp_size))
        layout = " ".join(f"{axis} {n}" for axis, n in axes if n > 1)
        engines = len(self._placement.rollout) // size
        actor = f"{at.world_size} actor rank{'s' * (at.world_size > 1)}{f' ({layout})' if layout else ''}"
        return f"{actor} and {engines} engine{'s' * (engines > 1)}{f' (TP {size})' if size > 1 else ''}" if engines else actor

    @property
    def num_devices(self) -> int:
        """Number of devices (GPUs or process slots) of ranks and engines."""
        return len({*self._placement.actor, *self._placement.rollout})

    @property
    def num_actor_devices(self) -> int:
        """Number of devices of the actor's ranks."""
        return len(self._placement.actor)

    @property
    def engine_ids(self) -> tuple[str, ...]:
        """Ids of the engines, as errors of a sync name them."""
        return tuple(handle.engine_id for handle in self._handles)

    def start(
        self,
        *,
        load_initial: bool,
        engines_first: Callable[[], None] | None = None,
        on_ready: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        """Start engines and actor ranks; ``on_ready`` is called with the name of each worker that is up and its seconds since the start.

        Side by side, or engines first where something is to happen between: an engine sees how much memory its GPU has left only
        while nobody else takes any, which ranks do from ``setup`` on. Their processes come up meanwhile.
        """
        self._engines += [self._launch_engine(i) for i in range(len(self._engine_devices))]
        starting = [engine.call("start") for engine in self._engines]
        self._ranks += [self._launch_rank(rank) for rank in range(self.topology.world_size)]
        began = time.monotonic()

        def up(call: Call) -> None:
            on_ready(call.worker.name, time.monotonic() - began)

        if engines_first is not None:
            self._hold(collect(starting, on_result=up))
            engines_first()
        address = self._address()
        (port,) = collect([self._ranks[0].call("listen", address)])
        setups = [rank.call("setup", address, port, load_initial) for rank in self._ranks]
        if engines_first is not None:
            collect(setups, on_result=up)
        else:
            self._hold(collect([*starting, *setups], on_result=up)[: len(starting)])

    def _hold(self, num_workers: Sequence[int]) -> None:
        """Handles on the engines that have started."""
        self._handles = [RayEngine(str(i), n, engine.actor) for i, (engine, n) in enumerate(zip(self._engines, num_workers, strict=True))]

    def _launch_rank(self, rank: int) -> Worker:
        world_size, device = self.topology.world_size, self._placement.actor[rank]
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", **rank_environment(self.topology)}
        return self._cluster.launch(
            self._rank_class, f"{self._config.actor.group_name}:{rank}", (device,), self._config, self.topology,
            name=f"actor rank {rank}", environment=environment, forked=ForkedRank,
        )  # fmt: skip

    @property
    def _engine_devices(self) -> Sequence[Sequence[int]]:
        return self._placement.engines(self._config.rollout.tensor_parallel_size)

    def _launch_engine(self, i: int) -> Worker:
        group = self._config.rollout.group_name
        return self._cluster.launch(
            RolloutEngine, f"{group}:{i}{f'-{self._num_replaced}' if self._num_replaced else ''}", self._engine_devices[i],
            str(i), self._arguments, name=f"engine {i}", threads=ENGINE_THREADS, groups=CONTROL_GROUP, forked=ForkedEngine,
        )  # fmt: skip

    def _address(self) -> str:
        """Address at which the other ranks reach rank 0."""
        places = [self._cluster.device(device) for device in self._placement.actor]
        return "127.0.0.1" if len({place.node_id for place in places}) == 1 else places[0].address

    def connect(self) -> None:
        """Connect the actor to all engines; an existing connection is replaced."""
        self.on_ranks("connect", self._handles, "weights" not in self.colocation_plan.parts)

    def on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        """One call on every actor rank."""
        return collect([rank.call(method, *arguments) for rank in self._ranks])

    def memory(self) -> dict[str, float]:
        """Memory metrics, each the maximum over ranks, engines or devices; lost workers are left out."""
        return largest(collect_answered([worker.call("memory") for worker in (*self._ranks, *self._engines)], ENGINE_STATE_S))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Mapping[str, Any],
        seeds: Sequence[int] | None,
        on_groups: Callable[[Mapping[int, tuple[Completion, ...]]], None] = lambda groups: None,
        *,
        some_logprobs: bool = False,
    ) -> list[tuple[Completion, ...]]:
        """Completions of all prompts, each by one engine; ``seeds`` has one seed per prompt. ``on_groups`` is called with those that have
        just ended, by the number of their prompt, while others are still under way. ``some_logprobs``: of every eighth prompt of each
        engine, from its first, log-probabilities are asked for whatever ``sampling`` says."""
        count = len(self._engines)
        bounds = [i * len(prompts) // count for i in range(count + 1)]
        timeout_s, begun_s = self._config.rollout.timeout_s, time.monotonic()
        limit_s = timeout_s + ENGINE_GRACE_S
        fields = partial(some_with_logprobs, sampling) if some_logprobs else lambda _: sampling
        calls = [
            engine.stream("stream", prompts[a:b], fields(b - a), None if seeds is None else seeds[a:b], timeout_s, timeout_s=limit_s)
            for engine, (a, b) in zip(self._engines, pairwise(bounds), strict=True)
        ]
        rounds = [_Round(begun_s, a, b - a) for a, b in pairwise(bounds)]
        self._rounds = [known for known in self._rounds if known.num_left or known.ended_s > self._counted_s] + rounds
        groups: dict[int, tuple[Completion, ...]] = {}

        def take(number: int, items: list[Any]) -> None:
            new = {rounds[number].first + i: group for pairs in items for i, group in pairs}
            rounds[number].answered(len(new))
            groups.update(new)
            on_groups(new)

        try:
            collect_streamed(calls, take)
        finally:
            for each in rounds:
                each.answered(each.num_left)
        return [groups[number] for number in range(len(prompts))]

    def generating_s(self, since_s: float, until_s: float) -> float:
        """Seconds between two instants of ``time.monotonic`` in which an engine had prompts to answer, mean over the engines. What ended
        before ``since_s`` is forgotten."""
        self._counted_s = since_s
        ends = ((known, until_s if known.num_left else min(until_s, known.ended_s)) for known in self._rounds)
        return sum(max(0.0, end - max(since_s, known.begun_s)) for known, end in ends) / max(1, len(self._engines))

    def aside(self, call: Callable[[], T]) -> Future[T]:
        """Run a call that waits for engines in a thread of its own; leaving the group waits for it, after the engines have ended."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name="rlsync-aside", daemon=True).start()
        self._aside = [known for known in (*self._aside, future) if not known.done()]
        return future

    def answers(self, prompts: Sequence[Prompt], sampling: Mapping[str, Any]) -> list[list[tuple[Completion, ...]]]:
        """Completions of all prompts by each engine."""
        timeout_s = self._config.rollout.timeout_s
        limit_s = timeout_s + ENGINE_GRACE_S
        return collect([engine.call("generate", prompts, sampling, None, timeout_s, timeout_s=limit_s) for engine in self._engines])

    # Memory, where actor and engines share GPUs.

    def sleep_engines(self, level: int) -> None:
        """Put every engine to sleep: its device memory is freed."""
        self._on_engines("sleep", level)

    def wake_engines(self, tag: str) -> None:
        """Allocate ``weights`` or ``kv_cache`` of every sleeping engine again."""
        self._on_engines("wake", (tag,))

    def reset_caches(self) -> None:
        """Make every engine forget the keys and values of earlier prompts."""
        self._on_engines("reset_caches")

    def offload_actor(self, parts: tuple[ActorPart, ...]) -> None:
        """Move these parts of every rank to the host."""
        self.on_ranks("offload", parts)

    def onload_actor(self, parts: tuple[ActorPart, ...]) -> None:
        """Move these parts of every rank to its device."""
        self.on_ranks("onload", parts)

    def _on_engines(self, method: str, *arguments: Any) -> None:
        timeout_s = self._config.weight_sync.timeout_s
        limit_s = timeout_s + ENGINE_GRACE_S
        collect([engine.call("call", method, *arguments, timeout_s, timeout_s=limit_s) for engine in self._engines])

    # Lost engines.

    def lost_engines(self, error: RlsyncError) -> dict[int, str]:
        """Lost engines with the reason: dead or stopped processes, and the engine that ``error`` names."""
        lost = {}
        for i, engine in enumerate(self._engines):
            try:
                reason = ray.get(engine.actor.failure_reason.remote(), timeout=ENGINE_STATE_S)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as lost_actor:
                reason = f"the Ray actor of engine {i} does not answer: {type(lost_actor).__name__}"
            if reason is None and isinstance(error, WeightSyncError) and error.engine == str(i):
                reason = str(error)
            if reason is None and isinstance(error, WorkerSilentError) and error.worker == engine.name:
                reason = str(error)
            if reason is not None:
                lost[i] = reason
        return lost

    def replace_engines(self, numbers: Sequence[int]) -> None:
        """Replace these engines, killing them if they do not end. New engines serve after ``connect`` and a sync."""
        old = [self._engines[i] for i in numbers]
        ray.wait([engine.actor.close.remote() for engine in old], num_returns=len(old), timeout=ENGINE_CLOSE_S)
        for engine in old:
            ray.kill(engine.actor, no_restart=True)
        for i in numbers:
            self._num_replaced += 1
            self._engines[i] = self._launch_engine(i)
        num_workers = collect([self._engines[i].call("start") for i in numbers])
        for i, workers in zip(numbers, num_workers, strict=True):
            self._handles[i] = RayEngine(str(i), workers, self._engines[i].actor)

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Engines end their own processes. Ranks leave in order, unless one of them hangs in a collective: the cluster kills it."""
        ranks = [rank.actor.close.remote() for rank in self._ranks]
        engines = [engine.actor.close.remote() for engine in self._engines]
        if ranks:
            ray.wait(ranks, num_returns=len(ranks), timeout=_RANK_CLOSE_S)
        if engines:
            ray.wait(engines, num_returns=len(engines), timeout=ENGINE_CLOSE_S)
        wait(self._aside, ENGINE_STATE_S)
