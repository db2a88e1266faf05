"""Colocated actor and engines: which side holds GPU memory in each phase of a step.

Engines sleep while the actor trains, the actor offloads while they generate. Owns the order and the notes for the user; moves no memory
itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from rlsync.errors import ConfigError
from workers.config import AnyConfig, RunConfig
from workers.placement import PlacementMode

ActorPart = Literal["weights", "grads", "optimizer"]


class Movers(Protocol):
    """Moves memory of engines and actor; a call returns when its move is complete."""

    def sleep_engines(self, level: int) -> None: ...

    def wake_engines(self, tag: str) -> None: ...

    def offload_actor(self, parts: tuple[ActorPart, ...]) -> None: ...

    def onload_actor(self, parts: tuple[ActorPart, ...]) -> None: ...


@dataclass(frozen=True, slots=True)
class ColocationPlan:
    """Memory that moves in a run: the engines' sleep level (0: they stay awake) and the offloaded parts of the actor."""

    sleep_level: int = 0
    parts: tuple[ActorPart, ...] = ()
    notes: tuple[str, ...] = ()


def check_overlap(config: AnyConfig, mode: PlacementMode) -> None:
    """Raise ConfigError for what actor and engines cannot do on the same devices: work at a time, or send each other messages by NCCL."""
    if mode is PlacementMode.COLLOCATED and config.has_engines and config.weight_sync.transport == "nccl":
        raise ConfigError(
            "weight_sync.transport nccl takes one process on each GPU, but cluster.component_placement gives actor and rollout the same "
            "devices; set it to auto, or give them devices of their own"
        )
    early = config.algorithm.early_scoring_prompts if isinstance(config, RunConfig) else 0
    asked = {"runner.async_steps": (config.runner.async_steps, "trains"), "algorithm.early_scoring_prompts": (early, "scores")}
    for name, (value, works) in asked.items():
        if value and mode is PlacementMode.COLLOCATED:
            raise ConfigError(
                f"{name} ({value}) has engines generate while the actor {works}, but cluster.component_placement gives both the same "
                f"devices, which one side has at a time; give actor and rollout devices of their own, or set {name} to 0"
            )


def plan_colocation(config: AnyConfig, mode: PlacementMode, *, on_gpu: bool) -> ColocationPlan:
    """The plan for a configuration on these devices.

    Raises:
        ConfigError: engines are to sleep although they share no GPU with the actor.
    """
    actor, wanted = config.actor, config.rollout.sleep_level
    switches: Mapping[ActorPart, bool] = {
        "weights": actor.offload_weight,
        "grads": actor.offload_grad,
        "optimizer": actor.offload_optimizer,
    }
    parts = tuple(part for part, is_on in switches.items() if is_on)
    if on_gpu and config.has_engines and mode is PlacementMode.COLLOCATED:
        # Level 2 drops the base of adapters too, which is sent once.
        derived = 1 if config.weight_sync.lora == "adapter" else 2
        return ColocationPlan(derived if wanted is None else wanted, parts)
    why = "actor and engines have GPUs of their own" if on_gpu else "there are no GPUs, and all memory is the host's"
    why = why if config.has_engines else "there are no engines to make room for"
    if wanted:
        raise ConfigError(f"rollout.sleep_level ({wanted}) is for engines on the actor's GPUs, but {why}; set it to 0 or null")
    keys = ", ".join(name for name in ("offload_weight", "offload_grad", "offload_optimizer") if getattr(actor, name))
    return ColocationPlan(notes=(f"nothing is offloaded ({keys}): {why}",) if keys else ())


class Colocation:
    """Moves memory between actor and engines at the phases of a step; the seconds of each move count under the name of its metric."""

    def __init__(self, plan: ColocationPlan, movers: Movers) -> None:
        self._plan, self._movers = plan, movers
        self._seconds: dict[str, float] = {}

    @property
    def alternate(self) -> bool:
        """Whether any memory moves; engines then start before the actor and sleep at once."""
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

    def _without_weights(self) -> tuple[ActorPart, ...]:
        return tuple(part for part in self._plan.parts if part != "weights")

    def _wake(self, tag: str) -> None:
        if self._plan.sleep_level:
            self._timed("time/engine_wake", lambda: self._movers.wake_engines(tag))

    def _timed(self, name: str, move: Callable[[], None]) -> None:
        began = time.monotonic()
        move()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began
