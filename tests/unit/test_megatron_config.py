"""Reading Hugging Face configs: what Megatron is told, and what is refused in words."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.config import model_config
from rlsync.megatron.model import _accumulating_without_apex
from rlsync.models import REFUSED_SWITCHES, supported_architectures
from tests.models import tiny_config

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "rms_norm_eps": 1e-6,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
QWEN2 = {name: value for name, value in QWEN3.items() if name != "head_dim"} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA = {**QWEN3, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def without(hf, key):
    return {name: value for name, value in hf.items() if name != key}


def config(hf=QWEN3, *, dtype=torch.float32, divisible_by=1, overrides=None, is_transformer_engine=False, **topology):
    return model_config(
        hf, topology=Topology(**topology), dtype=dtype, make_vocab_size_divisible_by=divisible_by, overrides=overrides,
        is_transformer_engine=is_transformer_engine,
    )  # fmt: skip


def test_the_decoder_is_told_what_config_json_says():
    read = config(tp_size=2)
    told = read.transformer
    assert (told.num_layers, told.hidden_size, told.ffn_hidden_size) == (4, 96, 160)
    assert (told.num_attention_heads, told.num_query_groups, told.kv_channels) == (4, 2, 32)
    assert (told.normalization, told.layernorm_epsilon, told.add_bias_linear) == ("RMSNorm", 1e-6, False)
    assert (told.activation_func, told.gated_linear_unit) == (F.silu, True)
    assert (told.attention_dropout, told.hidden_dropout) == (0.0, 0.0)
    assert (read.max_sequence_length, read.tied_embeddings, read.rope.theta) == (512, True, 1e6)


@pytest.mark.parametrize(("hf", "bias", "norm"), [(LLAMA, False, False), (QWEN2, True, False), (QWEN3, False, True)])
def test_families_differ_in_biases_and_head_norms(hf, bias, norm):
    told = config(hf).transformer
    assert (told.add_qkv_bias, told.qk_layernorm) == (bias, norm)


@pytest.mark.parametrize(("hf", "expected"), [(QWEN2, 24), (LLAMA | {"head_dim": None}, 24), (without(QWEN3, "head_dim"), 128)])
def test_a_missing_head_dim_is_that_of_the_family(hf, expected):
    assert config(hf).transformer.kv_channels == expected


@pytest.mark.parametrize("hf", [without(LLAMA, "num_key_value_heads"), QWEN3 | {"num_key_value_heads": None}])
def test_no_key_value_heads_mean_one_for_each_head(hf):
    assert config(hf).transformer.num_query_groups == 4


@pytest.mark.parametrize("hf", [LLAMA, QWEN2, QWEN3])
def test_a_missing_epsilon_is_that_of_transformers(hf):
    assert config(without(hf, "rms_norm_eps")).transformer.layernorm_epsilon == 1e-6


def test_two_stages_need_no_count_of_the_last():
    """Megatron divides by the stages between the first and the last, on one rank only."""
    told = config(QWEN3 | {"num_hidden_layers": 6}, pp_size=2, vpp_size=2, first_stage_layers=2, last_stage_layers=4).transformer
    assert (told.num_layers_in_first_pipeline_stage, told.num_layers_in_last_pipeline_stage) == (2, None)
    assert [get_transformer_layer_offset(told, v, p) for v in (0, 1) for p in (0, 1)] == [0, 1, 3, 4]
    assert [get_num_layers_to_build(told, v, p) for v in (0, 1) for p in (0, 1)] == [1, 2, 1, 2]


@pytest.mark.parametrize(("tp_size", "divisible_by", "padded"), [(1, 1, 131), (2, 1, 132), (4, 1, 132), (2, 64, 256), (1, 128, 256)])
def test_the_vocabulary_is_padded_for_the_tensor_ranks(tp_size, divisible_by, padded):
    hf = QWEN3 | {"num_key_value_heads": 4}
    read = config(hf, tp_size=tp_size, divisible_by=divisible_by)
    assert (read.vocab_size, read.padded_vocab_size) == (131, padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_dtype_rules_parameters_and_pipeline(dtype):
    told = config(dtype=dtype, pp_size=2).transformer
    assert (told.params_dtype, told.pipeline_dtype) == (dtype, dtype)
    assert (told.bf16, told.fp16) == (dtype is torch.bfloat16, dtype is torch.float16)


def test_an_unknown_architecture_lists_the_known_ones():
    known = ", ".join(supported_architectures())
    with pytest.raises(ConfigError, match=f"unknown architecture GPT2LMHeadModel; supported are {known}$"):
        config(QWEN3 | {"architectures": ["GPT2LMHeadModel"]})
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM"} < set(supported_architectures())


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        (LLAMA | {"attention_bias": True}, "attention_bias is true; for LlamaForCausalLM it must be absent"),
        (QWEN3 | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}}, 'rope type "longrope"; supported are'),
        (
            QWEN3 | {"hidden_act": "gelu", "vocab_size": None},
            'hidden_act is "gelu".*vocab_size is null|vocab_size is null.*hidden_act is "gelu"',
        ),
    ],
)
def test_what_megatron_would_get_wrong_is_refused(hf, said):
    with pytest.raises(ConfigError, match=said):
        config(hf)


@pytest.mark.parametrize(
    ("hf", "topology", "said"),
    [
        (
            QWEN3 | {"num_attention_heads": 6, "num_key_value_heads": 3},
            {"tp_size": 4},
            "tp_size 4 does not fit .*q_proj.*: 6 attention heads cannot be divided",
        ),
        (QWEN3 | {"num_attention_heads": 12, "num_key_value_heads": 3}, {"tp_size": 4}, "3 key-value heads and a tensor axis of 4 ranks"),
        (QWEN3 | {"intermediate_size": 161}, {"tp_size": 2}, "tp_size 2 does not fit .*gate_proj.*161"),
        (QWEN3, {"dp_size": 2, "ep_size": 2}, "ep_size is 2; Qwen3ForCausalLM has no experts"),
        (QWEN3, {"pp_size": 3}, "4 layers cannot be split over pp_size 3"),
    ],
)
def test_a_topology_that_cannot_divide_the_model_is_refused(hf, topology, said):
    with pytest.raises(ConfigError, match=said):
        config(hf, **topology)


def test_fewer_key_value_heads_than_tensor_ranks_are_fine():
    assert config(QWEN3 | {"num_key_value_heads": 1}, tp_size=4).transformer.num_query_groups == 1


def test_overrides_reach_megatron():
    overrides = {"sequence_parallel": True, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    told = config(overrides=overrides, tp_size=2).transformer
    assert (told.sequence_parallel, told.recompute_granularity) == (True, "full")


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown model override 'sequence_paralel'; did you mean 'sequence_parallel'"):
        config(overrides={"sequence_paralel": True})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"num_layers": 5}, "num_layers=5 contradicts 4, which config.json decides"),
        ({"tensor_model_parallel_size": 2}, "contradicts 1, which topology.tp_size decides"),
        ({"bf16": True}, "contradicts False, which dtype decides"),
        ({"use_te_activation_func": True}, "contradicts False, which bias_activation_fusion decides"),
        ({"recompute_granularity": "full"}, "Megatron-Core refuses this combination"),
    ],
)
def test_overrides_that_contradict_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        config(overrides=overrides)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8", "hybrid"),
        ("layernorm_zero_centered_gamma", True),
        ("rotary_interleaved", True),
        ("window_size", (4, 0)),
        ("softmax_scale", 1.0),
    ],
)
def test_an_override_that_makes_another_model_of_the_weights_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name}=.* (makes something else of the weights than|contradicts .*, which) config.json"):
        config(overrides={name: value})
    left = getattr(config().transformer, name)
    assert getattr(config(overrides={name: left}).transformer, name) == left != value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_pre_softmax", True),
        ("moe_router_topk_scaling_factor", 2.0),
        ("moe_router_score_function", "sigmoid"),
        ("moe_input_jitter_eps", 0.1),
    ],
)
def test_an_override_of_how_mixtral_routes_is_refused(name, value):
    hf = {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    with pytest.raises(ConfigError, match=f"{name}={value!r} contradicts .*, which config.json decides"):
        config(hf, overrides={name: value})
    assert config(hf).transformer.moe_layer_freq == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("moe_router_load_balancing_type", "sinkhorn", "sinkhorn chooses other experts than the best ones"),
        ("moe_router_load_balancing_type", ["aux_loss", "sinkhorn"], "sinkhorn chooses other experts"),
        ("account_for_loss_in_pipeline_split", True, "contradicts False, which topology decides"),
        ("pipeline_model_parallel_layout", "Et*2|t*2L", "contradicts None, which topology decides"),
        ("multi_latent_attention", True, "makes something else of the weights"),
    ],
)
def test_an_override_of_which_experts_or_of_where_layers_are_is_refused(name, value, said):
    """Megatron takes each of them."""
    hf = {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    with pytest.raises(ConfigError, match=said):
        config(hf, overrides={name: value})


def test_an_override_that_agrees_is_accepted():
    assert config(overrides={"num_layers": 4, "normalization": "RMSNorm", "bf16": False}).transformer.num_layers == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fusions are available with CUDA")
def test_fusions_that_this_machine_lacks_are_dropped_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        told = config(overrides={"apply_rope_fusion": True, "gradient_accumulation_fusion": True, "bias_dropout_fusion": False}).transformer
    assert not told.apply_rope_fusion
    assert not told.gradient_accumulation_fusion
    assert [record.args[:2] for record in caplog.records] == [
        ("apply_rope_fusion", "TransformerEngine"),
        ("gradient_accumulation_fusion", "layers of TransformerEngine, or Apex with its CUDA extensions"),
    ]
    # TransformerEngine's layers need no Apex.
    told = config(overrides={"gradient_accumulation_fusion": True}, is_transformer_engine=True).transformer
    assert told.gradient_accumulation_fusion


@pytest.mark.parametrize("name", REFUSED_SWITCHES)
def test_switches_that_have_no_part_in_a_step_are_refused(name):
    assert not getattr(config(overrides={name: False}).transformer, name)
    with pytest.raises(ConfigError, match=f"{name} cannot be switched on: "):
        config(overrides={name: True})


@pytest.mark.parametrize(
    ("hf", "said"),
    [
        ({**tiny_config("glm4").to_dict(), "architectures": ["Glm4ForCausalLM"]}, "pairs of neighbours in packed sequences"),
        (LLAMA | {"rope_parameters": YARN}, "the attention factor of yarn"),
    ],
)
def test_fused_rotary_kernels_stay_off_where_they_compute_something_else(hf, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert not config(hf, overrides={"apply_rope_fusion": True}).transformer.apply_rope_fusion
    assert [record.args for record in caplog.records] == [("apply_rope_fusion", said)]


def test_sequence_parallel_with_one_tensor_rank_is_no_split():
    assert not config(overrides={"sequence_parallel": True}).transformer.sequence_parallel


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"is_transformer_engine": True}, "TransformerEngine's attention does not compute fp32 under context_parallel_size 2; use bf16"),
        ({"overrides": {"cp_comm_type": "a2a"}, "tp_size": 2}, "a2a deals key-value heads to .* 2 ranks, and each tensor rank has 1 of"),
        ({"overrides": {"cp_comm_type": "a2a"}, "tp_size": 4}, "each tensor rank has 1 of them; use p2p"),
        ({"overrides": {"cp_comm_type": "a2a+p2p"}}, r"cp_comm_type is 'a2a\+p2p'; use p2p, all_gather or a2a"),
    ],
)
def test_attention_that_would_fail_where_ranks_share_a_sequence_is_refused(options, said):
    """Negative controls: without such ranks, in bf16, and where each rank gets a head."""
    with pytest.raises(ConfigError, match=said):
        config(cp_size=2, **options)
    config(**options)
    if "is_transformer_engine" in options:
        config(cp_size=2, dtype=torch.bfloat16, **options)
    config(cp_size=2, overrides={"cp_comm_type": "a2a"})


def test_interleaved_pipelines_keep_to_one_shape():
    """Negative control: without virtual stages shapes may vary."""
    assert config(pp_size=2, overrides={"variable_seq_lengths": True}).transformer.variable_seq_lengths
    told = config(pp_size=2, vpp_size=2, overrides={"variable_seq_lengths": True, "batch_p2p_comm": True}).transformer
    assert (told.variable_seq_lengths, told.batch_p2p_comm) == (False, False)


def test_an_output_layer_is_built_beside_layers_of_transformer_engine_that_add_up_gradients():
    """Megatron's own layer refuses the switch without Apex; nothing of that is left behind."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    before = layers._grad_accum_fusion_available
    for fuses in (False, True):
        told = config(overrides={"gradient_accumulation_fusion": fuses}, is_transformer_engine=True).transformer
        with _accumulating_without_apex(told):
            assert layers._grad_accum_fusion_available is (before or fuses)
        assert layers._grad_accum_fusion_available is before


@pytest.mark.parametrize(
    ("hf", "options", "by_te"),
    [
        (QWEN3, {"is_transformer_engine": True}, True),
        (QWEN3, {}, False),
        ({**tiny_config("qwen3_moe").to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}, {"is_transformer_engine": True}, False),
    ],
    ids=["te", "local", "experts"],
)
def test_a_fused_swiglu_is_transformer_engines_beside_its_layers(monkeypatch, hf, options, by_te):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = config(hf, overrides={"bias_activation_fusion": True}, **options).transformer
    assert (told.use_te_activation_func, told.bias_activation_fusion) == (by_te, not by_te)
    assert not config(hf, **options).transformer.use_te_activation_func
