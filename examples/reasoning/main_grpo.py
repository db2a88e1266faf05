"""Entry point of a GRPO run: hydra in, exit code out. ``--check`` says what is wrong with a configuration and starts nothing."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # also for those who start this file without the script beside it

from workers.check import GRPO_CHECKS  # noqa: E402
from workers.config import RunConfig  # noqa: E402
from workers.entry import main  # noqa: E402
from workers.ray_access import cluster_address, protect_own_cluster  # noqa: E402


def run(config: RunConfig) -> None:
    """A whole run."""
    _keep_the_screen_for_the_run()
    protect_own_cluster(cluster_address(config.cluster.num_nodes))
    # Only now: importing them takes seconds, and prints; and this imports Ray, for which all has to be set by then.
    from workers.grpo_runner import GrpoRunner

    GrpoRunner(config).run()


def _keep_the_screen_for_the_run() -> None:
    """Libraries of this process say nothing below an error; workers print to logs of their own."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("megatron").setLevel(logging.ERROR)


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
