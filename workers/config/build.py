"""Plain mappings to the dataclasses of ``schema``: types, required and unknown keys.

Owns the conversion and its errors. Knows no key by name, no hydra and no rule between keys. All findings of one
mapping are collected and raised as one error.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rlsync.errors import ConfigError

T = TypeVar("T")


class _Mismatch(Exception):
    """A value that does not fit its annotation; the message says what was expected."""


@dataclass(slots=True)
class _Findings:
    """What one build collected: errors, and keys that ``tolerate`` accepted without effect."""

    known: tuple[str, ...]
    tolerate: Callable[[str, Any], bool]
    errors: list[str] = field(default_factory=list)

    def unknown(self, dotted: str) -> None:
        self.errors.append(f"unknown key {dotted}: {self._suggestion(dotted)}")

    def _suggestion(self, dotted: str) -> str:
        parent, _, leaf = dotted.rpartition(".")
        siblings = {k.rpartition(".")[2]: k for k in self.known if k.rpartition(".")[0] == parent}
        elsewhere = [k for k in self.known if k.rpartition(".")[2] == leaf]
        near = difflib.get_close_matches(leaf, list(siblings), n=1, cutoff=0.7)
        if near and not elsewhere:
            return f"did you mean {siblings[near[0]]}?"
        near = elsewhere or difflib.get_close_matches(dotted, self.known, n=1, cutoff=0.0)
        return f"did you mean {near[0]}?"


def build(cls: type[T], values: Mapping[str, Any], tolerate: Callable[[str, Any], bool]) -> T:
    """``cls`` filled from nested mappings.

    Args:
        tolerate: called with the dotted name and value of each key without a field; True accepts it.

    Raises:
        ConfigError: every unknown, missing or wrongly typed key at once, each with its full dotted name.
    """
    findings = _Findings(known=tuple(dotted_keys(cls)), tolerate=tolerate)
    result = _build(cls, values, "", findings)
    if findings.errors:
        raise ConfigError("configuration:\n  " + "\n  ".join(findings.errors))
    return result


def dotted_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of every key of a configuration class, sections included."""
    for name, annotation in get_type_hints(cls).items():
        yield prefix + name
        section = section_of(annotation)
        if section is not None:
            yield from dotted_keys(section, f"{prefix}{name}.")


def section_of(annotation: Any) -> type | None:
    """The dataclass of a section key (also when optional), or None for a plain key."""
    options: tuple[Any, ...] = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((option for option in options if isinstance(option, type) and is_dataclass(option)), None)


def _build(cls: type, values: Mapping[str, Any], prefix: str, findings: _Findings) -> Any:
    hints = get_type_hints(cls)
    declared = {f.name: f for f in fields(cls)}
    for name, value in values.items():
        if name not in declared and not findings.tolerate(prefix + str(name), value):
            findings.unknown(prefix + str(name))
    arguments: dict[str, Any] = {}
    for name, declaration in declared.items():
        dotted, section = prefix + name, section_of(hints[name])
        if name in values and (section is None or isinstance(values[name], Mapping)):
            arguments[name] = _convert_or_report(values[name], hints[name], dotted, findings)
        elif name in values and values[name] is not None:
            findings.errors.append(f"{dotted}: expected a section with keys, got {values[name]!r}")
        elif declaration.default is not MISSING:
            arguments[name] = declaration.default
        elif section is not None:
            arguments[name] = _build(section, {}, f"{dotted}.", findings)
        else:
            findings.errors.append(f"{dotted} is required: {declaration.metadata['doc']}")
            arguments[name] = None
    return cls(**arguments)


def _convert_or_report(value: Any, annotation: Any, dotted: str, findings: _Findings) -> Any:
    section = section_of(annotation)
    if section is not None:
        return _build(section, value, f"{dotted}.", findings)
    try:
        return _convert(value, annotation)
    except _Mismatch as mismatch:
        findings.errors.append(f"{dotted}: expected {mismatch}, got {value!r}")
        return None


def _convert(value: Any, annotation: Any) -> Any:
    """A plain value as its annotation wants it; ints are taken for floats, strings of digits for neither."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise _Mismatch("one of " + ", ".join(map(str, args)))
        return value
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, args[0]) for item in items)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _Mismatch("a mapping")
        return {str(k): v for k, v in value.items()}
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    raise _Mismatch({bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[annotation])
