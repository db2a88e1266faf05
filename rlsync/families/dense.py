"""Rows shared by the dense decoder families (Llama, Qwen2, Qwen3): GQA attention and a gated MLP."""

from __future__ import annotations

from rlsync.errors import ConfigError
from rlsync.families.layouts import GatedColumn, GroupedQKV, Replicated, Row, VocabPadded
from rlsync.families.rules import HFConfig, HFTensor, Rule, required

LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"


def dense_dims(config: HFConfig) -> dict[str, int]:
    """Named sizes of a dense decoder. ``head_dim`` is taken from the config where it is given (it need not be hidden / heads)."""
    hidden, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    groups = int(config["num_key_value_heads"]) if config.get("num_key_value_heads") is not None else heads
    if heads % groups:
        raise ConfigError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    head_dim = int(config["head_dim"]) if config.get("head_dim") is not None else hidden // heads
    return {
        "hidden": hidden,
        "vocab": required(config, "vocab_size"),
        "ffn": required(config, "intermediate_size"),
        "q": heads * head_dim,
        "kv": groups * head_dim,
        "num_heads": heads,
        "num_groups": groups,
        "head_dim": head_dim,
    }


def tie_features(config: HFConfig, *, default: bool) -> frozenset[str]:
    """``{"tied"}`` or ``{"untied"}``; ``default`` is the family's value for a config that does not say."""
    return frozenset({"tied" if config.get("tie_word_embeddings", default) else "untied"})


EMBEDDINGS = (
    Rule(
        "embedding.word_embeddings.weight",
        (HFTensor("model.embed_tokens.weight", "vocab", "hidden"),),
        VocabPadded(),
        stage="first",
    ),
    Rule("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", "hidden"),), Replicated(), stage="last"),
    Rule("output_layer.weight", (HFTensor("lm_head.weight", "vocab", "hidden"),), VocabPadded(), stage="last", when="untied"),
    Rule(
        "output_layer.weight",
        (HFTensor("model.embed_tokens.weight", "vocab", "hidden"),),
        VocabPadded(),
        stage="last",
        when="tied",
        pipelined_only=True,
    ),
)

ATTENTION = (
    Rule(
        f"{LAYER}.input_layernorm.weight",
        (HFTensor(f"{HF_LAYER}.input_layernorm.weight", "hidden"),),
        Replicated(),
        te=f"{LAYER}.self_attention.linear_qkv.layer_norm_weight",
    ),
    Rule(
        f"{LAYER}.self_attention.linear_qkv.weight",
        (
            HFTensor(f"{HF_LAYER}.self_attn.q_proj.weight", "q", "hidden"),
            HFTensor(f"{HF_LAYER}.self_attn.k_proj.weight", "kv", "hidden"),
            HFTensor(f"{HF_LAYER}.self_attn.v_proj.weight", "kv", "hidden"),
        ),
        GroupedQKV(),
    ),
    Rule(
        f"{LAYER}.self_attention.linear_qkv.bias",
        (
            HFTensor(f"{HF_LAYER}.self_attn.q_proj.bias", "q"),
            HFTensor(f"{HF_LAYER}.self_attn.k_proj.bias", "kv"),
            HFTensor(f"{HF_LAYER}.self_attn.v_proj.bias", "kv"),
        ),
        GroupedQKV(),
        when="qkv_bias",
    ),
    Rule(
        f"{LAYER}.self_attention.q_layernorm.weight",
        (HFTensor(f"{HF_LAYER}.self_attn.q_norm.weight", "head_dim"),),
        Replicated(),
        when="qk_norm",
    ),
    Rule(
        f"{LAYER}.self_attention.k_layernorm.weight",
        (HFTensor(f"{HF_LAYER}.self_attn.k_norm.weight", "head_dim"),),
        Replicated(),
        when="qk_norm",
    ),
    Rule(f"{LAYER}.self_attention.linear_proj.weight", (HFTensor(f"{HF_LAYER}.self_attn.o_proj.weight", "hidden", "q"),), Row()),
)

MLP = (
    Rule(
        f"{LAYER}.pre_mlp_layernorm.weight",
        (HFTensor(f"{HF_LAYER}.post_attention_layernorm.weight", "hidden"),),
        Replicated(),
        te=f"{LAYER}.mlp.linear_fc1.layer_norm_weight",
    ),
    Rule(
        f"{LAYER}.mlp.linear_fc1.weight",
        (
            HFTensor(f"{HF_LAYER}.mlp.gate_proj.weight", "ffn", "hidden"),
            HFTensor(f"{HF_LAYER}.mlp.up_proj.weight", "ffn", "hidden"),
        ),
        GatedColumn(),
    ),
    Rule(f"{LAYER}.mlp.linear_fc2.weight", (HFTensor(f"{HF_LAYER}.mlp.down_proj.weight", "hidden", "ffn"),), Row()),
)

DENSE_RULES = EMBEDDINGS + ATTENTION + MLP
