"""What a config.json may hold: the tables against the installed transformers and vLLM, and every refusal in words."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV3Config,
    GenerationConfig,
    Glm4Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.utils import logging as transformers_logging

from rlsync.cli.shapes import SHAPES
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.models import FAMILIES, Family, check_config, family_of, model_of, unread_keys
from rlsync.models.base_keys import BASE_KEYS

CLASSES = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig,
    "mistral": MistralConfig, "mixtral": MixtralConfig, "qwen2_moe": Qwen2MoeConfig, "qwen3_moe": Qwen3MoeConfig,
    "glm4_moe": Glm4MoeConfig, "deepseek_v3": DeepseekV3Config,
    "qwen3_vl_moe": Qwen3VLMoeConfig, "seed_oss": SeedOssConfig, "glm4": Glm4Config,
    "smollm3": SmolLM3Config,
}  # fmt: skip
# Every class of a family, and the table of what it reads.
TABLES = [(family, CLASSES[family.model_type], family.keys) for family in FAMILIES] + [
    (family, CLASSES[family.model_type].sub_configs[section.name], section.keys) for family in FAMILIES for section in family.sections
]
SHARED = {
    "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160,
    "vocab_size": 131, "rope_theta": 1e6,
}  # fmt: skip
LLAMA = {**SHARED, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = {**SHARED, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**SHARED, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = {**SHARED, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
MIXTRAL = {**SHARED, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
QWEN2_MOE = {
    **SHARED, **_EXPERTS, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "shared_expert_intermediate_size": 96,
}  # fmt: skip
QWEN3_MOE = {**SHARED, **_EXPERTS, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
GLM4_MOE = {
    **SHARED, **_EXPERTS, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "n_routed_experts": 8, "num_mtp_layers": 0,
}  # fmt: skip
del GLM4_MOE["num_experts"]
DEEPSEEK_V3 = {
    **GLM4_MOE, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "qk_rope_head_dim": 32, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
LATENT_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
SEED_OSS = {**SHARED, "architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss"}
SMOLLM3 = {**SHARED, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
GLM4 = {**SHARED, "architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}
TEXT = (GLM4, LLAMA, QWEN2, QWEN3, MISTRAL, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, DEEPSEEK_V3, SEED_OSS, SMOLLM3)
TOWER = {"depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128}
QWEN2_5_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "text_config": {**SHARED, "vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    "vision_config": {**TOWER, "fullatt_block_indexes": [1, 3]},
}  # fmt: skip
QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
    "text_config": {
        **SHARED, "vocab_size": 151936, "head_dim": 32,
        "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    "vision_config": {**TOWER, "deepstack_visual_indexes": [0, 2, 3]},
}  # fmt: skip
QWEN3_VL_MOE = {
    **QWEN3_VL, "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
    "text_config": {**QWEN3_VL["text_config"], **_EXPERTS},
}  # fmt: skip
# The whole config.json of a released Qwen2.5-VL of 7 billion parameters.
FLAT = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
    "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
}  # fmt: skip
# What released ones of 32 and of 72 billion say of their towers: what transformers has as default they leave out.
SHORT = {
    **FLAT, "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "max_window_layers": 80,
    "vision_config": {
        "hidden_size": 1280, "in_chans": 3, "intermediate_size": 3456, "model_type": "qwen2_5_vl", "out_hidden_size": 8192,
        "spatial_patch_size": 14, "tokens_per_second": 2, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
VISION = (QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, FLAT)
ALL = (*TEXT, *VISION)

# What code that any model runs through asks of a config, and what is no key of a file: methods, and values that it computes.
NO_KEYS = {
    "get_text_config", "sub_configs", "to_dict", "to_diff_dict", "standardize_rope_params", "validate_rope", "default_theta",
    "per_layer_config", "_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal",
    "is_heterogeneous", "__class__", "__dict__", "base_model_tp_plan", "base_model_pp_plan", "has_no_defaults_at_init",
    "nested_rope_parameter_keys", "_rope_type_labels", "validate", "layer_type", "attribute_map", "keys_to_ignore_at_inference",
    "use_return_dict", "_output_attentions", "from_text_vision_configs",
}  # fmt: skip


def keys_read(path: Path) -> Iterator[str]:
    """Names X of ``config.X``, ``self.config.X``, ``getattr(config, "X")`` and ``hasattr(config, "X")`` in a source file."""

    def is_config(node: ast.AST) -> bool:
        return (isinstance(node, ast.Name) and node.id in ("config", "effective_config")) or (
            isinstance(node, ast.Attribute) and node.attr in ("config", "hf_config", "hf_text_config")
        )

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            target, name = node.args[:2]
            if is_config(target) and isinstance(name, ast.Constant):
                yield name.value


def sources(package: str, *files: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return [Path(spec.submodule_search_locations[0], file) for file in files]


@pytest.mark.parametrize(("family", "kind", "keys"), TABLES, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_every_field_of_transformers_class_is_in_the_table(family, kind, keys):
    """A new field of a new version is looked at before it is ignored."""
    declared = {field.name for field in dataclasses.fields(kind)}
    declared |= set(GenerationConfig._get_default_generation_params())
    assert declared <= keys.keys(), declared - keys.keys()


def all_keys(family: Family) -> set[str]:
    return {*family.keys, *(name for section in family.sections for name in section.keys)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_every_key_that_transformers_model_asks_for_is_in_the_table(family):
    configuration = Path(inspect.getfile(CLASSES[family.model_type]))
    model = configuration.with_name(configuration.name.replace("configuration_", "modeling_"))
    files = (model, *sources("transformers", "masking_utils.py", "modeling_rope_utils.py"))
    asked = {name for file in files for name in keys_read(file)}
    assert set(keys_read(model)) & all_keys(family), "the sources are no longer read"
    unknown = asked - all_keys(family) - NO_KEYS
    assert not unknown


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_every_key_that_vllm_asks_for_is_in_the_table(family):
    (file,) = sources("vllm", f"model_executor/models/{family.model_type}.py")
    if not file.is_file():
        pytest.skip("vLLM is not installed, or runs the family by transformers' own modules")
    of_vllm = {"quant_config", "model_config", "cache_config", "parallel_config", "compilation_config", "target_layer_count"}
    unknown = set(keys_read(file)) - all_keys(family) - NO_KEYS - of_vllm
    assert not unknown


@pytest.mark.parametrize(("family", "kind", "keys"), TABLES, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_defaults_are_those_of_transformers_class(family, kind, keys):
    for field in dataclasses.fields(kind):
        key = keys[field.name]
        if key.is_required or (not key.is_honoured and key.default is None):
            continue
        assert key.default == field.default, field.name


# What transformers' defaults lack: sections of a position, which engines go by, and a tower as wide as the language model.
LEAST = {
    "mistral": {"sliding_window": None},
    "glm4_moe": {"head_dim": 128},
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {"mrope_section": [16, 24, 24]}}, "vision_config": {"out_hidden_size": 8192}},
    "qwen3_vl": {
        "text_config": {"rope_parameters": {"mrope_section": [24, 20, 20], "mrope_interleaved": True}},
        "vision_config": {"out_hidden_size": 4096},
    },
    "qwen3_vl_moe": {
        "text_config": {
            "rope_parameters": {"mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
        "vision_config": {"out_hidden_size": 2048},
    },
}


def test_every_family_has_a_least_config_here():
    """Without one the tests of missing keys and of any value would pass it over."""
    assert {family.model_type for family in FAMILIES} == {hf["model_type"] for hf in ALL}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.model_type)
def test_the_default_config_of_transformers_class_is_accepted(family):
    config = {**CLASSES[family.model_type](**LEAST.get(family.model_type, {})).to_dict(), "architectures": list(family.architectures)}
    assert check_config(config) == []
    assert unread_keys(config) == ()


@pytest.mark.parametrize("hf", TEXT, ids=lambda hf: hf["model_type"])
@pytest.mark.parametrize("key", ["head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act"])
def test_a_missing_key_means_what_it_means_to_transformers(hf, key):
    """Negative control: the same with the key."""
    theirs = CLASSES[hf["model_type"]](**copy.deepcopy(hf))
    model = model_of(hf)
    read = {
        "head_dim": model.dims["head_dim"],
        "rms_norm_eps": model.transformer["layernorm_epsilon"],
        "max_position_embeddings": model.max_positions,
        "tie_word_embeddings": model.tied,
        "hidden_act": model.transformer["activation_func"],
    }
    theirs_head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert read[key] == (theirs_head_dim if key == "head_dim" else getattr(theirs, key))


REFUSALS = [
    (LLAMA, "attention_bias", True, "attention_bias is true; for LlamaForCausalLM it must be absent"),
    (LLAMA, "mlp_bias", True, "mlp_bias is true"),
    (QWEN3, "attention_bias", True, "attention_bias is true"),
    (QWEN2, "use_sliding_window", True, "use_sliding_window is true"),
    (QWEN3, "use_sliding_window", True, "use_sliding_window is true"),
    (LLAMA, "sliding_window", 4096, "sliding_window is 4096"),
    (QWEN3, "layer_types", ["full_attention", "sliding_attention", "full_attention", "full_attention"], "must be a list of full_attention"),
    (QWEN3, "layer_types", ["full_attention"], "layer_types has 1 entries for num_hidden_layers 4"),
    (QWEN3, "layer_types", "full_attention", 'layer_types is "full_attention"'),
    (MISTRAL, "sliding_window", 4096, "sliding_window is 4096; for MistralForCausalLM it must be null"),
    (MIXTRAL, "sliding_window", 4096, "sliding_window is 4096"),
    (MIXTRAL, "router_jitter_noise", 0.1, "the actor routes without noise"),
    (MIXTRAL, "num_experts_per_tok", 9, "num_experts_per_tok 9 is more than the 8 experts"),
    (MIXTRAL, "num_experts_per_tok", 1, "that of the one expert is always 1"),
    (QWEN2_MOE, "num_experts_per_tok", 9, "num_experts_per_tok 9 is more than the 8 experts"),
    (QWEN2_MOE, "mlp_only_layers", [4], "mlp_only_layers names layer 4; the model has 4"),
    (QWEN2_MOE, "decoder_sparse_step", 5, "no layer has experts"),
    (QWEN3_MOE, "num_local_experts", 4, "num_experts is 8 and num_local_experts is 4"),
    (QWEN3_MOE, "mlp_only_layers", ["1"], 'mlp_only_layers is ["1"]'),
    ({**GLM4_MOE, "n_group": 4}, "topk_group", 2, "transformers ranks a group by its 2 best experts, Megatron by its 1 best"),
    (GLM4_MOE, "topk_group", 2, "topk_group 2 is more than the n_group 1 groups"),
    (GLM4_MOE, "n_group", 3, "n_routed_experts 8 do not make n_group 3 equal groups of at least 2"),
    (GLM4_MOE, "num_experts_per_tok", 1, "num_experts_per_tok is 1"),
    (GLM4_MOE, "num_experts_per_tok", 9, "num_experts_per_tok 9 is more than the 8 experts"),
    (GLM4_MOE, "norm_topk_prob", False, "norm_topk_prob is false"),
    (GLM4_MOE, "first_k_dense_replace", 4, "no layer has experts, by first_k_dense_replace 4"),
    (DEEPSEEK_V3, "num_nextn_predict_layers", 1, "num_nextn_predict_layers is 1 and num_mtp_layers 0, which mean the same"),
    (DEEPSEEK_V3, "num_nextn_predict_layers", -1, "num_nextn_predict_layers is -1"),
    (DEEPSEEK_V3, "head_dim", 64, "head_dim is 64; it must be qk_rope_head_dim 32"),
    (DEEPSEEK_V3, "qk_head_dim", 64, "qk_head_dim is 64; it must be qk_nope_head_dim 128 + qk_rope_head_dim 32"),
    (DEEPSEEK_V3, "num_key_value_heads", 2, "num_key_value_heads is 2; it must be num_attention_heads 4"),
    (DEEPSEEK_V3, "rope_interleave", False, "rope_interleave is false"),
    (DEEPSEEK_V3, "attention_bias", True, "attention_bias is true"),
    (DEEPSEEK_V3, "scoring_func", "softmax", 'scoring_func is "softmax"'),
    (DEEPSEEK_V3, "topk_method", "greedy", 'topk_method is "greedy"'),
    (DEEPSEEK_V3, "moe_layer_freq", 2, "moe_layer_freq is 2"),
    (DEEPSEEK_V3, "auto_map", {"AutoModelForCausalLM": "modeling_kimi.Kimi"}, "auto_map is"),
    (DEEPSEEK_V3, "rope_scaling", {"rope_type": "linear", "factor": 2.0}, 'rope type "linear"; supported are default, yarn'),
    (DEEPSEEK_V3, "rope_scaling", {**LATENT_YARN, "mscale": 1.0}, "gives one of mscale and mscale_all_dim"),
    (DEEPSEEK_V3, "rope_scaling", {**LATENT_YARN, "attention_factor": 1.1}, "attention_factor of rope_scaling is 1.1; leave it out"),
    (DEEPSEEK_V3, "rope_scaling", {**LATENT_YARN, "factor": 1.0}, "factor of rope_scaling is 1.0; it must be above 1"),
    (GLM4_MOE, "num_nextn_predict_layers", 1, "num_nextn_predict_layers is 1 and num_mtp_layers 0, which mean the same"),
    (GLM4_MOE, "partial_rotary_factor", 1.5, "partial_rotary_factor of config.json is 1.5; it must be a number above 0 and up to 1"),
    (GLM4_MOE, "partial_rotary_factor", 0.1, "partial_rotary_factor 0.1 of a head_dim of 32 is 3 dimensions"),
    (GLM4_MOE, "rope_scaling", {"rope_type": "linear", "factor": 2.0}, 'rope type "linear"; supported are default'),
    (SMOLLM3, "no_rope_layers", [1, 0, 1], "no_rope_layers has 3 entries for num_hidden_layers 4"),
    (SMOLLM3, "no_rope_layers", [1, 0, 1, 2], "no_rope_layers is [1, 0, 1, 2]"),
    (SMOLLM3, "attention_bias", True, "attention_bias is true"),
    (SEED_OSS, "attention_out_bias", True, "attention_out_bias is true"),
    (QWEN3, "hidden_act", "gelu", 'hidden_act is "gelu"; for Qwen3ForCausalLM it must be "silu" or "swish"'),
    (QWEN3, "hidden_act", None, "hidden_act is null"),
    (QWEN3, "vocab_size", None, "vocab_size is null"),
    (QWEN3, "vocab_size", True, "vocab_size is true; for Qwen3ForCausalLM it must be a whole number from 1 to 2147483647"),
    (QWEN3, "hidden_size", "128", 'hidden_size is "128"'),
    (QWEN3, "hidden_size", 128.0, "hidden_size is 128.0"),
    (QWEN3, "num_attention_heads", 0, "num_attention_heads is 0"),
    (QWEN3, "num_hidden_layers", -1, "num_hidden_layers is -1"),
    (QWEN3, "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000; for Qwen3ForCausalLM it must be a whole number from 1 to 10000"),
    (QWEN3, "num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    (LLAMA, "hidden_size", 130, "hidden_size 130 is not a multiple of num_attention_heads 4"),
    (QWEN3, "head_dim", 33, "head_dim 33 is odd"),
    (LLAMA, "head_dim", 33, "head_dim 33 is odd"),
    (QWEN3, "head_dim", None, "head_dim is null"),
    (QWEN3, "rms_norm_eps", None, "rms_norm_eps is null"),
    (QWEN3, "rms_norm_eps", "1e-6", 'rms_norm_eps is "1e-6"'),
    (QWEN3, "rms_norm_eps", float("nan"), "rms_norm_eps is NaN"),
    (QWEN3, "tie_word_embeddings", None, "tie_word_embeddings is null"),
    (QWEN3, "tie_word_embeddings", "false", 'tie_word_embeddings is "false"'),
    (QWEN3, "attention_dropout", 0.1, "attention_dropout is 0.1"),
    (QWEN3, "is_causal", False, "is_causal is false"),
    (QWEN3, "use_bidirectional_attention", True, "use_bidirectional_attention is true"),
    (QWEN3, "quantization_config", {"quant_method": "fp8"}, 'quantization_config is {"quant_method": "fp8"}'),
    (QWEN3, "compression_config", {"quant_method": "compressed-tensors"}, "compression_config is"),
    (QWEN3, "quantization", {"group_size": 64, "bits": 4}, "quantization is"),
    (QWEN3, "per_layer_config", {"1": {"num_attention_heads": 2}}, "per_layer_config is"),
    (QWEN3, "text_config", {"hidden_size": 64}, "text_config is"),
    (QWEN3, "auto_map", {"AutoModelForCausalLM": "modeling_own.Own"}, "auto_map is"),
    (QWEN3, "auto_map", [], "auto_map is []"),
    (QWEN3, "pruned_heads", {"0": [1]}, "pruned_heads is"),
    (QWEN3, "is_encoder_decoder", True, "is_encoder_decoder is true"),
    (QWEN3, "transformers_weights", "other.safetensors", "transformers_weights is"),
    (LLAMA, "logit_scale", 0.5, "logit_scale is 0.5"),
    (LLAMA, "bias", True, "bias is true"),
    (QWEN2, "qk_norm", True, "qk_norm is true"),
    (QWEN2, "use_mrope", True, "use_mrope is true"),
    (QWEN3, "dtype", "float8_e4m3fn", 'dtype is "float8_e4m3fn"'),
    (QWEN3, "torch_dtype", "auto", 'torch_dtype is "auto"'),
    (QWEN3, "pad_token_id", 131, "pad_token_id is 131; the vocabulary has 131 tokens"),
    (LLAMA, "model_type", "mistral", 'model_type is "mistral", but architectures is LlamaForCausalLM, whose model_type is "llama"'),
    (QWEN3, "model_type", None, "model_type is null"),
    (QWEN3, "architectures", ["GemmaForCausalLM"], "unknown architecture GemmaForCausalLM"),
    (QWEN3, "architectures", None, "unknown architecture null"),
    (QWEN3, "architectures", "Qwen3ForCausalLM", 'unknown architecture "Qwen3ForCausalLM"'),
    (QWEN3, "architectures", ["Own", "Qwen3ForCausalLM"], "unknown architecture"),
    (QWEN3, "partial_rotary_factor", 0.5, "partial_rotary_factor of config.json is 0.5"),
    (QWEN3, "rope_scaling", {"rope_type": "longrope", "factor": 4.0}, 'rope type "longrope"'),
]  # fmt: skip


@pytest.mark.parametrize(("hf", "key", "value", "said"), REFUSALS, ids=lambda v: v if isinstance(v, str) else "")
def test_what_would_be_computed_otherwise_is_refused_by_name(hf, key, value, said):
    """Negative control: the same without the key."""
    (finding,) = check_config({"head_dim": 32, **hf, key: value})
    assert said in finding
    assert check_config(hf) == []
    with pytest.raises(ConfigError, match=r"^config\.json: "):
        model_of({"head_dim": 32, **hf, key: value})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_must_be_stated(key):
    (finding,) = check_config({name: value for name, value in QWEN3.items() if name != key})
    assert f"{key} is missing; Qwen3ForCausalLM needs it" in finding


ACCEPTED = [
    (QWEN3, {"hidden_act": "swish"}),
    (QWEN3, {"is_causal": True, "quantization_config": None, "pruned_heads": {}, "rope_scaling": None, "layer_types": None}),
    (QWEN2, {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2, "use_mrope": False, "attention_bias": False}),
    (QWEN3, {"layer_types": ["full_attention"] * 4, "attention_dropout": 0, "partial_rotary_factor": 1.0}),
    (
        LLAMA,
        {"pretraining_tp": 2, "pad_token_id": -1, "sliding_window": None, "bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6},
    ),
    (LLAMA, {"auto_map": {"AutoTokenizer": "tokenization_own.Own"}, "torch_dtype": "torch.bfloat16", "mlp_bias": False}),
    (LLAMA, {"num_key_value_heads": None, "head_dim": None, "model_type": "llama"}),
]


@pytest.mark.parametrize(("hf", "changes"), ACCEPTED)
def test_what_changes_nothing_is_accepted(hf, changes):
    assert check_config({**hf, **changes}) == []
    assert unread_keys({**hf, **changes}) == ()


def test_everything_wrong_is_said_at_once():
    findings = check_config({**QWEN3, "hidden_act": "gelu", "is_causal": False, "model_type": "qwen2", "rope_theta": 0, "vocab_size": 0})
    assert len(findings) == 5
    with pytest.raises(ConfigError) as raised:
        model_of({**QWEN3, "hidden_act": "gelu", "is_causal": False})
    assert "hidden_act" in str(raised.value) and "is_causal" in str(raised.value)


@pytest.mark.parametrize("content", [None, [], "x", 1, {}, {"architectures": {}}, {"architectures": [None]}, {"architectures": [["x"]]}])
def test_anything_that_json_can_hold_is_answered(content):
    assert len(check_config(content)) == 1


def test_any_value_of_any_key_is_answered():
    topology = Topology(tp_size=2, pp_size=2)
    small = {**FLAT, "num_hidden_layers": 2, "vision_config": {**FLAT["vision_config"], "depth": 2, "fullatt_block_indexes": [1]}}
    for hf in (*TEXT, QWEN2_5_VL, QWEN3_VL, small):
        family = family_of(hf)
        for value in (None, True, -1, 0.5, 10**400, float("inf"), "x", [], [[]], {}, {"x": {}}, {"x": 1}):
            changed = [{**hf, key: value} for key in family.known_keys.keys() - BASE_KEYS.keys()]
            for section in family.sections:
                inner = section.of(hf)[0]
                changed += [
                    {**hf, section.name: {**inner, key: value}} for key in section.keys.keys() - BASE_KEYS.keys() if inner is not hf
                ]
            found = [check_config(config, topology) for config in changed]
            found += [check_config({**hf, key: value}) for key in BASE_KEYS]  # which say nothing about the layout
            assert all(isinstance(finding, str) for findings in found for finding in findings)


def test_keys_that_nobody_reads_are_listed():
    assert unread_keys({**QWEN3, "attn_logit_softcap": 30.0, "num_experts": 4}) == ("attn_logit_softcap", "num_experts")


def test_a_layout_that_cannot_divide_the_model_is_found():
    findings = check_config({**QWEN3, "intermediate_size": 161}, Topology(tp_size=2, pp_size=3, dp_size=2, ep_size=2))
    assert len(findings) == 4
    assert (
        "has no experts" in findings[0]
        and "4 layers cannot be split" in findings[1]
        and "gate_proj" in findings[2]
        and "down_proj" in findings[3]
    )
    assert check_config(QWEN3, Topology(tp_size=2, pp_size=2)) == []


@pytest.mark.parametrize("name", [name for name in SHAPES if "a3b" not in name])
def test_the_shapes_that_ship_are_accepted(name):
    assert check_config(SHAPES[name]) == []


@pytest.mark.parametrize(("hf", "changes"), ACCEPTED)
def test_transformers_takes_what_is_accepted(hf, changes):
    transformers_logging.set_verbosity_error()
    CLASSES[hf["model_type"]](**{**hf, **changes, "torch_dtype": "bfloat16", "attention_dropout": 0.0})


# Fields of Megatron-Core's TransformerConfig that decide what a layer with experts computes, whatever is beside them.
ROUTING = (
    "num_moe_experts", "moe_ffn_hidden_size", "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk", "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
)  # fmt: skip


@pytest.mark.parametrize("hf", [hf for hf in ALL if "num_experts" in model_of(hf).dims], ids=lambda hf: hf["model_type"])
def test_families_with_experts_state_all_that_routes(hf: dict[str, Any]) -> None:
    # An override is compared with what a family states, and passes where it states nothing.
    assert set(ROUTING) <= set(model_of(hf).transformer)
