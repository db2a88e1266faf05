"""Entry point of a GRPO run: hydra in, exit code out."""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import hydra
from omegaconf import DictConfig

REPOSITORY = Path(__file__).resolve().parents[2]


@hydra.main(version_base="1.3", config_path=str(REPOSITORY / "configs" / "reasoning"), config_name="arithmetic-grpo-megatron")
def main(composed: DictConfig) -> None:
    _keep_the_screen_for_the_run()
    sys.exit(exit_code(lambda: _run(composed)))


def _run(composed: DictConfig) -> None:
    # Only now: importing them already prints.
    from workers.config import load_config
    from workers.ray_access import cluster_address, protect_own_cluster

    config = load_config(composed)
    protect_own_cluster(cluster_address(config.cluster.num_nodes))
    # And this imports Ray, for which all has to be set by then.
    from workers.grpo_runner import GrpoRunner

    GrpoRunner(config).run()


def exit_code(run: Callable[[], None]) -> int:
    """What a run comes to: 0, 1 after an error that it explains, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    from rlsync.errors import RlsyncError

    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: to go on without its terminal
        signal.signal(signal.SIGHUP, _terminate)
    try:
        run()
    except RlsyncError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _keep_the_screen_for_the_run() -> None:
    """Libraries of this process say nothing below an error; workers print to logs of their own."""
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C: everything that was started is ended too."""
    if number == signal.SIGHUP:
        _let_go_of_the_terminal()
    sys.exit(128 + number)


def _let_go_of_the_terminal() -> None:
    """Print to nowhere what would go to a terminal, which is gone: writing to it fails, in the middle of ending the others."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nowhere, output)
    os.close(nowhere)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # also for those who start this file without the script beside it
    from workers.config import lenient_overrides, register_resolvers

    register_resolvers()
    sys.argv[1:] = lenient_overrides(sys.argv[1:])
    main()
