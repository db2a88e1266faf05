"""Runs the GRPO loop with one part broken on purpose or left out, or on other devices; the tiny default, or another configuration.

python -m tests.integration.grpo_run FAULT [--placement JSON] [--config NAME] key=value ...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from workers.config import lenient_overrides, load_config, register_resolvers
from workers.entry import exit_code
from workers.ray_access import cluster_address, protect_own_cluster

protect_own_cluster(cluster_address(1))

import ray  # noqa: E402

from workers import worker_group  # noqa: E402 (imports Ray, as the next)
from workers.grpo_runner import GrpoRunner  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "reasoning"


class NeverSynced(GrpoRunner):
    """Engines answer with the weights that they read from ``rollout.model.model_path`` themselves (``rollout.validate_weight``)."""

    def _synced_rollout(self, prompts: Any, step: int, seconds: dict[str, float]) -> tuple[Any, Any]:
        self._colocation.before_sync()
        self._colocation.after_sync()
        return NoReport(), self._rollout(prompts, step)


class WithoutSync(GrpoRunner):
    """Syncs to the version of its step ``LAST_SYNCED``, then lets actor and engines drift apart; the log repeats the last report."""

    LAST_SYNCED = 1
    _last: list[Any]

    def _on_ranks(self, method: str, *arguments: Any) -> list[Any]:
        if method != "sync":
            return super()._on_ranks(method, *arguments)
        if arguments[0] < self.LAST_SYNCED:
            self._last = super()._on_ranks(method, *arguments)
        return self._last


class OtherPictures(WithoutSync):
    """In its ninth step engines are shown the pictures of other prompts than the actor is, and after it they are not synced any more."""

    LAST_SYNCED = 9

    def _rollout(self, prompts: Any, step: int) -> Any:
        shown = [*prompts[1:], prompts[0]] if step == self.LAST_SYNCED else prompts
        return super()._rollout([replace(prompt, images=other.images) for prompt, other in zip(prompts, shown, strict=True)], step)


class SavedOnce(GrpoRunner):
    """Saves where ``runner.save_interval`` says, not at the end, as a run that is killed there."""

    def _saves(self, step: int) -> bool:
        return step < self._total and super()._saves(step)


class StoppedEngines(GrpoRunner):
    """The process that owns engine 0 is stopped when the rollouts of steps 2 and 3 begin, and once more in none of their repetitions.
    Who is stopped is waited for several times, each time for ``WAIT_S`` where a run gives an engine up to 40 s."""

    WAIT_S = 4.0
    _to_stop = (2, 3)

    def run(self) -> None:
        worker_group.ENGINE_GRACE_S = worker_group.ENGINE_STATE_S = worker_group.ENGINE_CLOSE_S = self.WAIT_S
        super().run()

    def _rollout(self, prompts: Any, step: int) -> Any:
        if step in self._to_stop:
            self._to_stop = tuple(later for later in self._to_stop if later != step)
            os.kill(ray.get(self._group._engines[0].actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGSTOP)
        return super()._rollout(prompts, step)


class NoReport:
    """Of no sync."""

    def metrics(self) -> dict[str, float]:
        return {}


RUNNERS = {
    "none": GrpoRunner, "no-sync": WithoutSync, "never-synced": NeverSynced, "saved-once": SavedOnce, "other-pictures": OtherPictures,
    "stopped-engines": StoppedEngines,
}  # fmt: skip

if __name__ == "__main__":
    fault, *overrides = sys.argv[1:]
    placement, config = None, "arithmetic-grpo-megatron"
    if overrides[:1] == ["--placement"]:
        placement, overrides = json.loads(overrides[1]), overrides[2:]
    if overrides[:1] == ["--config"]:
        config, overrides = overrides[1], overrides[2:]
    register_resolvers()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose(config, overrides=lenient_overrides(overrides))
    if placement is not None:
        composed.cluster.component_placement = placement
    sys.exit(exit_code(lambda: RUNNERS[fault](load_config(composed)).run()))
