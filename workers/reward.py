"""A pool of verifier processes with a real timeout, and reference answers as math-verify can read them.

Data sets write references for people: ``$5$.``, ``5 dollars``, ``50%``, ``½``. Between the braces of ``\\boxed{}``, where math-verify
reads them, it takes such a text for another expression or for mere text, and no response ever equals it.

Knows no tokenizer, Ray or torch, and not math-verify itself, which is slow to import. A task that hangs or crashes its process has no
answer, and the process is replaced; others are not concerned.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from rlsync.errors import ConfigError, RlsyncError

# The process ends itself at the timeout; past this much more by the clock the pool kills it. Comparing is timed by processor time, of which
# a process on a busy machine gets little.
_GRACE_S = 5.0
_COMPARING_PATIENCE = 20
_START_TIMEOUT_S = 60.0
_REPOSITORY = Path(__file__).resolve().parents[1]

Answers = Sequence[Sequence[str]]
Answer = Mapping[str, Any]


class _Process:
    """One verifier process and the task it works on. Ready for tasks after ``wait_ready``."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._stderr = tempfile.TemporaryFile()
        search_path = os.pathsep.join((str(_REPOSITORY), os.environ.get("PYTHONPATH", "")))
        environment = {**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "workers.verifier", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # Ctrl-C ends the run through its owner, not the verifiers under it
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._stdin, self.stdout = self._popen.stdin, self._popen.stdout
        self._patience = 1 if arguments else _COMPARING_PATIENCE
        self.task: int | None = None
        self.deadline_s = float("inf")

    def wait_ready(self) -> None:
        """Wait for the imports.

        Raises:
            ConfigError: a reward function cannot be imported; says why.
            RlsyncError: the process ended or stayed silent; carries the end of what it wrote to standard error.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            if selector.select(_START_TIMEOUT_S) and (line := self.stdout.readline()).endswith(b"\n"):
                if (error := json.loads(line).get("error")) is None:
                    return
                self.end()
                raise ConfigError(error)
        self._popen.kill()
        status = self._popen.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace")[-2000:]
        self.end()
        raise RlsyncError(f"verifier process `{sys.executable} -m workers.verifier` did not start (exit status {status}):\n{said}")

    def give(self, task: int, question: Mapping[str, object], timeout_s: float) -> bool:
        """Hand over one task; False when the process is gone."""
        if self._stdin.closed:
            return False
        self.task, self.deadline_s = task, time.monotonic() + timeout_s * self._patience + _GRACE_S
        line = json.dumps({"id": task, **question, "timeout_s": timeout_s})
        try:
            self._stdin.write(line.encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def read(self) -> Answer | None:
        """The answer to the current task, or None when the process ended instead."""
        line = self.stdout.readline()
        if not line.endswith(b"\n"):
            return None
        answer: Answer = json.loads(line)
        assert answer["id"] == self.task, "a process works on one task at a time"
        self.task, self.deadline_s = None, float("inf")
        return answer

    def was_killed(self) -> bool:
        """Whether something else than this process and its pool has ended it, such as the kernel for want of memory."""
        # Not reaped, so that the number of its group is nobody else's when ``end`` needs it.
        ended = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        return ended is not None and (ended.si_code, ended.si_status) == (os.CLD_KILLED, signal.SIGKILL)

    def end(self) -> None:
        """End it, and the processes that a function started in it. Idempotent."""
        if self._popen.returncode is None:
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        for stream in (self._stdin, self.stdout, self._stderr):
            try:
                stream.close()
            except BrokenPipeError:
                pass  # unsent bytes of a process that is gone


class VerifierPool:
    """Does tasks of ``workers.verifier`` in ``num_processes`` processes. Use as a context manager, or ``close()``.

    Answers depend only on the tasks: not on order, load or number of processes, except for tasks near ``timeout_s``. A task whose process
    was killed from outside is done once more.

    Args:
        arguments: of ``workers.verifier``: none to compare with reference answers, file and name of a reward function.
    """

    def __init__(self, num_processes: int = 2, timeout_s: float = 10.0, arguments: Sequence[str] = ()) -> None:
        self._timeout_s, self._arguments = timeout_s, arguments
        self.num_replaced = 0
        self._processes = [_Process(arguments) for _ in range(num_processes)]
        try:
            for process in self._processes:
                process.wait_ready()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. Idempotent."""
        for process in self._processes:
            process.end()
        self._processes = []

    def check(self, responses: Sequence[str], answers: Answers) -> list[bool]:
        """Whether each response's final answer equals any of its reference answers.

        Args:
            responses: decoded texts, B of them.
            answers: reference answers, B sequences.

        Raises:
            RlsyncError: a process that ended could not be replaced.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} lists of reference answers")
        found = self.ask([{"response": text, "answers": list(accepted)} for text, accepted in zip(responses, answers, strict=True)])
        return [answer is not None and bool(answer["is_true"]) for answer in found]

    def can_read(self, references: Sequence[str]) -> list[bool]:
        """Whether each reference answer is one that a response can equal, as math-verify reads it. One that takes longer than
        ``timeout_s`` is not. Raises as ``check``."""
        found = self.ask([{"reference": reference} for reference in references])
        return [answer is not None and bool(answer["is_true"]) for answer in found]

    def ask(self, questions: Sequence[Mapping[str, object]]) -> list[Answer | None]:
        """The answers of ``workers.verifier`` to some tasks, in their order; None where a task took longer than ``timeout_s``, or ended
        its process. Raises RlsyncError where a process that ended could not be replaced."""
        if not self._processes:
            raise ValueError("this VerifierPool is closed")
        results: list[Answer | None] = [None] * len(questions)
        waiting = deque(range(len(questions)))
        again: set[int] = set()
        try:
            with selectors.DefaultSelector() as selector:
                for slot in range(len(self._processes)):
                    self._feed(slot, waiting, questions, selector)
                while selector.get_map():
                    self._collect(results, waiting, again, questions, selector)
        except BaseException:
            # What they are at would be taken for answers to the next call.
            for process in self._processes:
                if process.task is not None:
                    process.end()
            raise
        return results

    def _feed(self, slot: int, waiting: deque[int], questions: Sequence[Mapping[str, object]], selector: selectors.BaseSelector) -> None:
        if not waiting:
            return
        task = waiting.popleft()
        if not self._processes[slot].give(task, questions[task], self._timeout_s):
            # It ended while idle, so the task is innocent.
            self._replace(slot)
            self._processes[slot].give(task, questions[task], self._timeout_s)
        selector.register(self._processes[slot].stdout, selectors.EVENT_READ, slot)

    def _collect(
        self,
        results: list[Answer | None],
        waiting: deque[int],
        again: set[int],
        questions: Sequence[Mapping[str, object]],
        selector: selectors.BaseSelector,
    ) -> None:
        """Take in what is ready, end what is overdue, and hand out new tasks."""
        soonest_s = min(process.deadline_s for process in self._processes)
        ready = {event.data for event, _ in selector.select(max(0.0, soonest_s - time.monotonic()))}
        for slot, process in enumerate(self._processes):
            overdue = process.task is not None and process.deadline_s <= time.monotonic()
            if slot not in ready and not overdue:
                continue
            selector.unregister(process.stdout)
            task = process.task
            assert task is not None
            answer = process.read() if slot in ready else None
            if answer is not None:
                results[task] = answer
            else:
                if slot in ready and task not in again and process.was_killed():
                    again.add(task)
                    waiting.appendleft(task)
                self._replace(slot)
            self._feed(slot, waiting, questions, selector)

    def _replace(self, slot: int) -> None:
        self._processes[slot].end()
        self.num_replaced += 1
        self._processes[slot] = _Process(self._arguments)
        self._processes[slot].wait_ready()


def unreadable_references(references: Sequence[str], *, num_processes: int, timeout_s: float) -> set[str]:
    """The reference answers that no response could ever equal, because math-verify cannot read them.

    Starts processes only where there are references that cannot be told by their looks.
    """
    unsure = [reference for reference in dict.fromkeys(references) if not is_plain(reference)]
    if not unsure:
        return set()
    with VerifierPool(min(num_processes, len(unsure)), timeout_s) as pool:
        return {reference for reference, read in zip(unsure, pool.can_read(unsure), strict=True) if not read}


def unreadable_reference(answer: str) -> str:
    """What is wrong with a row that has such a reference answer."""
    return f"math-verify cannot read the reference answer {answer!r}, so no response would be correct"


_NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# A number, a fraction or a mixed number, and the words behind it.
_SPOKEN = re.compile(
    rf"(?P<mixed>[-+]?\d+)\s+(?:and\s+)?(?P<above>\d+)/(?P<below>[1-9]\d*)(?P<of_mixed>(?:[\s-]+[A-Za-z]+)*)"
    rf"|(?P<number>{_NUMBER}(?:/[1-9]\d*)?)(?P<of_number>(?:[\s-]+[A-Za-z]+)*)"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_TEXT = re.compile(r"\\(?:text|mathrm|textrm|textbf|mbox)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[ ,;:!]|~|\s+")
_THOUSANDS = re.compile(rf"(?<![\d.,])[1-9]\d{{0,2}}(?:(?:{_SPACE.pattern})+\d{{3}})+(?!\d)")
_BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_MATHEMATICAL = frozenset(
    (
        *("sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "pow", "mod", "max", "min", "abs", "lim", "inf", "infinity"),
        *("degrees", "percent", "and", "times", "by"),
    )
)
_MAGNITUDES = MappingProxyType(
    {
        "dozen": 12, "dozens": 12, "hundred": 10**2, "hundreds": 10**2, "thousand": 10**3, "thousands": 10**3, "lakh": 10**5,
        "million": 10**6, "millions": 10**6, "crore": 10**7, "billion": 10**9, "billions": 10**9, "trillion": 10**12, "trillions": 10**12,
    }
)  # fmt: skip
# What changes a number, or is a factor of it, instead of saying what is counted. Seconds and roots are counted more often than not.
_NO_UNITS = frozenset(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty
    thirty forty fifty sixty seventy eighty ninety tens score gross quadrillion mil mln bln mio mrd
    half halves third thirds fourth fourths quarter quarters fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths
    tenth tenths eleventh elevenths twelfth twelfths fifteenth fifteenths sixteenth sixteenths twentieth twentieths hundredth hundredths
    thousandth thousandths millionth millionths
    root choose factorial power exponent over plus minus divided modulo base binary octal hexadecimal twice thrice
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda omicron rho sigma tau upsilon phi chi psi omega
    """.split()  # noqa: SIM905 (as a list they would be a screen long)
)
# Operators right behind a number, and units behind another one: metres squared.
_POWERS = frozenset(("squared", "cubed"))
_PERCENT = re.compile(rf"(?P<number>{_NUMBER})\s*(?:\\?%|percent)")
_DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_SIGNS = str.maketrans(
    {
        "∞": r"\infty ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "²": "^{2}", "³": "^{3}", "€": "", "£": "", "¥": "", "−": "-", "\u00a0": " ",
    }
)  # fmt: skip
_ROOT = re.compile(r"√\s*(?:\(([^()]+)\)|(\w+))")
# What math-verify reads for certain, so that nobody has to ask it: a number, a fraction, a word, a letter of a choice.
_PLAIN = re.compile(rf"{_NUMBER}|[-+]?\d+/[1-9]\d*|\\frac\{{[\d.]+\}}\{{[1-9]\d*\}}|\(?[A-Za-z]\)?|[A-Za-z]+(?: [A-Za-z]+)*")


