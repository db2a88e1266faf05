"""One step of a campaign after another: cause a fault, judge what came of it, heal what it broke, judge again.

Owns the order of a step and the versions. What a fault does stands in ``faults``, what is left behind is found by ``leaks``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlsync.coordinator.client import GRACE_S
from tests.chaos.actors import Actors
from tests.chaos.answers import Traffic, mixtures
from tests.chaos.drawing import Draw
from tests.chaos.engines import Engines
from tests.chaos.faults import ADDED, Scene
from tests.chaos.judgement import complaints
from tests.chaos.leaks import Leaks, Ports
from tests.chaos.rank import Ended
from tests.chaos.tap import Tap, Trap

# Of connections that nothing is asked of but to succeed: an engine that was stopped goes through what it missed first.
_HEAL_TIMEOUT_S = 60.0
_MOST_ENGINES = 2
# What an engine may give as its reason instead of the sync's error.
_OWN_REASONS = ("it is closed", "a process of it has ended", "it gives no sign of life")


class Violation(Exception):
    """A promise that was not kept. The campaign ends."""


@dataclass
class Step:
    """What happened in one step; grows as it goes on. ``seconds`` are those from the fault to the end of rank 0's call."""

    draw: Draw
    victim: str = ""
    outcome: str = ""
    error: str | None = None
    seconds: float = 0.0
    healed_by: str = ""
    samples: int = 0
    findings: list[str] = field(default_factory=list)


