"""What a caller gives an engine for each prompt: its token ids, sampling fields and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from rlsync.errors import ConfigError

# Fields of ``vllm.SamplingParams``: the same of all prompts, or those of each.
Sampling = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def plain_ids(engine_id: str, token_ids: Sequence[int], vocab_size: int | None) -> list[int]:
    """The ids as Python's own integers. ``vocab_size``: tokens of the model; None where they are not known here.

    Raises ConfigError where there are none, some are no whole numbers, or the model has no token for some. vLLM looks only where it has a
    tokenizer; without one such an id ends the worker, on a GPU with all that it computes.
    """
    kinds = set(map(type, token_ids))
    is_whole = len(kinds) > 0 and all(issubclass(kind, Integral) for kind in kinds)
    if not is_whole or min(token_ids) < 0 or (vocab_size is not None and max(token_ids) >= vocab_size):
        text = repr(token_ids)
        known = "" if vocab_size is None else f" to {vocab_size - 1}"
        raise ConfigError(
            f"engine {engine_id}: a prompt is one or more token ids from 0{known}, and not {text if len(text) <= 80 else f'{text[:77]}...'}"
        )
    return list(token_ids) if kinds == {int} else [int(token) for token in token_ids]


def fields_of_each(engine_id: str, sampling: Sampling, count: int) -> list[Mapping[str, Any]]:
    """Sampling fields of each of ``count`` prompts. Raises ConfigError where there are not as many, or one is no mapping."""
    if isinstance(sampling, Mapping):
        return [sampling] * count
    for one in sampling:
        if not isinstance(one, Mapping):
            raise ConfigError(f"engine {engine_id}: sampling fields are a mapping, or one for each prompt, and not {one!r}")
    if len(sampling) != count:
        raise ConfigError(f"engine {engine_id}: {len(sampling)} mappings of sampling fields for {count} prompts; give one for each")
    return list(sampling)


def seeds_of_each(engine_id: str, seeds: Sequence[int] | None, count: int) -> list[int | None]:
    """The seed of each of ``count`` prompts, None where it has none. Raises ConfigError where there are not as many."""
    if seeds is None:
        return [None] * count
    if len(seeds) != count:
        raise ConfigError(f"engine {engine_id}: {len(seeds)} seeds for {count} prompts; give one for each")
    return list(seeds)
