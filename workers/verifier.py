"""The verifier process: reads one JSON object per line, answers one per line, and ends itself when a task hangs.
It says ``{"ready": true}`` first.

``python -m workers.verifier`` compares with reference answers, and imports little beside math-verify:

    {"id": 3, "response": "... \\boxed{18}", "answers": ["18"], "timeout_s": 10}  ->  {"id": 3, "is_true": true}
    {"id": 4, "reference": "\\sqrt{2", "timeout_s": 10}                           ->  {"id": 4, "is_true": false}

The first asks whether a response is correct, the second whether a reference answer can be read.

``python -m workers.verifier PATH.py FUNCTION`` calls a reward function of the user's, with lists as keyword arguments:

    {"id": 5, "prompts": [...], "responses": [...], "references": [...], "metadata": [...], "timeout_s": 10}
        ->  {"id": 5, "rewards": [0.5, 1.0]}  or  {"id": 5, "error": "..."}

The parent (``reward.VerifierPool``) replaces it when it ends. Symbolic simplification can hang in native code that no handler
interrupts, and a user's function anywhere, so both limits end the process whatever Python does. Comparing has ``timeout_s`` of processor
time, by SIGPROF: a right answer stays right on a machine that is busy. A user's function, which may wait for others, has ``timeout_s`` by
the clock, by faulthandler's watchdog thread.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import logging
import math
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import IO, Any

Task = dict[str, Any]
Work = Callable[[Task], dict[str, Any]]

# A power tower can ask for all memory of the host before its time is up.
_MAX_ADDRESS_SPACE_BYTES = 4 * 2**30


def compare(task: Task) -> dict[str, Any]:
    """Whether a response is correct, or a reference answer readable."""
    try:
        return {"is_true": is_readable(task["reference"]) if "reference" in task else is_correct(task["response"], task["answers"])}
    except (ArithmeticError, MemoryError, RecursionError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError):
        return {"is_true": False}  # what sympy raises for expressions it cannot handle: such an answer is not a correct one


def is_correct(response: str, answers: list[str]) -> bool:
    """Whether the final answer of a response equals any reference answer, numerically or symbolically.

    The final answer is the last ``\\boxed{}``, else what follows an answer phrase, else the last expression.
    """
    from math_verify import parse, verify

    from workers.reward import reference_forms, with_spoken_value

    # From the last box on: several boxes would be read as a set of answers.
    found = parse(with_spoken_value(response[max(0, response.rfind("\\boxed")) :]), parsing_timeout=None)
    forms = [form for answer in answers for form in reference_forms(answer)]
    return any(verify(parse(_boxed(form), parsing_timeout=None), found, timeout_seconds=None) for form in forms)


def is_readable(reference: str) -> bool:
    """Whether math-verify reads a reference answer as an expression, so that a response in other words can equal it."""
    from math_verify import parse

    from workers.reward import reference_forms

    readings = (parse(_boxed(form), parsing_timeout=None) for form in reference_forms(reference))
    return any(not isinstance(item, str) for reading in readings for item in reading)


def _boxed(form: str) -> str:
    """math-verify reads LaTeX only between delimiters."""
    return form if "\\boxed" in form else f"\\boxed{{{form}}}"


def load_function(path: Path, name: str) -> Callable[..., Any]:
    """The function ``name`` of a file, whose folder's other files it may import. Raises what the import raises."""
    sys.path.append(str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "named as Python"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} holds {type(function).__name__}, which cannot be called")
    return function


def call(function: Callable[..., Any], task: Task, path: Path) -> dict[str, Any]:
    """The rewards of some responses as the user's function gives them, or the error that says why there are none."""
    arguments = {name: value for name, value in task.items() if name not in ("id", "timeout_s")}
    count = len(arguments["responses"])
    try:
        returned = function(**arguments)
    except (Exception, SystemExit) as error:
        return {"error": f"it raised {last_line(error, path)}"}
    try:
        if isinstance(returned, (str, bytes, Mapping, Set)):
            raise TypeError("its characters or keys would be taken for rewards, and a set has no order")
        rewards = [float(reward) for reward in returned]
    except (TypeError, ValueError, OverflowError):
        return {"error": f"it returned {_short(returned)}, expected a list of {count} numbers"}
    if len(rewards) != count:
        return {"error": f"it returned {len(rewards)} rewards for {count} responses"}
    wrong = [reward for reward in rewards if not math.isfinite(reward)]
    return {"error": f"it returned {wrong[0]} as a reward"} if wrong else {"rewards": rewards}


def last_line(error: BaseException, path: Path) -> str:
    """The last line of a traceback, and the last line of the user's file that it went through."""
    said = traceback.format_exception_only(error)[-1].strip()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path.resolve()]
    return f"{said} ({path}:{frames[-1].lineno}, in {frames[-1].name})" if frames else said


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}" if value is not None else "None"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _work() -> Work:
    """What this process does. Raises what the import of a user's file raises."""
    if len(sys.argv) == 1:
        import math_verify  # noqa: F401 (takes a second, which no task should wait for)

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, _MAX_ADDRESS_SPACE_BYTES))
        return compare
    path, name = Path(sys.argv[1]), sys.argv[2]
    function = load_function(path, name)
    return lambda task: call(function, task, path)


def main() -> None:
    logging.disable(logging.ERROR)
    # math-verify, sympy and a user's function may print; the answers have the real standard output to themselves. So have tasks the real
    # input: a program that a function starts, and that reads, would wait for the next task and take it.
    answers_out, tasks_in = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1), os.fdopen(os.dup(sys.stdin.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    silent = open(os.devnull, "w")
    try:
        work = _work()
    except (Exception, SystemExit) as error:
        if len(sys.argv) == 1:
            raise
        _write(answers_out, {"error": f"{sys.argv[1]} cannot be imported: {last_line(error, Path(sys.argv[1]))}"})
        return
    _write(answers_out, {"ready": True})
    for line in tasks_in:
        task = json.loads(line)
        if work is compare:
            signal.setitimer(signal.ITIMER_PROF, task["timeout_s"])
            answer = work(task)
            signal.setitimer(signal.ITIMER_PROF, 0)
        else:
            faulthandler.dump_traceback_later(task["timeout_s"], exit=True, file=silent)
            answer = work(task)
            faulthandler.cancel_dump_traceback_later()
        _write(answers_out, {"id": task["id"], **answer})


def _write(out: IO[str], answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