class Runner:
    """A campaign's world: engines, actors and the version that all engines serve.

    Attributes:
        limit_s: what any living rank's call may take from the fault on: the deadline of a phase, what a peer grants the coordinator, and
            ``slack_s`` for a machine that has other things to do.
        joined: engines that came while training went on.
    """

    def __init__(
        self, folders: dict[str, Path], tp_sizes: dict[str, int], timeout_s: float, slack_s: float, say: Callable[[str], None]
    ) -> None:
        self._timeout_s, self._say = timeout_s, say
        self.limit_s = timeout_s + GRACE_S + slack_s
        self._leaks, self._tap = Leaks(), Tap()
        self.engines = Engines(folders, tp_sizes, self._leaks)
        self._actors = Actors(folders)
        self._version, self._letter = 0, "a"
        self._settings: dict[str, Any] = {}
        self._synced, self._added, self.joined = False, 0, 0

    # One step.

    def run(self, step: Step, *, wait: bool) -> None:
        """Raises Violation; ``step`` says how far it came. ``wait`` for engines that are being started."""
        with self._tap.installed():
            self._take_in(wait=wait or not self.engines.standing)
            if step.draw.fault is ADDED:
                self._added += 1
                self.engines.start_later(f"added-{self._added}")
                step.outcome = "started"
            else:
                self._cause(step)
        step.findings += self._left_behind()
        if step.findings:
            raise Violation("; ".join(step.findings))

    def _cause(self, step: Step) -> None:
        draw = step.draw
        if draw.phase == "connect":
            self._actors.close()
            self._settings, self._synced = draw.settings | draw.fault.settings | {"timeout_s": self._timeout_s}, False
        else:
            self._stand_ready(draw)
        scene = self._scene(draw)
        step.victim = f"engine {scene.victim} worker {scene.worker}"
        if draw.fault.prepare is not None:
            draw.fault.prepare(scene)
        target = "b" if self._letter == "a" else "a"
        self._actors.read(target)
        self._strike(step, scene, target)
        if step.findings:
            raise Violation("; ".join(step.findings))
        self._heal(step, scene, target)

    def _scene(self, draw: Draw) -> Scene:
        ids = sorted(self.engines.standing)
        victim = ids[int(draw.engine * len(ids))]
        worker = int(draw.worker * self.engines.standing[victim].tp_size)
        moment = draw.moment
        if moment is not None and moment.ordinal >= len(ids):
            # With one engine there is no second one that is called.
            moment = replace(moment, ordinal=0)
        return Scene(self.engines, self._actors, self._tap, draw, moment, victim, worker, self._version + 1)

    def _strike(self, step: Step, scene: Scene, target: str) -> None:
        """The call that the fault meets, what it makes of everybody, and what was answered meanwhile."""
        draw, act = scene.draw, scene.draw.fault.act
        trap = None if scene.moment is None or act is None else Trap(scene.moment, lambda identity: act(scene, identity))
        traffic = Traffic(self.engines.handles, self.limit_s)
        traffic.start()

        def revive() -> None:
            if self._actors.stopped or any(s.stopped for s in self.engines.standing.values()):
                time.sleep(draw.revives_after * self._timeout_s)
                scene.revived_s = time.monotonic()
                self._wake()

        started_s, self._tap.trap, self._tap.all_committed = time.monotonic(), trap, False
        if draw.phase == "connect":
            ended = self._actors.connect(self.engines.handles, self._settings, revive, self.limit_s)
        else:
            ended = self._actors.sync(*draw.fault.versions(scene.version), revive, self.limit_s)
        self._tap.trap = None
        if trap is not None and trap.error is not None:
            raise trap.error
        self._judge(step, scene, ended, started_s if trap is None else trap.fired_s, target)
        for thread in scene.threads:
            thread.join(2 * self.limit_s + 60)
        samples = traffic.stop()
        step.samples = len(samples)
        step.findings += mixtures(samples, self.engines.letters, self.engines.references)

    def _judge(self, step: Step, scene: Scene, ended: list[Ended], fired_s: float | None, target: str) -> None:
        draw, error = scene.draw, ended[0].error
        step.outcome, step.error = ("refused" if error is not None else "committed"), ended[0].text
        if fired_s is None:
            step.findings.append(f"the moment never came; rank 0 ended with {ended[0].text}")
            return
        step.seconds = round(ended[0].at_s - fired_s, 2)
        step.findings += complaints(scene, ended, fired_s, self.limit_s)
        if draw.phase != "connect" and (error is None or self._tap.all_committed):
            # An engine that went on before another failed has served the version.
            for engine_id in self.engines.standing:
                self.engines.letters[engine_id, scene.version] = target
        if error is not None and not draw.fault.untouched:
            step.findings += self._not_refusing(str(error), list(self.engines.standing))
            return
        if error is None and draw.phase != "connect":
            self._version, self._letter, self._synced = scene.version, target, True
        serving = [e for e in self.engines.standing if not (draw.fault.costs_engine and e == scene.victim)]
        step.findings += self.engines.wrong_answers(serving, self._letter, self._version)

    def _not_refusing(self, reason: str, engine_ids: list[str]) -> list[str]:
        """Engines that would serve although they must not, or do not say why they refuse."""
        findings = []
        for engine_id in engine_ids:
            engine = self.engines.standing[engine_id].engine
            if engine.state != "dirty":
                findings.append(f"engine {engine_id} is {engine.state}, although: {reason}")
                continue
            try:
                findings.append(f"engine {engine_id} is dirty and answered {engine.generate([(1,)], {'max_tokens': 1})}")
            except Exception as refusal:
                if not any(words in str(refusal) for words in (reason, *_OWN_REASONS)):
                    findings.append(f"engine {engine_id} refuses with {type(refusal).__name__}: {refusal}, and not with: {reason}")
        return findings

    def _wake(self) -> None:
        self._actors.go_on()
        for standing in self.engines.standing.values():
            standing.go_on()

    # Before and after.

    def _connect(self, timeout_s: float, settings: dict[str, Any]) -> None:
        """A connection to all standing engines, which has to succeed."""
        self._actors.close()
        self._actors.restore()
        self._settings, self._synced = settings | {"timeout_s": timeout_s}, False
        self._expect_well("connect()", self._actors.connect(self.engines.handles, self._settings, self._wake, _HEAL_TIMEOUT_S))

    def _sync(self, version: int, letter: str) -> None:
        """A sync that has to succeed, and answers that have to be right after it."""
        self._actors.read(letter)
        for engine_id in self.engines.standing:
            self.engines.letters[engine_id, version] = letter
        self._expect_well(f"sync({version})", self._actors.sync(version, version, self._wake, _HEAL_TIMEOUT_S))
        self._version, self._letter, self._synced = version, letter, True
        findings = self.engines.wrong_answers(list(self.engines.standing), letter, version)
        if findings:
            raise Violation("; ".join(findings))

    @staticmethod
    def _expect_well(what: str, ended: list[Ended]) -> None:
        if len(ended) != 2 or any(e.error is not None for e in ended):
            raise Violation(f"{what} without a fault ended with {[e.text for e in ended]}")

    def _stand_ready(self, draw: Draw) -> None:
        """A connection with the deadline of the campaign, old or new, that has or has not had a sync."""
        usable = self._actors.connected and self._settings["timeout_s"] == self._timeout_s
        fits = usable and draw.fault.settings.items() <= self._settings.items()
        if not (fits and draw.reuses_connection):
            self._connect(self._timeout_s, draw.settings | draw.fault.settings)
        if draw.syncs_before and not self._synced:
            self._sync(self._version + 1, self._letter)

    def _heal(self, step: Step, scene: Scene, target: str) -> None:
        """Restore what the fault broke and complete a sync, over the same connection where it still can be used."""
        draw, fault = scene.draw, scene.draw.fault
        if fault.undo is not None:
            fault.undo(scene)
        if fault.costs_engine:
            self.engines.lose(scene.victim)
            self.engines.start_later(scene.victim)
        if draw.phase != "connect" and draw.heals_by_sync and not fault.loses_peer:
            step.healed_by = "next sync"
        else:
            step.healed_by = "new connection"
            self._actors.close()
            if not self.engines.standing:
                self._take_in(wait=True)
            self._connect(self._timeout_s if scene.revived_s is None else _HEAL_TIMEOUT_S, self._settings)
        self._sync(self._version + 1, target if draw.heals_to_other else self._letter)

    def _take_in(self, *, wait: bool) -> None:
        """Connect engines that have started and bring them to the version that the others serve, before they serve."""
        come = self.engines.arrivals(wait=wait)
        if not come:
            return
        findings = self._not_refusing("load_format=dummy", come)
        if findings:
            raise Violation(f"engines that were never synced: {'; '.join(findings)}")
        self._actors.close()
        while len(self.engines.standing) > _MOST_ENGINES:
            self.engines.lose(next(iter(self.engines.standing)))
        self._connect(self._timeout_s, {"verify": "full", "bucket_bytes": 100_000})
        self._sync(max(self._version, 1), self._letter)
        self.joined += len(come)
        self._say(f"joined at version {self._version}: engine {', '.join(come)}")

    # What is left behind.

    def _left_behind(self) -> list[str]:
        if self.engines.starting:
            return self.engines.closed(wait=False)
        return self.engines.closed(wait=True) + self._leaks.everywhere(self._owned, self._ports)

    def _owned(self) -> set[int]:
        return self.engines.owned() | {self._actors.process.pid or 0}

    def _ports(self) -> dict[int, Ports]:
        """The coordinator's; and with gloo one of each member of the group, and that of their meeting place."""
        members = int(self._actors.connected and self._settings.get("transport") == "gloo")
        server = None if self._actors.syncer is None else self._actors.syncer._server
        own = set() if server is None else {int(server.endpoint.rpartition(":")[2])}
        workers = {pid: Ports(ports, members) for pid, ports in self.engines.ports().items()}
        return workers | {os.getpid(): Ports(own, 2 * members), self._actors.process.pid or 0: Ports(set(), members)}

    def end(self) -> list[str]:
        """End everything; what is left behind."""
        self._wake()
        self._actors.end()
        return self.engines.close() + self._leaks.everywhere(set, dict)
