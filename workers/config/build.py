"""Plain mappings to the dataclasses of ``schema``: types, required and unknown keys.

Owns the conversion and its errors. Knows no key by name, no hydra and no rule between keys. All findings of one
mapping are collected.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rlsync.errors import ConfigError
from workers.config.fields import bounds_of
from workers.config.hints import hint

T = TypeVar("T")


class _Mismatch(Exception):
    """A value that does not fit its annotation; the message says what was expected."""


class _OutOfBounds(Exception):
    """A number that its key cannot have; the message says what it must be."""


@dataclass(slots=True)
class _Findings:
    """What one build collected.

    Attributes:
        errors: all of them.
        num_values: how many of them say that a value cannot be taken, so that the key has its default instead.
        is_lacking: a key without a default has no value.
    """

    known: tuple[str, ...]
    tolerate: Callable[[str, Any], bool]
    errors: list[str] = field(default_factory=list)
    num_values: int = 0
    is_lacking: bool = False

    def unknown(self, dotted: str, value: Any) -> None:
        """Name a key, or the keys of a section that is none."""
        said = hint(dotted, self.known)
        if isinstance(value, Mapping) and value and not said.startswith("did you mean"):
            for name, inner in value.items():
                if not self.tolerate(f"{dotted}.{name}", inner):
                    self.unknown(f"{dotted}.{name}", inner)
        else:
            self.errors.append(f"unknown key {dotted}: {said}")

    def value(self, message: str) -> None:
        self.errors.append(message)
        self.num_values += 1


@dataclass(frozen=True, slots=True)
class Built(Generic[T]):
    """What ``build`` made of a mapping.

    Attributes:
        config: None where a key without a default has no value that can be taken.
        errors: what is wrong with keys, one sentence each.
        is_exact: every value is the one that was given; otherwise keys that ``errors`` names have their defaults.
    """

    config: T | None
    errors: tuple[str, ...]
    is_exact: bool


def build(cls: type[T], values: Mapping[str, Any], tolerate: Callable[[str, Any], bool]) -> Built[T]:
    """``cls`` filled from nested mappings, with every unknown, missing, wrongly typed or impossible key by its full dotted name.

    Args:
        tolerate: called with the dotted name and value of each key without a field; True accepts it. A ConfigError that it raises
            is one more finding.
    """
    findings = _Findings(known=tuple(dotted_keys(cls)), tolerate=tolerate)
    result = _build(cls, values, "", findings)
    return Built(None if findings.is_lacking else result, tuple(findings.errors), is_exact=not findings.num_values)


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
        if name not in declared:
            try:
                tolerated = findings.tolerate(prefix + str(name), value)
            except ConfigError as error:
                findings.errors.append(str(error))
                continue
            if not tolerated:
                findings.unknown(prefix + str(name), value)
    arguments = {name: _field(values, declaration, hints[name], prefix + name, findings) for name, declaration in declared.items()}
    try:
        return cls(**arguments)
    except ConfigError as error:  # a section of the library checks itself; all its keys have defaults
        findings.value(str(error))
        return cls()


def _field(values: Mapping[str, Any], declaration: Field[Any], annotation: Any, dotted: str, findings: _Findings) -> Any:
    name, section = declaration.name, section_of(annotation)
    if name in values and section is not None and isinstance(values[name], Mapping):
        return _build(section, values[name], f"{dotted}.", findings)
    if name in values and section is None:
        try:
            return _bounded(_convert(values[name], annotation), declaration)
        except _Mismatch as mismatch:
            findings.value(f"{dotted}: expected {mismatch}, got {values[name]!r}")
        except _OutOfBounds as finding:
            findings.value(f"{dotted} ({values[name]}) {finding}{', or null' if type(None) in get_args(annotation) else ''}")
    elif name in values and values[name] is not None:
        findings.value(f"{dotted}: expected a section with keys, got {values[name]!r}")
    elif declaration.default is MISSING and section is None:
        findings.errors.append(f"{dotted} is required: {declaration.metadata['doc']}")
    if declaration.default is not MISSING:
        return declaration.default
    if section is not None:
        return _build(section, {}, f"{dotted}.", findings)
    findings.is_lacking = True
    return None


def _bounded(value: Any, declaration: Field[Any]) -> Any:
    bounds = bounds_of(declaration)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and bounds is not None:
        finding = bounds.finding(value)
        if finding is not None:
            raise _OutOfBounds(finding)
    return value


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
