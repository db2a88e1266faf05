"""The command line: arguments in, exit code out. What a command does stands in its own module."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlsync import __version__
from rlsync.cli import doctor


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlsync``; returns the exit code: 0 fine, 1 the command found an error, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="rlsync", description="Keeps vLLM engines equal to a Megatron-Core actor.")
    parser.add_argument("--version", action="version", version=f"rlsync {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="check versions, GPUs and shared memory of this machine, and say what to do")
    parser.parse_args(argv)
    findings = doctor.examine()
    print("\n".join(map(str, findings)))
    return 1 if any(finding.level == "error" for finding in findings) else 0
