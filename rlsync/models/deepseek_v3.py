"""DeepSeek-V3 and Moonlight: latent attention (MLA) with or without compressed queries, and sigmoid-routed experts after dense layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.dense import DENSE_KEYS, dense_contradictions, dense_dims, dense_features, dense_transformer
from rlsync.models.keys import HFConfig, Key, harmless, only, size, unsupported
from rlsync.models.layouts import HeadColumn, Replicated, Row
from rlsync.models.moe import SIGMOID_KEYS, further_layers, sigmoid_contradictions, sigmoid_dims, sigmoid_stacks, sigmoid_transformer
from rlsync.models.rope import RopeKind
from rlsync.models.stacks import Family, HFTensor, Rule

# Of the norms of compressed queries, keys and values; transformers' class takes no other.
LATENT_EPSILON = 1e-6
# Released folders carry the code from which transformers made its class.
_KNOWN_CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}


def _stated(wanted: str, otherwise: str) -> Key:
    """A key of which transformers computes one value, and which engines have to be told."""
    why = f"transformers computes nothing else, and without the key, which it leaves out when it saves, engines {otherwise}"
    return Key(lambda value: value == wanted, f'"{wanted}"', why, is_required=True, is_honoured=False)


_KEYS: Mapping[str, Key] = {
    **DENSE_KEYS,
    **SIGMOID_KEYS,
    "num_key_value_heads": size(default=128, is_nullable=True),
    "max_position_embeddings": size(default=4096),
    "moe_intermediate_size": size(default=2048),
    "n_routed_experts": size(default=256),
    "routed_scaling_factor": Key(
        SIGMOID_KEYS["routed_scaling_factor"].accepts, "a number above 0", default=2.5, field="moe_router_topk_scaling_factor"
    ),
    "n_group": size(default=8),
    "topk_group": size(default=4),
    "first_k_dense_replace": Key(SIGMOID_KEYS["first_k_dense_replace"].accepts, "a number of layers", default=3),
    "q_lora_rank": size(default=1536, is_nullable=True),
    "kv_lora_rank": size("kv_lora_rank", default=512),
    "qk_nope_head_dim": size("qk_head_dim", default=128),
    "qk_rope_head_dim": size("qk_pos_emb_head_dim", default=64),
    "v_head_dim": size("v_head_dim", default=128),
    "qk_head_dim": size(is_nullable=True),
    "rope_interleave": only(True, default=True, why="Megatron turns neighbouring dimensions; released models have them so"),
    "attention_bias": unsupported("Megatron's latent attention has no bias; released models have none"),
    "scoring_func": _stated("sigmoid", "score by softmax"),
    "topk_method": _stated("noaux_tc", "leave out the routers' bias"),
    "moe_layer_freq": only(1, default=1, why="every layer after the dense ones has experts in transformers' class"),
    "auto_map": Key(
        lambda value: (
            isinstance(value, dict)
            and all(name == "AutoTokenizer" or (isinstance(code, str) and _KNOWN_CODE.get(name) == code) for name, code in value.items())
        ),
        f"absent, or name a tokenizer and {', '.join(_KNOWN_CODE.values())}",
        "the model is computed by code in its folder, which is not known here; remove it where the folder holds a plain model",
        is_nullable=True,
        is_honoured=False,
    ),
    **harmless("of training in other programs; a run's own keys decide here", "aux_loss_alpha", "seq_aux", "ep_size"),
}

_ATTENTION = (
    Rule("input_layernorm.weight", (HFTensor("input_layernorm.weight", "hidden"),), Replicated()),
    Rule("self_attention.linear_q_proj.weight", (HFTensor("self_attn.q_proj.weight", "q", "hidden"),), HeadColumn(), when="whole_q"),
    Rule(
        "self_attention.linear_q_down_proj.weight",
        (HFTensor("self_attn.q_a_proj.weight", "q_rank", "hidden"),),
        Replicated(),
        when="q_lora",
    ),
    Rule(
        "self_attention.q_layernorm.weight",
        (HFTensor("self_attn.q_a_layernorm.weight", "q_rank"),),
        Replicated(),
        te="self_attention.linear_q_up_proj.layer_norm_weight",
        when="q_lora",
    ),
    Rule("self_attention.linear_q_up_proj.weight", (HFTensor("self_attn.q_b_proj.weight", "q", "q_rank"),), HeadColumn(), when="q_lora"),
    Rule(
        "self_attention.linear_kv_down_proj.weight", (HFTensor("self_attn.kv_a_proj_with_mqa.weight", "kv_down", "hidden"),), Replicated()
    ),
    Rule(
        "self_attention.kv_layernorm.weight",
        (HFTensor("self_attn.kv_a_layernorm.weight", "kv_rank"),),
        Replicated(),
        te="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    Rule("self_attention.linear_kv_up_proj.weight", (HFTensor("self_attn.kv_b_proj.weight", "kv_up", "kv_rank"),), HeadColumn()),
    Rule("self_attention.linear_proj.weight", (HFTensor("self_attn.o_proj.weight", "hidden", "attention"),), Row()),
)


def _rotating(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the tables of other decoders read them: the heads that turn are those of the shared rotary key."""
    return {**values, "head_dim": values["qk_rope_head_dim"]}


def _dims(values: Mapping[str, Any]) -> dict[str, int]:
    heads, rank = values["num_attention_heads"], values["kv_lora_rank"]
    nope, rope, value = values["qk_nope_head_dim"], values["qk_rope_head_dim"], values["v_head_dim"]
    latent = {
        "q": heads * (nope + rope),
        "q_rank": values["q_lora_rank"] or 0,
        "kv_rank": rank,
        "kv_down": rank + rope,
        "kv_up": heads * (nope + value),
        "attention": heads * value,
    }
    return {**dense_dims(_rotating(values)), **sigmoid_dims(values), **latent}


def _contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    findings = dense_contradictions(_rotating(values), config) + sigmoid_contradictions(values, config)
    nope, rope, heads = values["qk_nope_head_dim"], values["qk_rope_head_dim"], values["num_attention_heads"]
    for name, wanted, why in (
        ("head_dim", rope, f"qk_rope_head_dim {rope}"),
        ("qk_head_dim", nope + rope, f"qk_nope_head_dim {nope} + qk_rope_head_dim {rope}"),
        ("num_key_value_heads", heads, f"num_attention_heads {heads}: latent attention has as many keys and values as queries"),
    ):
        if values[name] not in (None, wanted):
            findings.append(f"{name} is {values[name]}; it must be {why}")
    return findings


def _features(values: Mapping[str, Any]) -> frozenset[str]:
    return dense_features(values) | {"whole_q" if values["q_lora_rank"] is None else "q_lora"}


def _transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    latent = {"multi_latent_attention": True, "q_lora_rank": values["q_lora_rank"], "qk_layernorm": True}
    return dense_transformer(values, dims) | sigmoid_transformer(values, dims) | latent


DEEPSEEK_V3 = Family(
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    keys=_KEYS,
    rope=RopeKind(is_latent=True),
    dims=_dims,
    contradictions=_contradictions,
    features=_features,
    transformer=_transformer,
    stacks=sigmoid_stacks(_ATTENTION),
    kept=further_layers,
)
