"""Ways to give a response its reward, one for each form of ``reward.reward_type``: ``math``, ``exact``, and a function of the user's.

Knows texts and rows of data, no tokens. What runs in processes with a time limit does so in ``workers.reward``'s pool; nothing here
imports a user's file: ``check_reward_function`` reads it as text.
"""

from __future__ import annotations

import ast
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from rlsync.errors import ConfigError, RlsyncError
from workers.config.grpo import REWARD_FUNCTION, RewardConfig
from workers.reward import VerifierPool, is_plain

# Keyword arguments of a reward function.
ARGUMENTS = ("prompts", "responses", "references", "metadata")


class Question(Protocol):
    """The part of a ``workers.data.Prompt`` that is read here."""

    @property
    def text(self) -> str: ...

    @property
    def answers(self) -> tuple[str, ...]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def where(self) -> str: ...


Q = TypeVar("Q", bound=Question)


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one response.

    Attributes:
        reward: scaled.
        correct: None where a function gave the reward, which says nothing of right and wrong.
        timed_out: there is no answer, as it took longer than ``reward.timeout_s`` or ended its process.
    """

    reward: float
    correct: bool | None = None
    timed_out: bool = False


class Judge(Protocol):
    """Judges the responses to some prompts: as many verdicts as responses, in their order."""

    def judge(self, questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]: ...


@contextmanager
def open_judge(config: RewardConfig) -> Iterator[Judge]:
    """The judge that a configuration asks for, with the processes that it needs.

    Raises ConfigError where a reward function cannot be imported, RlsyncError where a process does not start.
    """
    if config.reward_type == "exact":
        yield ExactJudge(config)
        return
    function = function_of(config.reward_type)
    check_reward_function(config.reward_type)
    with VerifierPool(config.num_processes, config.timeout_s, () if function is None else (str(function[0]), function[1])) as pool:
        yield MathJudge(config, pool) if function is None else FunctionJudge(config, pool)


class Beside:
    """A call in a thread of its own beside what hands in numbers, in the order of their coming: with all at once that have come since its
    last one, so that they are judged side by side. A context manager, which waits for the call under way."""

    def __init__(self, call: Callable[[Sequence[int]], None]) -> None:
        self._call, self._thread = call, ThreadPoolExecutor(1, "rlsync-beside")
        self._waiting: SimpleQueue[int] = SimpleQueue()
        self._calls: list[Future[None]] = []

    def add(self, numbers: Iterable[int]) -> None:
        """Hand in. Raises what a call before raised."""
        for number in numbers:
            self._waiting.put(number)
        for call in self._calls:
            if call.done():
                call.result()
        self._calls.append(self._thread.submit(self._run))

    def wait(self) -> None:
        """Return when all that was handed in is done. Raises what a call raised."""
        for call in self._calls:
            call.result()

    def _run(self) -> None:
        if numbers := [self._waiting.get() for _ in range(self._waiting.qsize())]:
            self._call(numbers)

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)


class MathJudge:
    """``math``: the response's final answer equals a reference numerically or symbolically."""

    def __init__(self, config: RewardConfig, pool: VerifierPool) -> None:
        self._config, self._pool = config, pool

    def judge(self, questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        tasks = [
            {"response": text, "answers": list(question.answers)}
            for question, texts in zip(questions, responses, strict=True)
            for text in texts
        ]
        answers = iter(self._pool.ask(tasks))
        return [[_graded(self._config, next(answers)) for _ in texts] for texts in responses]

    def unreadable(self, questions: Sequence[Q]) -> list[Q]:
        """Questions none of whose references math-verify can read, so that no response equals one."""
        unsure = list(dict.fromkeys(answer for question in questions for answer in question.answers if not is_plain(answer)))
        read = dict(zip(unsure, self._pool.can_read(unsure), strict=True))
        return [question for question in questions if not any(read.get(answer, True) for answer in question.answers)]


def _graded(config: RewardConfig, answer: Mapping[str, Any] | None) -> Verdict:
    correct = answer is not None and bool(answer["is_true"])
    return Verdict(_value(config, correct), correct, timed_out=answer is None)


class ExactJudge:
    """``exact``: the response, or what its last ``\\boxed{}`` holds, equals a reference but for case, spaces and a final full stop."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config

    def judge(self, questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        found = []
        for question, texts in zip(questions, responses, strict=True):
            accepted = {normalised(answer) for answer in question.answers}
            verdicts = (normalised(last_box(text)) in accepted for text in texts)
            found.append([Verdict(_value(self._config, correct), correct) for correct in verdicts])
        return found


def _value(config: RewardConfig, correct: bool) -> float:
    return config.reward_scale * (config.reward_max_val if correct else config.reward_min_val)


def normalised(text: str) -> str:
    """A text as ``exact`` compares it: Unicode's compatible forms, without case, spaces in a row and a final full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def last_box(text: str) -> str:
    """What the last ``\\boxed{}`` holds; the whole text where there is none that ends."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return text


class FunctionJudge:
    """``PATH.py:function``: a call for each prompt, with all responses to it; what it returns times ``reward.reward_scale``.

    The pool's processes have imported the function. A call that takes longer than ``reward.timeout_s``, or that ends its process, costs
    no run: the prompt's responses get ``reward.reward_min_val``.
    """

    def __init__(self, config: RewardConfig, pool: VerifierPool) -> None:
        self._config, self._pool = config, pool

    def judge(self, questions: Sequence[Question], responses: Sequence[Sequence[str]]) -> list[list[Verdict]]:
        """Raises RlsyncError where the function raised or returned anything but a finite number for each response; names the row."""
        tasks = [
            {
                "prompts": [question.text] * len(texts),
                "responses": list(texts),
                "references": [list(question.answers)] * len(texts),
                "metadata": [dict(question.metadata)] * len(texts),
            }
            for question, texts in zip(questions, responses, strict=True)
        ]
        answers = self._pool.ask(tasks)
        failed = [(q.where, a["error"]) for q, a in zip(questions, answers, strict=True) if a is not None and "error" in a]
        if failed:
            (where, error), more = failed[0], f" (and for {len(failed) - 1} more rows)" if len(failed) > 1 else ""
            raise RlsyncError(f"reward.reward_type {self._config.reward_type} failed for {where}{more}: {error}")
        late = Verdict(self._config.reward_scale * self._config.reward_min_val, timed_out=True)
        return [
            [late] * len(texts) if answer is None else [Verdict(self._config.reward_scale * reward) for reward in answer["rewards"]]
            for texts, answer in zip(responses, answers, strict=True)
        ]


def function_of(reward_type: str) -> tuple[Path, str] | None:
    """File and name of the function that ``PATH.py:function`` names; None for a way that is built in."""
    found = re.fullmatch(REWARD_FUNCTION, reward_type)
    return None if found is None else (Path(found["path"]), found["name"])


def check_reward_function(reward_type: str) -> None:
    """Raise ConfigError unless the file exists, is Python and defines a function that takes ``ARGUMENTS`` by name. Imports nothing."""
    function = function_of(reward_type)
    if function is None:
        return
    path, name = function
    about = f"reward.reward_type {reward_type}"
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{about}: {path} cannot be read: {error.strerror} (seen from {Path.cwd()})") from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{about}: {path} is not Python: {error}") from None
    defined = [(known, node) for node in tree.body for known in _names(node)]
    nodes = [node for known, node in defined if known == name]
    if not nodes:
        functions = sorted(known for known, node in defined if isinstance(node, ast.FunctionDef) and not known.startswith("_"))
        raise ConfigError(f"{about}: {path} does not define {name} at its top level; it defines {', '.join(functions) or 'no function'}")
    if isinstance(nodes[-1], ast.AsyncFunctionDef):
        raise ConfigError(f"{about}: {name} is a coroutine (async def), which nobody awaits; define it with def")
    if isinstance(nodes[-1], ast.FunctionDef):
        _check_arguments(nodes[-1].args, f"{about} (line {nodes[-1].lineno})")


def _names(node: ast.stmt) -> list[str]:
    """Names that a statement at the top level binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    # Behind an if or a try as well.
    inner = [name for field in ("body", "orelse", "handlers", "finalbody") for child in getattr(node, field, []) for name in _names(child)]
    return [target.id for target in targets if isinstance(target, ast.Name)] + inner


def _check_arguments(arguments: ast.arguments, about: str) -> None:
    by_name = {argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)}
    optional = [argument.arg for argument in arguments.args[len(arguments.args) - len(arguments.defaults) :]] if arguments.defaults else []
    optional += [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is not None]
    refused = [] if arguments.kwarg else [name for name in ARGUMENTS if name not in by_name]
    missing = sorted((by_name - set(optional) | {argument.arg for argument in arguments.posonlyargs}) - set(ARGUMENTS))
    if refused or missing:
        wrong = [f"does not take {', '.join(refused)}"] * bool(refused) + [f"wants {', '.join(missing)}"] * bool(missing)
        raise ConfigError(f"{about} {' and '.join(wrong)}; it is called with the keywords {', '.join(ARGUMENTS)}")
