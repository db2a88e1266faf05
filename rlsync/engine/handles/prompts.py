"""Token ids of a prompt as an engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from rlsync.errors import ConfigError


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