def reference_forms(answer: str) -> tuple[str, ...]:
    """Texts, each to be read between the braces of ``\\boxed{}``, any of which a correct response equals.

    An answer that has a box of its own is that box's. ``50%`` is the text as responses box it, and the value 50/100. None for a number
    with words that change it otherwise than ``spoken`` knows: math-verify takes them for a unit or for products of letters.
    """
    boxes = _BOX.findall(answer)
    if len(boxes) == 1 and "\\boxed" not in boxes[0]:
        return reference_forms(boxes[0])
    if "\\boxed" in answer:
        forms = spoken(boxes[-1]) if boxes else None
        return (answer,) if forms is None else forms
    text = _bare(answer)
    if (match := _PERCENT.fullmatch(text)) is not None:
        number = match["number"].replace(",", "")
        written = (rf"{match['number']}\%", f"{match['number']}%") if number != match["number"] else ()
        return (*written, rf"{number}\%", f"{number}%", rf"\frac{{{number}}}{{100}}")
    forms = spoken(text)
    return (text,) if forms is None else forms


def spoken(text: str) -> tuple[str, ...] | None:
    """The value of a number that has words behind it, or is a mixed one: ``5 million dollars`` and ``1 1/2``, which math-verify reads as 5
    and 1. Empty where the words make it something else (``2 thirds``, ``10 choose two``); None for any other text.

    Words that are not known are a unit, if there are one to three of at least three letters, which single letters (variables) are not.
    """
    plain = _SPACE.sub(" ", _TEXT.sub(r" \1 ", text)).strip()
    words = [word.lower() for word in _WORD.findall(plain)]
    match = _SPOKEN.fullmatch(plain)
    if match is None:
        has_number = any(character.isdigit() for character in plain)
        return () if has_number and not (_NO_UNITS | _POWERS | _MAGNITUDES.keys()).isdisjoint(words) else None
    words = [word.lower() for word in _WORD.findall(match["of_mixed"] or match["of_number"] or "")]
    num_magnitudes = next((i for i, word in enumerate(words) if word not in _MAGNITUDES), len(words))
    unit, is_mixed = words[num_magnitudes:], match["mixed"] is not None
    if not (_NO_UNITS | _MAGNITUDES.keys()).isdisjoint(unit) or (unit and unit[0] in _POWERS):
        return ()
    is_unit = len(unit) <= 3 and all(len(word) >= 3 for word in unit) and _MATHEMATICAL.isdisjoint(unit)
    if not is_mixed and num_magnitudes == 0:
        return (match["number"],) if unit and is_unit else None
    if not is_unit or (is_mixed and int(match["above"]) >= int(match["below"])):
        return ()
    value = Fraction(match["number"].replace(",", "")) if not is_mixed else _mixed(match)
    for word in words[:num_magnitudes]:
        value *= _MAGNITUDES[word]
    sign = "-" if value < 0 else ""
    return (f"{value}" if value.denominator == 1 else rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}",)


