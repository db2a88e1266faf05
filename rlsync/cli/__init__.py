"""The command line: arguments in, exit code out. What a command does stands in its own module, which is imported when it is called.

So each command needs only what it uses: `rlsync doctor` must run where next to nothing is installed, and another says what it lacks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from rlsync import __version__, logs
from rlsync.errors import RlsyncError

# Module of this package, with ``add_arguments`` and ``run``, and what it is for.
_COMMANDS = {
    "bench": "measure syncs on this machine beside its links and beside what others do, with random weights",
    "doctor": "check software, GPUs, memory and network of this machine, and say what to do",
    "plan": "what a sync of a model between two layouts moves and needs, on paper",
    "verify": "compare the weights of a Hugging Face folder with another or with an engine",
}
_REMEDY = "pip install -e . in the repository, or make setup, installs what rlsync needs; rlsync doctor lists what is missing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlsync``; returns the exit code: 0 fine, 1 the command found an error, 2 wrong usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    called = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="rlsync", description="Keeps vLLM engines equal to a Megatron-Core actor.")
    parser.add_argument("--version", action="version", version=f"rlsync {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    try:
        for name, purpose in _COMMANDS.items():
            command = commands.add_parser(name, help=purpose)
            if name == called:
                import_module(f"{__package__}.{name}").add_arguments(command)
        arguments = parser.parse_args(argv)
        logs.set_up()
        code: int = import_module(f"{__package__}.{arguments.command}").run(arguments)
    except RlsyncError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == __package__.partition(".")[0]:
            raise
        print(f"error: rlsync {called} needs {package}, which is not installed: {_REMEDY}", file=sys.stderr)
        return 1
    return code
