"""What the dense decoder families (Llama, Qwen2, Qwen3) share: keys of config.json, GQA attention and a gated MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlsync.models.base_keys import BASE_KEYS
from rlsync.models.keys import HFConfig, Key, flag, is_whole, number, only, shown, size, unsupported
from rlsync.models.layouts import GatedColumn, GroupedQKV, Replicated, Row, VocabPadded
from rlsync.models.stacks import HFTensor, Index, Rule, Stack

_DROPOUT = "the actor trains without it; set it to 0.0"
# Defaults that differ between the classes stand in the families' own tables.
DENSE_KEYS: Mapping[str, Key] = {
    **BASE_KEYS,
    "vocab_size": size(is_required=True),
    "hidden_size": size("hidden_size", is_required=True),
    "intermediate_size": size("ffn_hidden_size", is_required=True),
    "num_hidden_layers": size("num_layers", is_required=True, most=10_000),
    "num_attention_heads": size("num_attention_heads", is_required=True),
    "head_dim": size(is_nullable=True),
    "hidden_act": only("silu", "swish", default="silu"),
    "rms_norm_eps": number("layernorm_epsilon", default=1e-6),
    "tie_word_embeddings": flag(default=False),
    "attention_dropout": only(0, default=0.0, why=_DROPOUT),
    "layer_types": Key(
        lambda value: isinstance(value, list) and set(map(str, value)) <= {"full_attention"},
        "a list of full_attention, one for each layer",
        "no other kind of attention is supported",
        is_nullable=True,
    ),
    "sliding_window": unsupported("attention within a window is not supported"),
}


def dense_dims(values: Mapping[str, Any]) -> dict[str, int]:
    """Named sizes of a dense decoder. ``head_dim`` is taken from the config where it is given (it need not be hidden / heads)."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    groups = values["num_key_value_heads"] if values["num_key_value_heads"] is not None else heads
    head_dim = values["head_dim"] if values["head_dim"] is not None else hidden // heads
    return {
        "hidden": hidden,
        "vocab": values["vocab_size"],
        "ffn": values["intermediate_size"],
        "q": heads * head_dim,
        "kv": groups * head_dim,
        "num_heads": heads,
        "num_groups": groups,
        "head_dim": head_dim,
        "num_layers": values["num_hidden_layers"],
    }


def dense_transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig beside those that take a key as it is; "silu" is the name of its activation."""
    return {
        "num_query_groups": dims["num_groups"],
        "kv_channels": dims["head_dim"],
        "normalization": "RMSNorm",
        "activation_func": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    }


def dense_contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    """What transformers refuses, or computes in a way of its own, in keys that are right one by one."""
    dims = dense_dims(values)
    layers = dims["num_layers"]
    findings = []
    if dims["num_heads"] % dims["num_groups"]:
        findings.append(f"num_attention_heads {dims['num_heads']} is not a multiple of num_key_value_heads {dims['num_groups']}")
    if dims["head_dim"] % 2 or not dims["head_dim"]:
        findings.append(f"head_dim {dims['head_dim']} is odd; rotary embeddings turn pairs of dimensions")
    if values["layer_types"] is not None and len(values["layer_types"]) != layers:
        findings.append(f"layer_types has {len(values['layer_types'])} entries for num_hidden_layers {layers}")
    padding = config.get("pad_token_id")
    if padding is not None and not (is_whole(padding) and -dims["vocab"] <= padding < dims["vocab"]):
        findings.append(f"pad_token_id is {shown(padding)}; the vocabulary has {dims['vocab']} tokens")
    return findings


def dense_features(values: Mapping[str, Any]) -> frozenset[str]:
    """``{"tied"}`` or ``{"untied"}``."""
    return frozenset({"tied" if values["tie_word_embeddings"] else "untied"})


LAYERS = Index("layer", "num_layers", "pp")

ATTENTION = (
    Rule(
        "input_layernorm.weight",
        (HFTensor("input_layernorm.weight", "hidden"),),
        Replicated(),
        te="self_attention.linear_qkv.layer_norm_weight",
    ),
    Rule(
        "self_attention.linear_qkv.weight",
        (
            HFTensor("self_attn.q_proj.weight", "q", "hidden"),
            HFTensor("self_attn.k_proj.weight", "kv", "hidden"),
            HFTensor("self_attn.v_proj.weight", "kv", "hidden"),
        ),
        GroupedQKV(),
    ),
    Rule(
        "self_attention.linear_qkv.bias",
        (
            HFTensor("self_attn.q_proj.bias", "q"),
            HFTensor("self_attn.k_proj.bias", "kv"),
            HFTensor("self_attn.v_proj.bias", "kv"),
        ),
        GroupedQKV(),
        when="qkv_bias",
    ),
    Rule(
        "self_attention.q_layernorm.weight",
        (HFTensor("self_attn.q_norm.weight", "head_dim"),),
        Replicated(),
        when="qk_norm",
    ),
    Rule(
        "self_attention.k_layernorm.weight",
        (HFTensor("self_attn.k_norm.weight", "head_dim"),),
        Replicated(),
        when="qk_norm",
    ),
    Rule("self_attention.linear_proj.weight", (HFTensor("self_attn.o_proj.weight", "hidden", "q"),), Row()),
)

MLP = (
    Rule(
        "pre_mlp_layernorm.weight",
        (HFTensor("post_attention_layernorm.weight", "hidden"),),
        Replicated(),
        te="mlp.linear_fc1.layer_norm_weight",
    ),
    Rule(
        "mlp.linear_fc1.weight",
        (
            HFTensor("mlp.gate_proj.weight", "ffn", "hidden"),
            HFTensor("mlp.up_proj.weight", "ffn", "hidden"),
        ),
        GatedColumn(),
    ),
    Rule("mlp.linear_fc2.weight", (HFTensor("mlp.down_proj.weight", "hidden", "ffn"),), Row()),
)


def layer_stack(rules: tuple[Rule, ...], hf: str = "model.", **options: Any) -> Stack:
    """Rules of every decoder layer, or of those that ``has_layer`` of ``options`` names. ``hf`` as in :func:`decoder_stacks`."""
    return Stack(rules, megatron="decoder.layers.{layer}.", hf=f"{hf}layers.{{layer}}.", indices=(LAYERS,), **options)


def decoder_stacks(*layers: Stack, hf: str = "model.") -> tuple[Stack, ...]:
    """Embedding, the stacks of the layers, and final norm with the head. ``hf`` is what HF names of all but the head begin with."""
    embedding = HFTensor(f"{hf}embed_tokens.weight", "vocab", "hidden")
    return (
        Stack((Rule("embedding.word_embeddings.weight", (embedding,), VocabPadded()),), stage="first"),
        *layers,
        Stack(
            (
                Rule("decoder.final_layernorm.weight", (HFTensor(f"{hf}norm.weight", "hidden"),), Replicated()),
                Rule("output_layer.weight", (HFTensor("lm_head.weight", "vocab", "hidden"),), VocabPadded(), when="untied"),
                Rule("output_layer.weight", (embedding,), VocabPadded(), when="tied", pipelined_only=True),
            ),
            stage="last",
        ),
    )


def dense_stacks(hf: str = "model.") -> tuple[Stack, ...]:
    """A decoder whose layers all have a gated MLP."""
    return decoder_stacks(layer_stack(ATTENTION + MLP, hf), hf=hf)


DENSE_STACKS = dense_stacks()
