"""The verifier process: reads one JSON object per line, answers one per line, and ends itself when a check hangs.
It says ``{"ready": true}`` first.

    {"id": 3, "response": "... \\boxed{18}", "answers": ["18"], "timeout_s": 10}  ->  {"id": 3, "is_true": true}
    {"id": 4, "reference": "\\sqrt{2", "timeout_s": 10}                           ->  {"id": 4, "is_true": false}

The first asks whether a response is correct, the second whether a reference answer can be read.

Runs as ``python -m workers.verifier`` and imports little beside math-verify. The parent (``reward.VerifierPool``) replaces it
when it ends. Symbolic simplification can hang in native code that no signal interrupts, so the limit is
faulthandler's watchdog thread, which ends the process whatever Python does.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys

from math_verify import parse, verify

from workers.reward import reference_forms

# A power tower can ask for all memory of the host before its time is up.
_MAX_ADDRESS_SPACE_BYTES = 4 * 2**30


def is_correct(response: str, answers: list[str]) -> bool:
    """Whether the final answer of a response equals any reference answer, numerically or symbolically.

    The final answer is the last ``\\boxed{}``, else what follows an answer phrase, else the last expression.
    """
    # From the last box on: several boxes would be read as a set of answers.
    found = parse(response[max(0, response.rfind("\\boxed")) :], parsing_timeout=None)
    forms = [form for answer in answers for form in reference_forms(answer)]
    return any(verify(parse(_boxed(form), parsing_timeout=None), found, timeout_seconds=None) for form in forms)


def is_readable(reference: str) -> bool:
    """Whether math-verify reads a reference answer as an expression, so that a response in other words can equal it."""
    readings = (parse(_boxed(form), parsing_timeout=None) for form in reference_forms(reference))
    return any(not isinstance(item, str) for reading in readings for item in reading)


def _boxed(form: str) -> str:
    """math-verify reads LaTeX only between delimiters."""
    return form if "\\boxed" in form else f"\\boxed{{{form}}}"


def main() -> None:
    logging.disable(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE_BYTES, _MAX_ADDRESS_SPACE_BYTES))
    # math-verify and sympy may print; the answers have the real standard output to themselves.
    answers_out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    silent = open(os.devnull, "w")
    answers_out.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        task = json.loads(line)
        faulthandler.dump_traceback_later(task["timeout_s"], exit=True, file=silent)
        try:
            is_true = is_readable(task["reference"]) if "reference" in task else is_correct(task["response"], task["answers"])
        except (ArithmeticError, MemoryError, RecursionError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError):
            is_true = False  # what sympy raises for expressions it cannot handle: such an answer is not a correct one
        faulthandler.cancel_dump_traceback_later()
        answers_out.write(json.dumps({"id": task["id"], "is_true": is_true}) + "\n")


if __name__ == "__main__":
    main()
