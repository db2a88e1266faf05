"""Who has the GPUs when, where actor and engines share them: engines sleep while the actor trains, the actor gives back memory
while they generate. Owns the order of memory within a step, and what to tell the user about it; moves nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from rlsync.errors import ConfigError
from workers.config import RunConfig
from workers.placement import PlacementMode

Part = Literal["weights", "grads", "optimizer"]


class Movers(Protocol):
    """What can be told to move; each call returns when the memory is where it belongs."""

    def sleep_engines(self, level: int) -> None: ...

    def wake_engines(self, tag: str) -> None: ...

    def offload_actor(self, parts: tuple[Part, ...]) -> None: ...

    def onload_actor(self, parts: tuple[Part, ...]) -> None: ...


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """What moves in a run: the level at which engines sleep (0: they stay awake), and the parts of the actor that go."""

    sleep_level: int = 0
    parts: tuple[Part, ...] = ()
    notes: tuple[str, ...] = ()


def plan_turns(config: RunConfig, mode: PlacementMode, *, on_gpu: bool) -> TurnPlan:
    """What a configuration means on these devices.

    Raises:
        ConfigError: engines are told to sleep where that gives nobody anything.
    """
    actor, wanted = config.actor, config.rollout.sleep_level
    switches: Mapping[Part, bool] = {"weights": actor.offload_weight, "grads": actor.offload_grad, "optimizer": actor.offload_optimizer}
    parts = tuple(part for part, is_on in switches.items() if is_on)
    if on_gpu and mode is PlacementMode.COLLOCATED:
        return TurnPlan(2 if wanted is None else wanted, parts)
    why = "actor and engines have GPUs of their own" if on_gpu else "there are no GPUs, and all memory is the host's"
    if wanted:
        raise ConfigError(f"rollout.sleep_level ({wanted}) is for engines on the actor's GPUs, but {why}; set it to 0 or null")
    keys = ", ".join(name for name in ("offload_weight", "offload_grad", "offload_optimizer") if getattr(actor, name))
    return TurnPlan(notes=(f"nothing is offloaded ({keys}): {why}",) if keys else ())


class Turns:
    """The moments of a step at which memory changes hands. Each notes its seconds under a name of the step's metrics."""

    def __init__(self, plan: TurnPlan, movers: Movers) -> None:
        self._plan, self._movers = plan, movers
        self._seconds: dict[str, float] = {}

    @property
    def alternate(self) -> bool:
        """Whether anything moves at all; the engines then start before the actor, and sleep at once."""
        return self._plan.sleep_level > 0 or bool(self._plan.parts)

    def take_seconds(self) -> dict[str, float]:
        """Seconds of the moves since the last call, by metric."""
        taken, self._seconds = self._seconds, {}
        return taken

    def before_sync(self) -> None:
        """Weights of both sides are resident, nothing else of the actor that may go."""
        rest = self._without_weights()
        if rest:
            self._timed("time/actor/offload", lambda: self._movers.offload_actor(rest))
        if "weights" in self._plan.parts:
            # Gone where a rollout failed and the engines are synced once more.
            self._timed("time/actor/onload", lambda: self._movers.onload_actor(("weights",)))
        self._wake("weights")

    def after_sync(self) -> None:
        """The engines have everything they generate with, and the room of the actor's weights."""
        if "weights" in self._plan.parts:
            self._timed("time/actor/offload", lambda: self._movers.offload_actor(("weights",)))
        self._wake("kv_cache")

    def after_rollout(self) -> None:
        """The actor is complete, engines sleep."""
        if self._plan.sleep_level:
            self._timed("time/engine_sleep", lambda: self._movers.sleep_engines(self._plan.sleep_level))
        if self._plan.parts:
            self._timed("time/actor/onload", lambda: self._movers.onload_actor(self._plan.parts))

    def first_sleep(self) -> None:
        """The engines make room for the actor that is about to start."""
        if self._plan.sleep_level:
            self._movers.sleep_engines(self._plan.sleep_level)

    def _without_weights(self) -> tuple[Part, ...]:
        return tuple(part for part in self._plan.parts if part != "weights")

    def _wake(self, tag: str) -> None:
        if self._plan.sleep_level:
            self._timed("time/engine_wake", lambda: self._movers.wake_engines(tag))

    def _timed(self, name: str, move: Callable[[], None]) -> None:
        began = time.monotonic()
        move()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began
