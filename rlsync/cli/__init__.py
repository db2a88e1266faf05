"""The command line: arguments in, exit code out. What a command does stands in its own module, which is imported when it is called.

So each command needs only what it uses: `rlsync doctor` must run where next to nothing is installed, and another says what it lacks.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from rlsync import __version__, logs
from rlsync.errors import RlsyncError

# Module of this package, with ``add_arguments`` and ``run``, and what it is for.
_COMMANDS = {
    "bench": "measure syncs on this machine beside its links and beside what others do, with random weights",
    "compare": "run a model in transformers and in Megatron, and say how far apart they are and from which layer on",
    "convert": "make a checkpoint of Hugging Face or Megatron one of another form or layout, without GPUs",
    "doctor": "check software, GPUs, memory and network of this machine, and say what to do",
    "plan": "what a sync of a model between two layouts moves and needs, on paper",
    "verify": "compare the weights of a Hugging Face folder with another or with an engine",
}
# Exit codes of commands that a shell would say a signal ended.
_INTERRUPTED, _NO_READER = 128 + signal.SIGINT, 128 + signal.SIGPIPE
_REMEDY = "pip install -e . in the repository, or make setup, installs what rlsync needs; rlsync doctor lists what is missing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rlsync``; returns the exit code: 0 fine, 1 the command found an error, 2 wrong usage, 130 interrupted by Ctrl-C.

    Where the reader of the output goes away, as ``head`` does, the command ends without a word.
    """
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
        if not sys.warnoptions:
            # A dozen lines about fusions that a machine without GPUs lacks, where the command's own few are read.
            warnings.filterwarnings("ignore", module=r"megatron\.")
        code: int = import_module(f"{__package__}.{arguments.command}").run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        if not _lost_its_reader():
            raise
        return _NO_READER
    except RlsyncError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; run this as a user who may read and write it", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == __package__.partition(".")[0]:
            raise
        print(f"error: rlsync {called} needs {package}, which is not installed: {_REMEDY}", file=sys.stderr)
        return 1
    return code


def _lost_its_reader() -> bool:
    """Whether nobody reads standard output any more; what is left to write is then dropped, or Python complains of it at its end."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
