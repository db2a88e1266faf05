"""From a command line to a run: hydra composes, the run is checked, and only then is anything heavy imported.

The same for every runner: a script hands over its checks and what makes its runner.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rlsync.cli.lines import wrapped
from rlsync.errors import ConfigError, RlsyncError
from workers.check import check_run
from workers.check_report import Check, Report
from workers.config import Task, hydra_arguments, register_resolvers
from workers.config.fields import dotted_keys
from workers.config.foreign_keys import hint
from workers.config.tasks import CONFIG_OF_TASK

CHECK = "--check"
# With it the findings, the plan and the memory are one JSON object.
AS_JSON = "--json"


def main(
    arguments: Sequence[str], *, config_path: Path, config_name: str, task: Task, checks: Sequence[Check], run: Callable[[Any], None]
) -> int:
    """Compose, check, and unless ``--check`` is among the arguments, run. Returns the exit code: 1 after an error that it explains.

    Args:
        arguments: hydra's, in which ``key=value`` and ``+key=value`` both set a key; ``--check``, and ``--json`` with it.
        config_path, config_name: of the configuration where the arguments name none.
        task: the kind of run, which the configuration has to be of.
        run: called with the configuration where there are no findings; the place for slow imports.
    """
    only_check, as_json = CHECK in arguments, AS_JSON in arguments
    if as_json and not only_check:
        print(f"error: {AS_JSON} is the form of what {CHECK} finds; give both, or neither", file=sys.stderr)
        return 1
    code = 0

    @hydra.main(version_base="1.3", config_path=str(config_path), config_name=config_name)
    def composed_main(composed: DictConfig) -> None:
        nonlocal code
        began = time.monotonic()
        report = check_run(composed, checks, task)
        if as_json:
            print(json.dumps(report.as_dict(), indent=1))
        else:
            show(report, in_full=only_check, seconds=time.monotonic() - began)
        if report.findings or report.config is None:
            code = 1
        elif not only_check:
            config = report.config
            # Imports take seconds, and a minute or more from a cold disk: a sign of life before them.
            print("loading Megatron-Core, vLLM and Ray", flush=True)
            code = exit_code(lambda: run(config))

    register_resolvers()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, where they are told in a line
    try:
        sys.argv[1:] = hydra_arguments([argument for argument in arguments if argument not in (CHECK, AS_JSON)])
        composed_main()
    except (HydraException, OmegaConfBaseException, ConfigError) as error:
        print(wrapped(f"error: {misnamed_key(str(error), task) or error}"), file=sys.stderr)
        return 1
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        print(wrapped(f"error: {unreadable_yaml(error)}"), file=sys.stderr)
        return 1
    return code


def misnamed_key(error: str, task: Task = "reasoning") -> str | None:
    """What to say in place of hydra's answer to a key without a section, such as ``max_steps=5``; None for another error."""
    match = re.match(r"Could not override '(\w+)'", error)
    return None if match is None else f"unknown key {match[1]}: {hint(match[1], tuple(dotted_keys(CONFIG_OF_TASK[task])), task)}"


def unreadable_yaml(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    """File, line and reason of a configuration file that is not YAML."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark, context = error.problem_mark or error.context_mark, error.context
        name = "the configuration" if mark is None else os.path.relpath(mark.name)
        line = "" if mark is None else f" line {mark.line + 1}"
        return f"{name}{line}: {error.problem or 'not YAML'}{f' ({context})' if context else ''}"
    return f"the configuration is not YAML that can be read: {' '.join(str(error).split())}"


def exit_code(run: Callable[[], None]) -> int:
    """What a run comes to: 0, 1 after an error that it explains, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup: to go on without its terminal
        signal.signal(signal.SIGHUP, _terminate)
    try:
        run()
    except RlsyncError as error:
        print(wrapped(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def show(report: Report, *, in_full: bool, seconds: float) -> None:
    """Findings as errors, a group of lines each; what has no effect; and in full what a run would do, as far as that is known."""
    for note in report.notes if in_full or not report.findings else ():
        print(wrapped(note))
    if in_full:
        width = max((len(about) for about, _ in report.plan), default=0)
        for about, text in report.plan:
            print(wrapped(f"  {about:{width}}  {text}", indent=width + 4))
    if report.findings:
        for about, text in report.findings:
            print(wrapped(f"error: {about}: {text}" if not text.startswith(about) else f"error: {text}"), file=sys.stderr)
        count = len(report.findings)
        print(f"{count} finding{'s' * (count > 1)} in {seconds:.1f} s; nothing was started", file=sys.stderr)
    elif in_full:
        print(f"no findings in {seconds:.1f} s; without --check this would run")


def keep_the_screen_for_the_run() -> None:
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
