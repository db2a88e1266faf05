"""Data files to problems: the file forms, what a row must hold, and what happens with rows that do not hold it.

Reads what JSON says and converts nothing: a row whose prompt or reference is something else than text or a number is a bad
sample. Knows no tokenizer, torch or Ray, so that ``workers.check`` may use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from rlsync.errors import ConfigError
from workers.row_files import BINARY, BOM, FORMS, PARQUET, BadRow, is_number, kind_of, read_json
from workers.sft_rows import refuse_pictures

OnBadSample = Literal["error", "skip"]

_FINAL_ANSWER_MARK = "####"
# Bad samples of which the reason is said; others are counted.
NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a data file: the prompt as text or as chat messages, every accepted reference answer, file and line, and the row's
    other fields where they were asked for."""

    prompt: str | tuple[Mapping[str, str], ...]
    answers: tuple[str, ...]
    where: str = field(default="a problem", compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class BadSamples:
    """Rows that are no problems, as (file and line, reason), until ``settle`` deals with them as ``data.on_bad_sample`` says."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.found.append((where, reason))

    def settle(self, on_bad_sample: OnBadSample, *, way_out: bool = True) -> tuple[str, ...]:
        """A note on what was left out, if anything was. Raises ConfigError where bad samples are errors and there are some;
        ``way_out``: the error says how to skip them."""
        if not self.found:
            return ()
        examples = [f"{where}: {reason}" for where, reason in self.found[:NUM_EXAMPLES]]
        more = [f"and {len(self.found) - NUM_EXAMPLES} more"] if len(self.found) > NUM_EXAMPLES else []
        if on_bad_sample == "skip":
            return (f"left out {len(self.found)} bad samples (data.on_bad_sample: skip): {'; '.join(examples + more)}",)
        skip = "data.on_bad_sample=skip leaves such rows out"
        if len(self.found) == 1:
            raise ConfigError(f"{examples[0]}{f'. {skip}' if way_out else ''}")
        raise ConfigError("\n  ".join((f"{len(self.found)} bad samples{f'; {skip}' if way_out else ''}:", *examples, *more)))


def load_problems(
    paths: Sequence[str],
    *,
    prompt_key: str = "prompt",
    answer_key: str = "solutions",
    data_size: int | None = None,
    bad: BadSamples | None = None,
    rows_per_file: int | None = None,
    metadata: bool = False,
) -> list[Problem]:
    """Problems of JSONL files (an object per line) or ``.json`` files (an array of objects), in file order.

    Two forms are read: ``prompt_key`` with a string or a message list and ``answer_key`` with a string, a number or a
    list of them; and, where ``prompt_key`` is absent, GSM8K's ``question`` / ``answer``. In an answer that contains
    ``####`` only what follows the last one counts.

    Args:
        data_size: stop after this many problems.
        bad: takes the rows that are no problems; without it they are an error.
        rows_per_file: read no further than this many rows of each file.
        metadata: keep the other fields of a row, which are ignored otherwise. A row need not have a reference answer then.

    Raises:
        ConfigError: a file is missing, is not text or holds no problem, or, without ``bad``, a row is no problem; names file and line.
    """
    taken = BadSamples() if bad is None else bad
    problems: list[Problem] = []
    for path in paths:
        before, bad_before = len(problems), len(taken.found)
        for where, row in islice(_rows(Path(path)), rows_per_file):
            if data_size is not None and len(problems) >= data_size:
                return problems
            try:
                problems.append(_problem(row, where, prompt_key, answer_key, metadata=metadata))
            except BadRow as reason:
                taken.add(where, str(reason))
        if len(problems) == before and len(taken.found) == bad_before:
            raise ConfigError(f"{path}: no problems in this file")
    if bad is None:
        taken.settle("error")
    return problems


def load_supervised(paths: Sequence[str], rows_per_file: int | None = None) -> list[Problem]:
    """Problems whose only answer is the response, of JSONL or JSON files with fields ``prompt`` and ``response``; ConfigError names file
    and line of what has not."""
    found: list[Problem] = []
    bad = BadSamples()
    for path in paths:
        for where, row in islice(_rows(Path(path)), rows_per_file):
            try:
                if isinstance(row, BadRow):
                    raise row
                if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("prompt", "response")):
                    raise BadRow("needs the fields 'prompt' and 'response' with strings")
                refuse_pictures(row, "math")
                found.append(Problem(_text(row["prompt"], "prompt"), (_text(row["response"], "response"),), where))
            except BadRow as reason:
                bad.add(where, str(reason))
    bad.settle("error", way_out=False)
    if not found:
        raise ConfigError(f"{', '.join(paths)}: no examples in these files")
    return found


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, content) of each row; for a line that cannot be read the content is the ``BadRow`` that says why."""
    try:
        if not path.exists():
            raise ConfigError(f"data file {path} does not exist (seen from {Path.cwd()})")
        if path.is_dir():
            raise ConfigError(f"data file {path} is a folder; name the JSONL or JSON files in it")
        with path.open("rb") as stream:
            start = stream.read(4)
            for mark, name in {PARQUET: "Parquet", **BINARY}.items():
                if start.startswith(mark):
                    raise ConfigError(f"data file {path} is a {name} file; JSONL and JSON are read, so convert it first")
            if path.suffix == ".parquet":
                raise ConfigError(f"data file {path} is named as a Parquet file and is none; JSONL and JSON are read, by those names")
            stream.seek(0)
            if path.suffix == ".json":
                yield from _array(path, stream.read())
                return
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if line.strip():
                    yield f"{path}:{number}", read_json(line)
    except OSError as error:
        raise ConfigError(f"data file {path} cannot be read: {error.strerror}") from None


def _array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    found = read_json(content.removeprefix(BOM))
    if isinstance(found, BadRow):
        raise ConfigError(f"{path}: {found}; {FORMS}")
    if not isinstance(found, list):
        raise ConfigError(f"{path}: holds {kind_of(found)}; {FORMS}")
    yield from ((f"{path}[{i}]", row) for i, row in enumerate(found))


def _problem(row: Any, where: str, prompt_key: str, answer_key: str, *, metadata: bool) -> Problem:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, got {kind_of(row)}")
    if prompt_key not in row and {"question", "answer"} <= row.keys():
        prompt_key, answer_key = "question", "answer"
    for name in (prompt_key,) if metadata else (prompt_key, answer_key):
        if name not in row:
            raise BadRow(f"no field {name!r}; it has {', '.join(map(repr, row)) or 'none'}. Set data.prompt_key / data.answer_key")
    if not metadata:
        refuse_pictures(row, "math")
    answers = row.get(answer_key, [])
    if answers is None and metadata:
        answers = []
    if answers == [] and not metadata:
        raise BadRow(f"field {answer_key!r} is an empty list; a problem needs a reference answer")
    answers = answers if isinstance(answers, list) else [answers]
    others = {name: value for name, value in row.items() if name not in (prompt_key, answer_key)} if metadata else {}
    return Problem(_prompt(row[prompt_key], prompt_key), tuple(_answer(answer, answer_key) for answer in answers), where, others)


def _prompt(prompt: Any, key: str) -> str | tuple[Mapping[str, str], ...]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BadRow(f"field {key!r} is empty; a problem needs a prompt")
        return _text(prompt, key)
    if not isinstance(prompt, list):
        raise BadRow(f"field {key!r} holds {kind_of(prompt)}; a prompt is a string or a list of messages")
    if not prompt:
        raise BadRow(f"field {key!r} is an empty list of messages")
    for i, message in enumerate(prompt):
        if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise BadRow(f"field {key!r}: message {i} needs a `role` and a `content` that are strings")
        _text(message["role"] + message["content"], key)
    if not any(message["content"].strip() for message in prompt):
        raise BadRow(f"field {key!r} holds empty messages only")
    return tuple(prompt)


def _text(text: str, key: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"field {key!r} holds half of a surrogate pair, which is no text") from None
    return text


def _answer(answer: Any, key: str) -> str:
    if not isinstance(answer, str) and not is_number(answer):
        raise BadRow(f"field {key!r} holds {kind_of(answer)}; a reference answer is a string or a finite number")
    text = str(answer).rsplit(_FINAL_ANSWER_MARK, 1)[-1].strip()
    if not text:
        after = f" after {_FINAL_ANSWER_MARK}" if str(answer).strip() else ""
        raise BadRow(f"field {key!r} is empty{after}; a problem needs a reference answer")
    return _text(text, key)
