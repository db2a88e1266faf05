"""The command line: arguments in, exit code out. What a command does stands in its own module."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlsync import __version__
from rlsync.cli import doctor, plan, verify
from rlsync.errors import RlsyncError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlsync``; returns the exit code: 0 fine, 1 the command found an error, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="rlsync", description="Keeps vLLM engines equal to a Megatron-Core actor.")
    parser.add_argument("--version", action="version", version=f"rlsync {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(commands.add_parser("doctor", help="check software, GPUs, memory and network of this machine, and say what to do"))
    plan.add_arguments(commands.add_parser("plan", help="what a sync of a model between two layouts moves and needs, on paper"))
    verify.add_arguments(commands.add_parser("verify", help="compare the weights of a Hugging Face folder with another or with an engine"))
    arguments = parser.parse_args(argv)
    try:
        return {"doctor": doctor.run, "plan": plan.run, "verify": verify.run}[arguments.command](arguments)
    except RlsyncError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
