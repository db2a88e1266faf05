"""Rows to conversations, and to questions of GRPO about pictures: what a row of each ``data.type`` must hold, and why one is refused.

Reads what a row says and guesses nothing: a row that is not understood is a BadRow. Pictures stay references here
(``workers.pictures`` opens them). Knows no tokenizer, torch or Ray, so that ``workers.check`` may use it.
"""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from workers.config.grpo import DataConfig
from workers.config.sft import SftDataConfig
from workers.row_files import BadRow, is_number, kind_of

RowType = Literal["vlm", "chat", "llm", "text"]

IMAGE_MARK = "<image>"
_ROLES = ("system", "user", "assistant", "tool")
_CHOICES_HEAD = "Choices:"
# Fields of a row of messages, as ms-swift and Hugging Face datasets name them, that would change what the messages mean.
_UNREAD_FIELDS = ("videos", "audios", "objects", "tools")
# What fields with pictures are called nearly everywhere.
_USUAL_IMAGE_KEYS = ("image", "images")
Part = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RowForm:
    """How rows are read: the ``data`` keys of the same names."""

    type: RowType
    prompt_key: str
    answer_key: str
    choice_key: str | None = None
    image_keys: tuple[str, ...] = ()
    system_prompt: str | None = None


def row_form(data: SftDataConfig | DataConfig) -> RowForm:
    """The form that a configuration names. Of GRPO it is one with pictures."""
    keys = {declared.name: getattr(data, declared.name) for declared in fields(RowForm)}
    return RowForm(**{**keys, "type": "vlm"} if isinstance(data, DataConfig) else keys)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``parts`` are ``{"type": "text", "text": ...}`` and ``{"type": "image"}``; ``in_loss``: the turn is learned."""

    role: str
    parts: tuple[Part, ...]
    in_loss: bool

    @property
    def text(self) -> str:
        """The text of the turn, without its pictures."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def as_template_input(self) -> dict[str, Any]:
        """The turn as chat templates take it: a string where it has no picture, because many know nothing else."""
        if all(part["type"] == "text" for part in self.parts):
            return {"role": self.role, "content": "".join(part["text"] for part in self.parts)}
        return {"role": self.role, "content": [dict(part) for part in self.parts]}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Attributes:
    messages: in their order; at least one is learned.
    images: references to the pictures, in the order of their parts.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...] = ()

    @property
    def answer(self) -> str:
        """Text of the last turn that is learned."""
        return [message for message in self.messages if message.in_loss][-1].text


def conversation(row: Any, form: RowForm) -> Conversation:
    """The conversation of a row. Raises BadRow."""
    return _READERS[form.type](_object(row), form)


def check_row(row: Any, form: RowForm) -> Conversation | str:
    """What a row of any type holds. Raises BadRow."""
    return document(row, form) if form.type == "text" else conversation(row, form)


def document(row: Any, form: RowForm) -> str:
    """The text of a row of ``type: text``. Raises BadRow."""
    found = _object(row)
    return _text(_field(found, form.prompt_key, "data.prompt_key"), form.prompt_key)


def _object(row: Any) -> Mapping[str, Any]:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, got {kind_of(row)}")
    return row


