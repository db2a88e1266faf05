"""Fields of ``vllm.SamplingParams`` as a caller gives them: made, or refused by name.

vLLM looks at most of them when they are made, and at the types of some only where its core reads a request: what it cannot read there ends
the thread that reads all requests, and the engine answers nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from vllm.sampling_params import SamplingParams

from rlsync.errors import ConfigError

_FIELDS = {field.name: field.type for field in msgspec.structs.fields(SamplingParams) if not field.name.startswith("_")}
# What msgspec reads by itself; others are objects of vLLM's own, which look at themselves.
_PLAIN = (bool, int, float, str, list, dict, type(None))


def sampling_params(fields: Sequence[Mapping[str, Any]], seeds: Sequence[int | None]) -> list[SamplingParams]:
    """What vLLM is given for each of several prompts; a seed of None leaves that to the prompt's ``fields``, of which many may be the same
    object.

    Raises ConfigError naming a field that there is not, a value of another type, or what vLLM says is wrong.
    """
    for one in {id(one): one for one in fields}.values():
        _check_fields(one)
    _check("seeds", list(seeds), list[int | None])
    pairs = zip(fields, seeds, strict=True)
    try:
        return [SamplingParams(**one) if seed is None else SamplingParams(**{**one, "seed": seed}) for one, seed in pairs]
    except Exception as error:
        raise ConfigError(f"vllm.SamplingParams: {error}") from error


def _check_fields(fields: Mapping[str, Any]) -> None:
    unknown = sorted(map(str, fields.keys() - _FIELDS.keys()))
    if unknown:
        raise ConfigError(f"no sampling field {', '.join(unknown)}; vllm.SamplingParams has {', '.join(_FIELDS)}")
    for name, value in fields.items():
        if _is_plain(_FIELDS[name]):
            _check(f"sampling field {name}", value, _FIELDS[name])


def _check(what: str, value: Any, annotation: Any) -> None:
    """As strict as the core is: no text for a number, and no fraction for a whole one."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=annotation)
    except (msgspec.MsgspecError, TypeError, OverflowError) as error:
        raise ConfigError(f"{what}: {error}, and the value is {value!r}") from None


def _is_plain(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return all(map(_is_plain, get_args(annotation)))
    return (get_origin(annotation) or annotation) in _PLAIN
