"""Rotary embeddings: both spellings of config.json, and llama3 frequencies as transformers computes them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlsync.megatron.rope import Llama3Scaling, Rope, llama3_inverse_frequencies, read_rope

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA32 = {**LLAMA31, "factor": 32.0}
UNLIKE = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0, "original_max_position_embeddings": 512}


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


def test_a_partial_rotation_is_a_share_of_the_head():
    assert read_rope({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}) == Rope(1e4, percent=0.5)


@pytest.mark.parametrize("scaling", [LLAMA31, LLAMA32, UNLIKE])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_llama3_frequencies_are_those_of_transformers(scaling, head_dim):
    theirs = LlamaConfig(head_dim=head_dim, rope_parameters={**scaling, "rope_theta": 5e5}, max_position_embeddings=131072)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    ours = llama3_inverse_frequencies(read_rope(theirs.to_dict()), head_dim)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0)


def test_megatron_alone_would_be_wrong_for_other_constants():
    """Negative control: its frequencies agree for Llama 3.1's constants only."""
    from megatron.core.models.common.embeddings import RotaryEmbedding

    theirs = RotaryEmbedding(128, 1.0, rotary_base=500000, rope_scaling=True, rope_scaling_factor=8.0, use_cpu_initialization=True)
    ours = llama3_inverse_frequencies(read_rope({"rope_theta": 5e5, "rope_scaling": LLAMA31}), 128)
    torch.testing.assert_close(theirs.inv_freq, ours, rtol=3e-7, atol=0)
    other = llama3_inverse_frequencies(read_rope({"rope_theta": 5e5, "rope_scaling": {**LLAMA31, "high_freq_factor": 8.0}}), 128)
    assert ((theirs.inv_freq - other).abs() / other).max() > 0.1