def _field(row: Mapping[str, Any], name: str, key: str) -> Any:
    if row.get(name) is None:
        raise BadRow(f"no field {name!r}; it has {', '.join(repr(k) for k, v in row.items() if v is not None) or 'none'}. Set {key}")
    return row[name]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} holds {kind_of(value)}; it must be a string")
    if not value.strip():
        raise BadRow(f"field {name!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"field {name!r} holds half of a surrogate pair, which is no text") from None
    return value


def _pair(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """``prompt`` and ``response``, both strings."""
    refuse_pictures(row, form.type)
    prompt = _text(_field(row, form.prompt_key, "data.prompt_key"), form.prompt_key)
    response = _text(_field(row, form.answer_key, "data.answer_key"), form.answer_key)
    return Conversation(
        (*_system(form), Message("user", (_text_part(prompt),), False), Message("assistant", (_text_part(response),), True))
    )


def _question(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """A question about pictures, with or without choices."""
    parts, images, choices = _asked(row, form)
    answer = _field(row, form.answer_key, "data.answer_key")
    if choices is None:
        reference = _plain_answer(answer, form.answer_key)
    else:
        reference = _lettered(choices)[_chosen(answer, choices, form.answer_key)]
    return Conversation((*_system(form), Message("user", parts, False), Message("assistant", (_text_part(reference),), True)), images)


def _asked(row: Mapping[str, Any], form: RowForm) -> tuple[tuple[Part, ...], tuple[Any, ...], list[str] | None]:
    """What a question about pictures says, its pictures, and its choices, where it has some."""
    question = _text(_field(row, form.prompt_key, "data.prompt_key"), form.prompt_key)
    images = tuple(_pictures_of(row, form))
    choices = None if form.choice_key is None else _choices(row.get(form.choice_key), form.choice_key)
    if choices is not None:
        question = "\n".join((question, _CHOICES_HEAD, *_lettered(choices), ""))
    return _marked(question, len(images), form.prompt_key, put_before=True), images, choices


def _lettered(choices: Sequence[str]) -> list[str]:
    return [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False)]


@dataclass(frozen=True, slots=True)
class PictureProblem:
    """A question about pictures that a policy answers.

    Attributes:
        messages: in their order; the last is the user's.
        images: references to the pictures, in the order of their parts.
        answers: references, each of which is right; none where a reward function judges without.
        metadata: the row's other fields, where they were asked for.
    """

    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    answers: tuple[str, ...]
    metadata: Mapping[str, Any]


def picture_problem(row: Any, form: RowForm, *, suffix: str = "", metadata: bool = False) -> PictureProblem:
    """The problem of a row: a question as of ``type: vlm``, or a list of messages whose last is the user's.

    Args:
        suffix: appended to the last message.
        metadata: keep the fields that are neither prompt, answer nor pictures. A row need not have a reference answer then.

    Raises:
        BadRow: the row is none.
    """
    found = _object(row)
    choices: list[str] | None = None
    if isinstance(found.get(form.prompt_key), list):
        messages, images = _turns(found, form)
        if messages[-1].role != "user":
            raise BadRow(f"the last message has the role {messages[-1].role!r}; a policy answers a message of the user")
    else:
        parts, images, choices = _asked(found, form)
        messages = (*_system(form), Message("user", parts, False))
    if suffix:
        messages = (*messages[:-1], replace(messages[-1], parts=(*messages[-1].parts, _text_part(suffix))))
    known = {form.prompt_key, form.answer_key, *form.image_keys}
    others = {name: _json(value, name) for name, value in found.items() if name not in known} if metadata else {}
    return PictureProblem(messages, images, _references(found, form, choices, needed=not metadata), others)


def _references(row: Mapping[str, Any], form: RowForm, choices: Sequence[str] | None, *, needed: bool) -> tuple[str, ...]:
    """Every answer that is right. Of a choice: its line, its letter, and its text, unless that could be meant for another choice."""
    if row.get(form.answer_key) is None and not needed:
        return ()
    answer = _field(row, form.answer_key, "data.answer_key")
    if choices is None:
        answers = answer if isinstance(answer, list) else [answer]
        if not answers:
            raise BadRow(f"field {form.answer_key!r} is an empty list; a problem needs a reference answer")
        return tuple(_plain_answer(each, form.answer_key) for each in answers)
    chosen = _chosen(answer, choices, form.answer_key)
    letters, said = string.ascii_uppercase[: len(choices)], [choice.strip().casefold() for choice in choices]
    is_clear = said.count(said[chosen]) == 1 and said[chosen].upper() not in [*letters]
    return (_lettered(choices)[chosen], letters[chosen], *([choices[chosen]] if is_clear else []))


def _json(value: Any, name: str) -> Any:
    """A field as a reward function gets it, which is in another process."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise BadRow(
            f"field {name!r} holds {kind_of(value)}, which cannot be passed to a reward function; data.image_keys names pictures"
        ) from None
    return value


def _chat(row: Mapping[str, Any], form: RowForm) -> Conversation:
    """``messages`` with text and pictures, of which at least one is learned."""
    messages, images = _turns(row, form)
    if not any(message.in_loss for message in messages):
        raise BadRow("no message of the assistant is learned: the row teaches nothing")
    return Conversation(messages, images)


def _turns(row: Mapping[str, Any], form: RowForm) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """Messages and their pictures, which stand in the parts, or in fields of the row, in the order of their marks."""
    messages = _field(row, form.prompt_key, "data.prompt_key")
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"field {form.prompt_key!r} holds {kind_of(messages)}; it must be a list of messages")
    unread = [name for name in _UNREAD_FIELDS if _holds_something(row.get(name))]
    if unread:
        raise BadRow(f"the row has {_listed(unread)}, which is not read")
    beside = _pictures_of(row, form)
    found: list[Message] = [*_system(form)] if isinstance(messages[0], dict) and messages[0].get("role") != "system" else []
    images: list[Any] = []
    taken: list[int] = []
    for i, message in enumerate(messages):
        turn, own = _message(message, f"message {i}", has_images=bool(beside))
        for image in own:
            if isinstance(image, _Beside):
                number = len(taken) if image.index is None else image.index
                if number >= len(beside):
                    which = "a picture" if image.index is None else f"picture {number}"
                    raise BadRow(f"message {i} marks {which}, and the row has {len(beside)} in {_listed(form.image_keys)}")
                taken.append(number)
                image = beside[number]
            images.append(image)
        found.append(turn)
    if beside and not images and (first := next((i for i, turn in enumerate(found) if turn.role == "user"), None)) is not None:
        found[first] = replace(found[first], parts=(*({"type": "image"} for _ in beside), *found[first].parts))
        return tuple(found), tuple(beside)
    if len({*taken}) < len(beside):
        raise BadRow(f"{len(beside)} pictures in {_listed(form.image_keys)}, {len({*taken})} marks {IMAGE_MARK!r} or image parts")
    return tuple(found), tuple(images)


def _holds_something(value: Any) -> bool:
    """Whether a field holds anything: tables have every field in every row, and some hold JSON as text."""
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    return bool(value) and value not in ("[]", "{}", "null")


@dataclass(frozen=True, slots=True)
class _Beside:
    """A picture that a message marks and a field of the row holds: the one of this index, or the next one."""

    index: int | None = None


def _pictures_of(row: Mapping[str, Any], form: RowForm) -> list[Any]:
    """References to the pictures in a row's fields. Raises BadRow where they are in a field that nobody named, or of its two usual fields
    only one is named and the other has further ones: readers of such rows take either."""
    found = [image for key in form.image_keys for image in _images(row.get(key), key)]
    unnamed = [key for key in _USUAL_IMAGE_KEYS if key not in form.image_keys and row.get(key)]
    if unnamed and not found:
        named = f"names {_listed(form.image_keys)}" if form.image_keys else "names none"
        raise BadRow(f"the row has {_listed(unnamed)}, and data.image_keys {named}: its pictures would not be seen")
    chosen = [key for key in _USUAL_IMAGE_KEYS if key in form.image_keys and row.get(key)]
    if unnamed and chosen and any(image not in found for image in _images(row[unnamed[0]], unnamed[0])):
        raise BadRow(
            f"the row has pictures in {chosen[0]!r} and others in {unnamed[0]!r}, which data.image_keys does not name: name both there, or "
            f"leave {unnamed[0]!r} out of the rows"
        )
    return found


def refuse_pictures(row: Mapping[str, Any], data_type: str) -> None:
    """Raise BadRow where a row of a type that has none holds pictures."""
    unseen = [key for key in _USUAL_IMAGE_KEYS if row.get(key)]
    if unseen:
        raise BadRow(
            f"the row has {_listed(unseen)}, which data.type {data_type} does not read: its pictures would not be seen; vlm reads them"
        )


_READERS: Mapping[str, Callable[[Mapping[str, Any], RowForm], Conversation]] = {"vlm": _question, "chat": _chat, "llm": _pair}


def _system(form: RowForm) -> tuple[Message, ...]:
    return () if form.system_prompt is None else (Message("system", (_text_part(form.system_prompt),), False),)


def _message(message: Any, where: str, *, has_images: bool) -> tuple[Message, list[Any]]:
    """The turn and, for each picture in it, its reference, or a _Beside for one of the row's fields."""
    if not isinstance(message, dict):
        raise BadRow(f"{where} is {kind_of(message)}; it must be an object with `role` and `content`")
    unknown = [name for name, value in message.items() if name not in ("role", "content", "loss") and value is not None]
    if unknown:
        raise BadRow(f"{where} has {_listed(unknown)}, which is not read; role, content and loss are")
    role, learned = message.get("role"), message.get("loss")
    if role not in _ROLES:
        raise BadRow(f"{where} has the role {role!r}; it must be one of {', '.join(_ROLES)}")
    if learned is not None and (not isinstance(learned, (bool, int)) or role != "assistant"):
        raise BadRow(f"{where}: `loss` is {learned!r} for the role {role}; it is true or false for messages of the assistant")
    content = message.get("content")
    if isinstance(content, str):
        parts = _marked(content, None, f"{where}: content") if has_images else (_text_part(_text(content, f"{where}: content")),)
        images: list[Any] = [_Beside() for part in parts if part["type"] == "image"]
    else:
        parts, images = _parts(content, where)
    if role == "assistant" and images:
        raise BadRow(f"{where} of the assistant holds a picture; the model can only be taught text")
    return Message(role, parts, role == "assistant" and (learned is None or bool(learned))), images


def _parts(content: Any, where: str) -> tuple[tuple[Part, ...], list[Any]]:
    if not isinstance(content, list) or not content:
        raise BadRow(f"{where}: `content` is {kind_of(content)}; it must be a string or a list of parts")
    parts: list[Part] = []
    images: list[Any] = []
    for i, part in enumerate(content):
        given = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        if given.keys() == {"type", "text"} and given["type"] == "text":
            parts.append(_text_part(_text(given["text"], f"{where}, part {i}")))
        elif given.get("type") in ("image", "image_url"):
            parts.append({"type": "image"})
            images.append(_part_image(given, f"{where}, part {i}"))
        else:
            raise BadRow(f"{where}, part {i} is {json.dumps(part, default=str)[:80]}; parts are of type text or image")
    return tuple(parts), images


def _part_image(part: Mapping[str, Any], where: str) -> Any:
    sources = {name: value for name, value in part.items() if name != "type"}
    index = sources.get("index")
    if sources.keys() == {"index"} and isinstance(index, int) and not isinstance(index, bool) and index >= 0:
        return _Beside(index)
    if len(sources) > 1 or not sources.keys() <= {"image", "path", "url", "image_url"}:
        raise BadRow(f"{where}: an image part holds {_listed(sources)}; one of image, path, url, image_url and index is read")
    image = next(iter(sources.values()), _Beside())
    if isinstance(image, dict) and image.keys() == {"url"}:
        image = image["url"]
    return image


def _marked(text: str, num_images: int | None, name: str, *, put_before: bool = False) -> tuple[Part, ...]:
    """Text with pictures at its marks; without marks before it, where asked. ``num_images``: how many there must be."""
    pieces = _text(text, name).split(IMAGE_MARK)
    if len(pieces) == 1 and put_before and num_images is not None:
        return (*({"type": "image"} for _ in range(num_images)), _text_part(text))
    if num_images is not None and len(pieces) - 1 != num_images:
        raise BadRow(f"field {name!r} has {len(pieces) - 1} marks {IMAGE_MARK!r}, and the row has {num_images} pictures")
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] if i else []
        parts += [_text_part(piece)] if piece else []
    return tuple(parts)


def _images(value: Any, key: str) -> list[Any]:
    """References in a field: one, a list of them, or none."""
    if value is None:
        return []
    found = list(value) if isinstance(value, (list, tuple)) else [value]
    for image in found:
        if not isinstance(image, (str, bytes, dict)) or not image:
            raise BadRow(f"field {key!r} holds {kind_of(image)} for a picture; a path, bytes, or an object with bytes or path is read")
    return found


def _choices(value: Any, key: str) -> list[str] | None:
    """The choices of a question; None where the row has none, or an empty list. A string is a list as Python writes it."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise BadRow(f"field {key!r} holds {value[:60]!r}, which is no list of choices") from None
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"field {key!r} holds {kind_of(value)}; choices are a list")
    if not value:
        return None
    if not 2 <= len(value) <= len(string.ascii_uppercase):
        raise BadRow(f"field {key!r} holds {len(value)} choices; there must be 2 to {len(string.ascii_uppercase)}")
    return [_plain_answer(choice, key) for choice in value]


def _chosen(answer: Any, choices: Sequence[str], key: str) -> int:
    """Which choice an answer names: by index from 0, by letter, or by its text."""
    last = string.ascii_uppercase[len(choices) - 1]
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise BadRow(f"field {key!r} is {answer}; {len(choices)} choices have the indices 0 to {len(choices) - 1}")
    if not isinstance(answer, str):
        raise BadRow(f"field {key!r} holds {kind_of(answer)}; it names a choice by index, letter or text")
    said = answer.strip()
    found = {i for i, choice in enumerate(choices) if choice.strip() == said}
    if len(said) == 1 and "A" <= said <= last:
        found.add(ord(said) - ord("A"))
    if len(found) != 1:
        many = "names more than one choice" if found else f"is none of the choices, A to {last}"
        raise BadRow(f"field {key!r} is {answer[:60]!r}, which {many}")
    return found.pop()


def _plain_answer(value: Any, key: str) -> str:
    if is_number(value):
        return str(value)
    return _text(value, key)


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def no_eyes(num_images: int) -> str:
    """What is wrong with a row that has pictures, for a model of text."""
    return f"it has {num_images} pictures, and the model takes none"
