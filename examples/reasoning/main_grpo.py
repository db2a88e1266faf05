"""Entry point of a GRPO run: hydra in, exit code out."""

from __future__ import annotations

import logging
import signal
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
    # Only now: importing them already prints.
    from workers.config import load_config
    from workers.grpo_runner import GrpoRunner

    sys.exit(exit_code(lambda: GrpoRunner(load_config(composed)).run()))


def exit_code(run: Callable[[], None]) -> int:
    """What a run comes to: 0, 1 after an error that it explains, 130 after Ctrl-C, 143 after SIGTERM."""
    from rlsync.errors import RlsyncError

    signal.signal(signal.SIGTERM, _terminate)
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
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))  # also for those who start this file without the script beside it
    from workers.config import lenient_overrides, register_resolvers

    register_resolvers()
    sys.argv[1:] = lenient_overrides(sys.argv[1:])
    main()
