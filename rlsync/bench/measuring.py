"""Steps of one case, measured: rlsync's or a peer's. Collective over the actor ranks; what comes out is rank 0's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from rlsync.bench.actor import Actor, Clock
from rlsync.bench.peers import WAYS, Fleet
from rlsync.bench.spec import PEERS, Case, Measured, Spec
from rlsync.errors import ConfigError, PlacementError, WeightSyncError
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from rlsync.sync.config import LoraSync

# Phase of the bench -> seconds of SyncReport.
PHASES = {
    "pause": "pause_s", "begin": "begin_s", "fill": "fill_s", "wait": "wait_s", "pull": "pull_s", "verify": "verify_s",
    "finalize": "finalize_s", "transfer": "transfer_s", "commit": "commit_s", "resume": "resume_s", "whole": "seconds",
}  # fmt: skip
Step = Mapping[str, float]
_LOOK_S = 0.05


class Bench:
    """The two sides, and how a case is measured on them."""

    def __init__(self, spec: Spec, actor: Actor, fleets: Mapping[LoraSync, Fleet]) -> None:
        self._spec, self._actor, self._fleets = spec, actor, fleets
        self._before: list[int] = []

    def warm_up(self) -> None:
        """What every way uses, once, so that it is not the first one's memory: the actor's communicators, both sides' kernels."""
        self._actor.turn()
        self._actor.turn()
        self._actor.share(None)
        for fleet in self._fleets.values():
            fleet.call("bench_fingerprint")

    def sync(self, case: Case) -> Measured:
        """rlsync. What it refuses or fails at is in ``error``, on all ranks alike."""
        found = Measured(name=case.name, kind="rlsync", lora=case.lora, settings=case.settings)
        actor, source = self._actor, self._actor.sources[case.lora]
        source.stable_memory = not case.moves
        syncer = WeightSyncer(
            source,
            self._fleets[case.lora].engines,
            SyncConfig(**case.settings),
            rank=actor.rank,
            world_size=actor.world_size,
            broadcast=lambda payload: actor.share_bytes(payload)[0],
        )
        self._begin(found)
        try:
            with syncer:
                syncer.connect()
                found.connect_s, found.connect = time.monotonic() - found.begin_s, syncer.connect_seconds

                def step(number: int) -> Step:
                    if case.moves:
                        actor.move()
                    report = syncer.sync(1 + number)
                    found.report = msgspec.to_builtins(report)
                    return _phases(report)

                self._run(found, step)
                syncer.close()
                actor.settle()
                begin_s = time.monotonic()
                syncer.connect()
                found.reconnect_s, found.reconnect = time.monotonic() - begin_s, syncer.connect_seconds
        except (ConfigError, PlacementError, WeightSyncError) as error:
            found.error = str(error)
        return found

    def peer(self, name: str) -> Measured:
        """Others. Their failures end the bench, as they are not known on all ranks."""
        lora = PEERS[name].lora
        fleet = self._fleets[lora]
        way = WAYS[name](self._actor, fleet, self._spec)
        found = Measured(name=name, kind="peer", lora=lora, remark=way.remark)
        self._begin(found)
        way.connect()
        found.connect_s = time.monotonic() - found.begin_s

        def step(number: int) -> Step:
            clock = Clock()
            fleet.each(lambda engine: engine.pause("abort", "", self._spec.timeout_s))
            clock.lap("pause")
            way.transfer(clock)
            fleet.each(lambda engine: engine.reset_caches(self._spec.timeout_s))
            clock.lap("commit")
            fleet.each(lambda engine: engine.resume(number, self._spec.timeout_s))
            clock.lap("resume")
            return clock.stop()

        self._run(found, step, way.settling)
        way.close()
        return found

    def _run(self, found: Measured, step: Callable[[int], Step], settling: int = 0) -> None:
        """Settling, warm-up, steps, and two more that show what arrives.

        Each gives the engines other weights than the one before, and those two give all cases the same.
        """
        uncounted = settling + self._spec.warmup
        total = uncounted + self._spec.steps
        if self._actor.turned != bool(total % 2):
            self._actor.turn()
        rows = []
        for number in range(total):
            self._actor.turn()
            rows.append(dict(step(number)))
        found.first, found.steps = rows[0], rows[uncounted:]
        self._end(found)
        for number in range(total, total + 2):
            self._actor.turn()
            step(number)
            found.fingerprints.append(" ".join(self._fleets[found.lora].call("bench_fingerprint")))

    def _begin(self, found: Measured) -> None:
        """Memory of this rank and, on rank 0, of the workers."""
        fleet = self._fleets[found.lora]
        self._actor.settle()
        fleet.call("bench_let_go")
        self._before = [self._actor.memory(True), *fleet.call("bench_memory", True)]
        self._actor.settle()
        # For those who watch the driver's numbers.
        time.sleep(_LOOK_S)
        found.begin_s = time.monotonic()

    def _end(self, found: Measured) -> None:
        after = [self._actor.memory(False), *self._fleets[found.lora].call("bench_memory", False)]
        more = [b - a for a, b in zip(self._before, after, strict=True)]
        ranks = self._actor.share(more[0])
        found.extra_torch_bytes = {"actor rank": max(ranks), "engine worker": max(more[1:], default=0)}
        found.end_s = time.monotonic()


def _phases(report: SyncReport) -> Step:
    """``data`` is what has a floor: the workers' pull; and their waiting, where the actor copies first into what they read."""
    seconds = {phase: float(getattr(report, name)) for phase, name in PHASES.items()}
    staged = report.transport != "ipc" or report.staged_bytes > 0
    return {**seconds, "data": seconds["pull"] + (seconds["wait"] if staged else 0.0)}
