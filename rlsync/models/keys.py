"""Keys of a config.json: what each may hold, transformers' default for it, and why a key without an effect has none.

A family's table names every key that transformers' class reads. A key is honoured (``size``, ``number``, ``flag``), fixed to the
values whose meaning the family computes (``only``, ``unsupported``), or harmless with the reason. Plain values; knows no family.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

HFConfig = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Key:
    """One key of config.json.

    Attributes:
        accepts: whether a value can be honoured; not asked about a missing key.
        wanted: what is accepted, in words, as it follows "must be".
        why: for an unsupported key the reason and what to do; for a harmless one why it changes nothing.
        default: of transformers' class, for a missing key.
        is_required: the file must state it: transformers' default has the size of another model.
        is_nullable: null means the same as a missing key, or ``default`` None.
        is_honoured: the value is read; False for keys that are only checked.
        engines_need: vLLM does not start where the key is missing, and transformers has a default for it.
        field: the TransformerConfig field of Megatron that takes the value as it is, or "".
        meaning: what the tables of other families call the key, and under which name its value is found; "" for its own name.
    """

    accepts: Callable[[Any], bool]
    wanted: str = ""
    why: str = ""
    default: Any = None
    is_required: bool = False
    is_nullable: bool = False
    is_honoured: bool = True
    engines_need: bool = False
    field: str = ""
    meaning: str = ""


def is_whole(value: Any) -> bool:
    """Whether a JSON value is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; NaN and infinity are no JSON, though Python reads them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def size(
    field: str = "", *, default: int | None = None, is_required: bool = False, is_nullable: bool = False, most: int = 2**31 - 1
) -> Key:
    """A whole number of at least 1. ``most`` keeps a slip of the pen from being counted to."""
    return Key(
        lambda value: is_whole(value) and 0 < value <= most,
        f"a whole number from 1 to {most}",
        default=default,
        is_required=is_required,
        is_nullable=is_nullable,
        field=field,
    )


def number(field: str = "", *, default: float) -> Key:
    """A number above 0."""
    return Key(lambda value: is_number(value) and value > 0, "a number above 0", default=default, field=field)


def flag(*, default: bool) -> Key:
    return Key(lambda value: isinstance(value, bool), "true or false", default=default)


def only(*values: Any, default: Any, why: str = "", is_nullable: bool = False, engines_need: bool = False) -> Key:
    """One of a few values, which differ in JSON type too: 0 is not false."""
    return Key(
        lambda value: any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values),
        " or ".join(map(shown, values)),
        why,
        default=default,
        is_nullable=is_nullable,
        is_honoured=False,
        engines_need=engines_need,
    )


def unsupported(why: str, *, default: Any = None) -> Key:
    """A key that asks for another computation wherever it holds more than null, false, zero or nothing."""
    return Key(lambda value: not value, "absent", why, default=default, is_nullable=True, is_honoured=False)


def harmless(why: str, *keys: str) -> dict[str, Key]:
    """Keys whose values change nothing that is computed here."""
    return dict.fromkeys(keys, Key(lambda _: True, why=why, is_nullable=True, is_honoured=False))


def read_elsewhere(reader: str, *keys: str) -> dict[str, Key]:
    """Keys that make sense only together; ``reader`` checks and honours them."""
    return dict.fromkeys(keys, Key(lambda _: True, why=f"read by {reader}", is_nullable=True, is_honoured=False))


def renamed_keys(keys: Mapping[str, Key], names: Mapping[str, str]) -> dict[str, Key]:
    """A table in which some keys are called otherwise (the name in ``keys`` -> that in config.json); values keep the names of ``keys``.

    Raises ValueError for a name that ``keys`` lacks, and for one that two keys would have.
    """
    absent = names.keys() - keys.keys()
    if absent:
        raise ValueError(f"renamed_keys: the table has no {', '.join(sorted(absent))}; a name of the table comes before that of the file")
    made: dict[str, Key] = {}
    for name, key in keys.items():
        called = names.get(name, name)
        if called in made:
            raise ValueError(f"renamed_keys: two keys of the table would be called {called}; rename the other one, or leave it out")
        made[called] = replace(key, meaning=key.meaning or name) if name in names else key
    return made


