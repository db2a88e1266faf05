"""Rotary embeddings: both spellings of config.json, and llama3 frequencies as transformers computes them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rlsync.megatron.model import inverse_frequencies
from rlsync.models.rope import DEFAULT_THETA, Llama3Scaling, Rope
from rlsync.models.rope import read_rope as read

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA32 = {**LLAMA31, "factor": 32.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
UNLIKE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 512}


def read_rope(config, **options):
    rope, findings = read(config, **options)
    assert not findings
    return rope


def test_both_spellings_of_the_default_mean_the_same():
    assert read_rope({"rope_theta": 5e5}) == read_rope({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}) == Rope(5e5)
    assert read_rope({"rope_theta": 5e5, "rope_scaling": None}) == Rope(5e5)


def test_a_config_that_names_no_base_has_that_of_the_first_llama():
    assert read_rope({}) == Rope(10000.0)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": UNLIKE},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **{k: v for k, v in UNLIKE.items() if k != "rope_type"}}},
        {"rope_parameters": {**UNLIKE, "rope_theta": 5e5}},
    ],
)
def test_every_spelling_of_llama3_means_the_same(config):
    assert read_rope(config) == Rope(5e5, llama3=Llama3Scaling(4.0, 2.0, 6.0, 512))


def test_linear_scaling_interpolates_positions():
    assert read_rope({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}) == Rope(1e4, interpolation=2.0)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "keep one of them"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR}, "keep one of them"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {**LINEAR, "rope_theta": 5e5}}, "keep one of them"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of config.json is 0.5; it must be 1"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor of rope_parameters is 0.5"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor of rope_scaling is 0.25"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, 'rope_parameters asks for rope type "longrope"; supported are'),
        ({"rope_parameters": {"rope_type": "yarn"}}, '"yarn" but gives no factor'),
        ({"rope_parameters": {**YARN, "truncate": False}}, "truncate of rope_parameters is false"),
        ({"rope_parameters": {**YARN, "beta_fast": "32"}}, 'beta_fast of rope_parameters is "32"'),
        ({"rope_parameters": {**YARN, "low_freq_factor": 1.0}}, "holds low_freq_factor, which that type does not have"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 'rope_scaling asks for rope type "dynamic"'),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}}, 'rope_type "default" and type "mrope"'),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "holds mrope_section"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "holds factor, which that type does not have"),
        ({"rope_parameters": {"rope_type": "linear"}}, '"linear" but gives no factor'),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'factor of rope_scaling is "2"; it must be a number above 0'),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of rope_scaling is 0"),
        ({"rope_theta": None}, "gives no rope_theta"),
        ({"rope_theta": "1e6"}, 'rope_theta of rope_parameters is "1e6"'),
        ({"rope_theta": float("nan")}, "rope_theta of rope_parameters is NaN"),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1000000.0, and 10000.0 in rope_parameters"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type (full_attention)"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
        (
            {"rope_scaling": {**UNLIKE, "low_freq_factor": 6.0}},
            "low_freq_factor 6.0 of rope_scaling must be below its high_freq_factor 6.0",
        ),
        ({"rope_scaling": UNLIKE, "original_max_position_embeddings": 256}, "original_max_position_embeddings is 256, and 512 in"),
        ({"rope_scaling": {"rope_type": [1]}}, "asks for rope type [1]"),
    ],
)
def test_what_would_be_read_in_two_ways_is_refused(config, said):
    rope, findings = read(config)
    assert rope is None
    assert any(said in finding for finding in findings), findings


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": dict(LINEAR)},
        {"rope_scaling": {}, "rope_parameters": dict(LINEAR)},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 5e5},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "partial_rotary_factor": 1.0},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {
            "original_max_position_embeddings": 256,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        {},
    ],
)
def test_what_is_accepted_means_what_it_means_to_transformers(config):
    theirs = LlamaConfig(head_dim=32, max_position_embeddings=4096, **copy.deepcopy(config))
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        expected = LlamaRotaryEmbedding(theirs).inv_freq
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    rope = read_rope(config, max_positions=4096)
    if rope.llama3 is not None:
        ours = inverse_frequencies(rope, 32)
    else:
        ours = 1 / rope.theta ** (torch.arange(0, 32, 2) / 32) / (1 if rope.interpolation is None else rope.interpolation)
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0)


def test_the_default_base_is_that_of_transformers():
    assert DEFAULT_THETA == LlamaConfig.default_theta == Qwen2Config.default_theta == Qwen3Config.default_theta


@pytest.mark.parametrize("scaling", [LLAMA31, LLAMA32, UNLIKE])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_llama3_frequencies_are_those_of_transformers(scaling, head_dim):
    theirs = LlamaConfig(head_dim=head_dim, rope_parameters={**scaling, "rope_theta": 5e5}, max_position_embeddings=131072)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    ours = inverse_frequencies(read_rope(theirs.to_dict()), head_dim)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0)


def test_megatron_alone_would_be_wrong_for_other_constants():
    """Negative control: its frequencies agree for Llama 3.1's constants only."""
    from megatron.core.models.common.embeddings import RotaryEmbedding

    theirs = RotaryEmbedding(128, 1.0, rotary_base=500000, rope_scaling=True, rope_scaling_factor=8.0, use_cpu_initialization=True)
    ours = inverse_frequencies(read_rope({"rope_theta": 5e5, "rope_scaling": LLAMA31}), 128)
    torch.testing.assert_close(theirs.inv_freq, ours, rtol=3e-7, atol=0)
    other = inverse_frequencies(read_rope({"rope_theta": 5e5, "rope_scaling": {**LLAMA31, "high_freq_factor": 8.0}}), 128)
    assert ((theirs.inv_freq - other).abs() / other).max() > 0.1


@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        {**YARN, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 0.75},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
        {**YARN, "factor": 0.5},
    ],
)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_yarn_frequencies_and_factor_are_those_of_transformers(scaling, head_dim):
    theirs = Qwen2Config(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters={"rope_theta": 1e6, **scaling})
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    rope = read_rope(theirs.to_dict(), max_positions=theirs.max_position_embeddings)
    assert rope.yarn.attention_factor == pytest.approx(factor)
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=1e-6, atol=0)


def test_yarn_reaches_further_than_the_positions_of_the_config():
    assert read_rope({"rope_parameters": YARN}).reach(128) == 256.0
    assert read_rope({"rope_parameters": LINEAR}).reach(128) == 256.0
    assert read_rope({}).reach(128) == 128
