"""What a config.json of a vision-language model may hold: what its keys mean to transformers, and every refusal in words."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.models import Model, check_config, model_of, unread_keys
from tests.unit.test_models_config import CLASSES, FLAT, QWEN2_5_VL, QWEN3_VL, SHORT, VISION

MROPE = {"type": "mrope", "mrope_section": [4, 6, 6]}
# The key is a path into the config.
VISION_REFUSALS = [
    (QWEN2_5_VL, "text_config.hidden_act", "gelu", 'text_config.hidden_act is "gelu"; for Qwen2_5_VLForConditionalGeneration it must be'),
    (QWEN2_5_VL, "text_config.hidden_size", "128", 'text_config.hidden_size is "128"'),
    (QWEN2_5_VL, "text_config", [], "text_config is []; Qwen2_5_VLForConditionalGeneration needs it: an object of keys"),
    (QWEN2_5_VL, "vision_config", None, "vision_config is null"),
    (QWEN3_VL, "text_config", None, "text_config is null"),
    (QWEN2_5_VL, "text_config.head_dim", 64, "hidden_size 128 is not num_attention_heads 4 x head_dim 64"),
    (FLAT, "head_dim", 64, "hidden_size 3584 is not num_attention_heads 28 x head_dim 64"),
    (FLAT, "use_sliding_window", True, "use_sliding_window is true"),
    (FLAT, "rope_scaling", {"type": "longrope", "factor": 4.0}, 'rope type "longrope"; supported are default, mrope'),
    (QWEN3_VL, "text_config.attention_bias", True, "text_config.attention_bias is true"),
    (QWEN2_5_VL, "hidden_size", 256, "hidden_size is 256 beside text_config, whose hidden_size is 128"),
    (QWEN3_VL, "rms_norm_eps", 1e-6, "rms_norm_eps is 1e-06 beside text_config"),
    (QWEN2_5_VL, "rope_scaling", {**MROPE, "mrope_section": [6, 5, 5]}, "beside text_config, which says otherwise"),
    (QWEN2_5_VL, "text_config.rope_scaling", {"type": "mrope"}, "mrope_section of rope_scaling is null"),
    (QWEN2_5_VL, "text_config.rope_scaling", None, "mrope_section of rope_parameters is null"),
    (QWEN2_5_VL, "text_config.rope_scaling", {**MROPE, "mrope_section": [4, 6, 7]}, "mrope_section [4, 6, 7] has 17 pairs"),
    (QWEN2_5_VL, "text_config.rope_scaling", {**MROPE, "mrope_section": [8, 8]}, "it must be three whole numbers"),
    (QWEN2_5_VL, "text_config.rope_scaling", {**MROPE, "mrope_interleaved": True}, "mrope_interleaved of rope_scaling is true"),
    (QWEN2_5_VL, "text_config.rope_scaling", {**MROPE, "factor": 2.0}, "holds factor"),
    (QWEN3_VL, "text_config.rope_scaling", {"mrope_section": [6, 5, 5]}, "mrope_interleaved of rope_scaling is null; it must be true"),
    (
        QWEN3_VL,
        "text_config.rope_scaling",
        {"mrope_section": [4, 6, 6], "mrope_interleaved": True},
        "mrope_section [4, 6, 6] cannot be interleaved over 16 pairs: the last turn of height or width would be pair 17",
    ),
    (QWEN3_VL, "text_config.tie_word_embeddings", True, "tie_word_embeddings is false, which counts, and true in text_config"),
    (QWEN2_5_VL, "image_token_id", None, "image_token_id is null"),
    (QWEN2_5_VL, "image_token_id", 151936, "image_token_id 151936: the vocabulary has 151936 tokens"),
    (QWEN3_VL, "video_token_id", 151655, "token ids of pictures must differ"),
    (QWEN2_5_VL, "vision_config.out_hidden_size", 64, "vision_config.out_hidden_size is 64, and hidden_size of the language model 128"),
    (QWEN2_5_VL, "vision_config.num_heads", 3, "vision_config.hidden_size 64 is not a multiple of 4 x num_heads 3"),
    (QWEN2_5_VL, "vision_config.hidden_act", "gelu", 'vision_config.hidden_act is "gelu"'),
    (QWEN3_VL, "vision_config.hidden_act", "silu", 'vision_config.hidden_act is "silu"'),
    (QWEN2_5_VL, "vision_config.window_size", 100, "vision_config.window_size 100 is not a multiple of patch_size x spatial_merge_size 28"),
    (QWEN2_5_VL, "vision_config.fullatt_block_indexes", [1, 4], "it must be ascending block numbers below depth 4"),
    (QWEN2_5_VL, "vision_config.fullatt_block_indexes", [1, True], "fullatt_block_indexes is [1, true]"),
    (QWEN3_VL, "vision_config.deepstack_visual_indexes", [2, 0], "vision_config.deepstack_visual_indexes is [2, 0]; it must be ascending"),
    (QWEN3_VL, "vision_config.num_position_embeddings", 60, "num_position_embeddings 60 is not the number of places in a square"),
    (QWEN2_5_VL, "vision_config.in_chans", 1, "vision_config.in_chans is 1"),
    (QWEN2_5_VL, "vision_config.patch_size", [14, 14], "vision_config.patch_size is [14, 14]"),
    (QWEN2_5_VL, "vision_config.rope_theta", 5000, "vision_config.rope_theta is 5000"),
    (QWEN2_5_VL, "vision_config.rope_parameters", {"rope_type": "axial", "rope_theta": 5000}, "vision_config.rope_parameters is"),
    (QWEN2_5_VL, "vision_config.head_dim", 16, "vision_config.head_dim is 16"),
    (QWEN2_5_VL, "vision_config.quantization_config", {"quant_method": "fp8"}, "vision_config.quantization_config is"),
    (QWEN2_5_VL, "vision_config.depth", None, "vision_config.depth is null"),
    (QWEN3_VL, "text_config.model_type", "qwen3", 'text_config.model_type is "qwen3"'),
    (QWEN2_5_VL, "audio_config", {"depth": 1}, "audio_config is"),
]  # fmt: skip


def with_key(hf: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a config with one key set, which a dot may lead to inside another."""
    outer, _, inner = path.rpartition(".")
    return {**hf, outer: {**hf[outer], inner: value}} if outer else {**hf, path: value}