def _mixed(match: re.Match[str]) -> Fraction:
    whole, part = match["mixed"], Fraction(int(match["above"]), int(match["below"]))
    return Fraction(whole) - part if whole.startswith("-") else Fraction(whole) + part


def with_spoken_value(response: str) -> str:
    """A response that begins with its last box, with what is written in it as a reference answer of that text has it: the value of a
    ``spoken`` number, thousands without spaces, signs as LaTeX."""
    match = _BOX.match(response)
    if match is None:
        return response
    text = _with_thousands(match[1].translate(_SIGNS))
    forms = spoken(text)
    return rf"\boxed{{{forms[0] if forms else text}}}" if forms or text != match[1] else response


def is_plain(answer: str) -> bool:
    """Whether math-verify reads an answer for certain. The others have to be tried."""
    forms = reference_forms(answer)
    return bool(forms) and _PLAIN.fullmatch(forms[-1]) is not None


def _with_thousands(text: str) -> str:
    r"""Without the spaces of numbers such as ``10\,000``, of which math-verify makes 10 times 0."""
    return _THOUSANDS.sub(lambda match: _SPACE.sub("", match[0]), text)


def _bare(answer: str) -> str:
    """Without delimiters of formulas, emphasis, currency signs, spaces between thousands and the full stop of a sentence."""
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", answer.translate(_SIGNS).replace(r"\$", "").replace("$", ""))
    before = None
    while text != before:
        before = text
        text = text.strip()
        if text.endswith((".", ",", ";")) and not text.endswith((r"\,", r"\;")):
            text = text[:-1]
        for opening, closing in _DELIMITERS:
            inner = text.removeprefix(opening).removesuffix(closing)
            if len(inner) == len(text) - len(opening) - len(closing) and opening not in inner:
                text = inner
    return _with_thousands(text)