@dataclass(frozen=True, slots=True)
class Section:
    """A config of a part of the model, which lies inside a config.json as an object.

    Attributes:
        name: its key in config.json.
        keys: every key of it that transformers' class reads.
        prefix: values of its honoured keys are called by it and the key.
        may_be_flat: a file without the object has its keys at the top level.
    """

    name: str
    keys: Mapping[str, Key]
    prefix: str = ""
    may_be_flat: bool = False

    def of(self, config: HFConfig) -> tuple[HFConfig | None, str]:
        """The object with its keys, and what finding say before a key of it; None where there is no such object."""
        found = config.get(self.name)
        if found is None and self.may_be_flat:
            return config, ""
        return (found, f"{self.name}.") if isinstance(found, Mapping) else (None, "")


def read_section(section: Section, outer: Mapping[str, Key], config: HFConfig, owner: str) -> tuple[dict[str, Any], list[str]]:
    """Values of a section by their names with its prefix, and what is wrong with it.

    Keys of the language model that stand at the top level beside it are forgotten by transformers, and not by every other program.
    ``outer`` is the table of the top level.
    """
    inner, where = section.of(config)
    if inner is None:
        return {}, [f"{section.name} is {shown(config.get(section.name))}; {owner} needs it: an object of keys"]
    table = section.keys if where else {name: key for name, key in section.keys.items() if name not in outer}
    values, findings = read_keys(table, inner, owner, where)
    for name, key in section.keys.items() if where and not section.prefix else ():
        said = inner.get(name, key.default)
        if name in config and name not in outer and key.wanted and not (section.may_be_flat and config[name] == said):
            findings.append(
                f"{name} is {shown(config[name])} beside {section.name}, whose {name} is {shown(said)}: transformers reads the inner one, "
                "other programs do not; remove the outer one"
            )
    # What both levels may say is asked by both names.
    return {f"{section.name}.{name}" if name in outer else f"{section.prefix}{name}": value for name, value in values.items()}, findings


def read_keys(table: Mapping[str, Key], config: HFConfig, owner: str, where: str = "") -> tuple[dict[str, Any], list[str]]:
    """Values of the honoured keys by their meanings, defaults in place of missing ones, and what is wrong with the others.

    ``owner`` is whom findings name as the reader of the key, ``where`` stands before its name. A refused key has no value.
    """
    values: dict[str, Any] = {}
    findings = []
    for name, key in table.items():
        value = config.get(name)
        if name not in config or (value is None and key.is_nullable):
            if key.is_required:
                findings.append(f"{where}{name} is missing; {owner} needs it: {key.wanted}" + (f" ({key.why})" if key.why else ""))
            elif key.is_honoured:
                values[key.meaning or name] = None if name in config else key.default
        elif not key.accepts(value):
            reason = f": {key.why}" if key.why else ""
            findings.append(f"{where}{name} is {shown(value)}; for {owner} it must be {key.wanted}{reason}")
        elif key.is_honoured:
            values[key.meaning or name] = value
    return values, findings


def missing_for_engines(table: Mapping[str, Key], config: HFConfig, where: str = "") -> list[str]:
    """What is wrong for vLLM with a config that :func:`read_keys` finds nothing wrong with; ``where`` as there."""
    return [
        f"{where}{name} is missing: transformers takes it for {shown(key.default)}, and vLLM does not start without it; add it"
        for name, key in table.items()
        if key.engines_need and name not in config
    ]


def unread(table: Mapping[str, Key], config: HFConfig) -> tuple[str, ...]:
    """Keys of a config that a table does not name, sorted."""
    return tuple(sorted(str(name) for name in config if name not in table))


def shown(value: Any) -> str:
    """A value as config.json writes it, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:116]} ..."


def joined(findings: Iterable[str], what: str) -> str:
    """All findings as one message."""
    return f"{what}: {'; '.join(findings)}"