@pytest.mark.parametrize(("hf", "path", "value", "said"), VISION_REFUSALS, ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_vision_language_model_would_compute_otherwise_is_refused_by_name(hf, path, value, said):
    """Negative control: the same without the key."""
    (finding,) = check_config(with_key(hf, path, value))
    assert said in finding
    assert check_config(hf) == []


def test_deepstack_needs_its_layers_on_the_first_stage():
    """Names the indexes, the layers and both ways out. Negative controls: each way out, and a tower without deepstack."""
    (finding,) = check_config(QWEN3_VL, Topology(pp_size=2))
    assert (
        "deepstack_visual_indexes [0, 2, 3] go into language layers 0 to 2, and the first pipeline stage holds 2 of 4 layers" in finding
        and "fewer stages" in finding
        and "a larger first stage by decoder_first_pipeline_num_layers" in finding
    )
    assert check_config(QWEN3_VL, Topology(pp_size=1)) == []
    assert check_config(QWEN3_VL, Topology(pp_size=2, first_stage_layers=3, last_stage_layers=1)) == []
    assert check_config(QWEN2_5_VL, Topology(pp_size=4)) == []
    (finding,) = check_config(QWEN2_5_VL, Topology(first_stage_layers=1))
    assert finding == "topology: first_stage_layers 1 and last_stage_layers None need a pp_size above 1, which is 1"
    with pytest.raises(ConfigError, match="topology: vpp_size 2 needs a pp_size above 1, which is 1"):
        Topology(vpp_size=2)
    for name in ("first_stage_layers", "last_stage_layers"):
        with pytest.raises(ConfigError, match=f"topology: {name} is -1; it must be at least 1"):
            Topology(pp_size=2, **{name: -1})
    (finding,) = check_config(QWEN3_VL, Topology(pp_size=2, vpp_size=2))
    assert "the first virtual chunk of the first pipeline stage holds 1 of 4 layers" in finding
    (finding,) = check_config(with_key(QWEN3_VL, "text_config.num_hidden_layers", 2))
    assert "deepstack_visual_indexes [0, 2, 3] go into a language layer each, and there are 2" in finding


def read(model: Model) -> dict[str, Any]:
    return {"dims": model.dims, "transformer": model.transformer, "rope": model.rope, "tied": model.tied, "positions": model.max_positions}


@pytest.mark.parametrize("hf", [*VISION, SHORT], ids=lambda hf: hf["model_type"])
def test_a_vision_config_means_what_it_means_to_transformers(hf):
    """Flat and nested, old spellings of rope and missing keys: transformers writes all of them out, and that reads the same."""
    theirs = CLASSES[hf["model_type"]](**copy.deepcopy(hf))
    written = {**json.loads(theirs.to_json_string(use_diff=False)), "architectures": hf["architectures"]}
    ours = model_of(hf)
    assert read(model_of(written)) == read(ours)
    assert ours.rope.mrope_section == tuple(theirs.text_config.rope_parameters["mrope_section"])
    assert ours.rope.theta == theirs.text_config.rope_parameters["rope_theta"]
    assert ours.vision is not None
    tower = theirs.vision_config
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels"):
        assert getattr(ours.vision, name) == getattr(tower, name), name
    assert (ours.dims["num_blocks"], ours.dims["vision"], ours.values["vision_num_heads"]) == (
        tower.depth,
        tower.hidden_size,
        tower.num_heads,
    )
    assert ours.vision.deepstack_visual_indexes == tuple(getattr(tower, "deepstack_visual_indexes", ()))
    assert (ours.vision.image_token_id, ours.vision.vision_end_token_id) == (theirs.image_token_id, theirs.vision_end_token_id)
    assert unread_keys(hf) == unread_keys(written) == ()


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_a_head_is_tied_where_transformers_ties_it(outer, inner):
    changes = {} if outer is None else {"tie_word_embeddings": outer}
    config = {
        **QWEN2_5_VL,
        **changes,
        "text_config": {**QWEN2_5_VL["text_config"], **({} if inner is None else {"tie_word_embeddings": inner})},
    }
    assert model_of(config).tied is CLASSES["qwen2_5_vl"](**copy.deepcopy(config)).tie_word_embeddings


VISION_ACCEPTED = [
    # As transformers 4.5x saved a flat one again: the keys of the text at both levels.
    {**QWEN2_5_VL, **QWEN2_5_VL["text_config"], "rope_theta": 1e6, "sliding_window": 32768},
    with_key(QWEN2_5_VL, "text_config.rope_scaling", {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}),
    with_key(QWEN2_5_VL, "text_config.rope_scaling", {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}),
    with_key(QWEN2_5_VL, "text_config.image_token_id", None),
    with_key(QWEN2_5_VL, "vision_config.model_type", "qwen2_5_vl"),
    with_key(QWEN3_VL, "vision_config.model_type", "qwen3_vl"),
    with_key(QWEN3_VL, "vision_config.rope_parameters", {"rope_type": "axial", "rope_theta": 10000.0}),
    with_key(QWEN3_VL, "vision_config.torch_dtype", "bfloat16"),
]


@pytest.mark.parametrize("config", VISION_ACCEPTED)
def test_what_changes_nothing_in_a_vision_config_is_accepted(config):
    assert check_config(config) == []
    assert unread_keys(config) == ()
    CLASSES[config["model_type"]](**copy.deepcopy(config))


def test_keys_inside_that_nobody_reads_are_listed_with_their_place():
    assert unread_keys(with_key(with_key(QWEN3_VL, "vision_config.mlp_ratio", 4), "text_config.num_experts", 8)) == (
        "text_config.num_experts",
        "vision_config.mlp_ratio",
    )
