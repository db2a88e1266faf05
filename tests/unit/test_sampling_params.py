"""Claims about what a caller gives an engine: token ids, and fields of vLLM's SamplingParams."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from vllm.sampling_params import SamplingParams

from rlsync.engine.compat.sampling import sampling_params
from rlsync.engine.handles.prompts import fields_of_each, plain_ids, seeds_of_each
from rlsync.errors import ConfigError


def test_fields_are_vllms_and_seeds_are_of_each_prompt() -> None:
    fields = {"n": 2, "temperature": 1, "max_tokens": None, "stop_token_ids": [3], "logit_bias": {5: -100}, "seed": 9}
    first, second = sampling_params([fields] * 2, [7, None])
    assert (first.n, first.temperature, first.max_tokens, first.logit_bias, first.seed) == (2, 1, None, {5: -100}, 7)
    assert second.seed == 9
    with pytest.raises(ConfigError, match=r"seeds: Expected `int . null`, got `float`"):
        sampling_params([fields], [1.5])  # type: ignore[list-item]


def test_a_value_that_an_engines_core_could_not_read_is_refused_by_name() -> None:
    """vLLM takes it, and the thread of its core that reads requests ends at it."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams(max_tokens=2.5)), type=SamplingParams)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"sampling field max_tokens: Expected `int . null`, got `float`, and the value is 2.5"):
        sampling_params([{"max_tokens": 2.5}], [None])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_new_tokens": 3}, "no sampling field max_new_tokens; vllm.SamplingParams has n, "),
        ({"stop_token_ids": ["a"]}, "sampling field stop_token_ids: Expected `int`, got `str`"),
        ({"n": True}, "sampling field n: Expected `int`, got `bool`"),
        ({"seed": 2**70}, "sampling field seed: .*ints"),
        ({"temperature": -1.0}, "vllm.SamplingParams: temperature must be non-negative, got -1.0"),
    ],
)
def test_what_vllm_does_not_take_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sampling_params([{"n": 2}, fields], [None, None])


@pytest.mark.parametrize("prompt", [[3, 4], (3, 4), np.array([3, 4]), [np.int64(3), 4], range(3, 5)])
def test_ids_are_pythons_own_integers(prompt: Any) -> None:
    """JSON has no other ones."""
    ids = plain_ids("e0", prompt, None)
    assert ids == [3, 4] and set(map(type, ids)) == {int}


@pytest.mark.parametrize(("prompt", "vocab_size"), [([], None), ([-1], None), ([1.0], None), ("abc", None), ([[1]], None), ([7], 7)])
def test_a_prompt_that_is_no_token_ids_is_refused(prompt: Any, vocab_size: int | None) -> None:
    with pytest.raises(ConfigError, match="engine e0: a prompt is one or more token ids from 0"):
        plain_ids("e0", prompt, vocab_size)


def test_prompts_have_the_same_fields_or_each_its_own() -> None:
    one, other = {"n": 1}, {"n": 2}
    assert fields_of_each("e0", one, 2) == [one, one] and fields_of_each("e0", (one, other), 2) == [one, other]
    assert [made.n for made in sampling_params([one, other, one], [None] * 3)] == [1, 2, 1]
    assert seeds_of_each("e0", None, 2) == [None, None] and seeds_of_each("e0", (3, 4), 2) == [3, 4]
    with pytest.raises(ConfigError, match="engine e0: 1 mappings of sampling fields for 2 prompts; give one for each"):
        fields_of_each("e0", [one], 2)
    with pytest.raises(ConfigError, match="engine e0: sampling fields are a mapping, or one for each prompt, and not 'n'"):
        fields_of_each("e0", "n", 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="engine e0: 1 seeds for 2 prompts"):
        seeds_of_each("e0", [3], 2)
