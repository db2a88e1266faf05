"""Entry point of a GRPO run: hydra in, exit code out."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from rlsync.errors import RlsyncError
from workers.config import lenient_overrides, load_config, register_resolvers
from workers.grpo_runner import GrpoRunner

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "reasoning"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="arithmetic-grpo-megatron")
def main(composed: DictConfig) -> None:
    try:
        GrpoRunner(load_config(composed)).run()
    except RlsyncError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    register_resolvers()
    sys.argv[1:] = lenient_overrides(sys.argv[1:])
    main()
