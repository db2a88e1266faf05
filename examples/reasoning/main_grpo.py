"""Entry point of a GRPO run: hydra in, exit code out. ``--check`` says what is wrong with a configuration and starts nothing."""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # also for those who start this file without the script beside it

from rlsync.gc_pause import gc_paused  # noqa: E402
from workers.check import GRPO_CHECKS  # noqa: E402
from workers.config import RunConfig  # noqa: E402
from workers.entry import keep_the_screen_for_the_run, main  # noqa: E402
from workers.forked_workers import ForkedEngine, ForkedRank, import_ahead  # noqa: E402
from workers.ray_access import cluster_address, protect_own_cluster  # noqa: E402


def run(config: RunConfig) -> None:
    """A whole run."""
    keep_the_screen_for_the_run()
    protect_own_cluster(cluster_address(config.cluster.num_nodes))
    import_ahead(config.cluster.num_nodes, (ForkedRank, ForkedEngine))
    # Only now: importing them takes seconds, and prints; and this imports Ray, for which all has to be set by then.
    with gc_paused(collect_after=False):
        from workers.grpo_runner import GrpoRunner

    GrpoRunner(config).run()


if __name__ == "__main__":
    sys.exit(
        main(
            sys.argv[1:],
            config_path=REPOSITORY / "configs" / "reasoning",
            config_name="arithmetic-grpo-megatron",
            task="reasoning",
            checks=GRPO_CHECKS,
            run=run,
        )
    )
