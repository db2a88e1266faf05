"""What families with mixtures of experts share: keys of config.json, routing in Megatron's words, and the stacks of experts.

Experts count over the whole model, as in the names of checkpoints. An expert is cut by the axes of experts (EP and ETP), all else by TP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlsync.models.dense import ATTENTION, LAYERS, MLP, decoder_stacks, dense_dims, dense_transformer, layer_stack
from rlsync.models.keys import Key, flag, harmless, is_whole, size
from rlsync.models.layouts import GatedColumn, Replicated, Row
from rlsync.models.stacks import HFTensor, Index, Model, Rule, Stack

EXPERTS = Index("expert", "num_experts", "ep")
# Of transformers' own training step alone; an actor's coefficient is moe_aux_loss_coeff.
ROUTING_KEYS: Mapping[str, Key] = {
    **harmless("adds to transformers' own loss; a run's is actor.model.moe_aux_loss_coeff", "router_aux_loss_coef", "output_router_logits")
}
SPARSE_KEYS: Mapping[str, Key] = {
    **ROUTING_KEYS,
    "num_experts_per_tok": size("moe_router_topk", is_required=True),
    "moe_intermediate_size": size(is_required=True),
    "norm_topk_prob": flag(default=False),
    "decoder_sparse_step": size(default=1),
    "mlp_only_layers": Key(
        lambda value: isinstance(value, list) and all(is_whole(layer) and layer >= 0 for layer in value),
        "a list of layer numbers",
        is_nullable=True,
    ),
}


def has_experts(model: Model, layer: int) -> bool:
    """Whether a layer of a Qwen model routes to experts, by ``mlp_only_layers`` and ``decoder_sparse_step``."""
    return _is_sparse(model.values, layer)


def is_dense(model: Model, layer: int) -> bool:
    return not _is_sparse(model.values, layer)


def _is_sparse(values: Mapping[str, Any], layer: int) -> bool:
    return layer not in (values["mlp_only_layers"] or ()) and (layer + 1) % values["decoder_sparse_step"] == 0


def expert_dims(values: Mapping[str, Any], num_experts: int, expert_ffn: int) -> dict[str, int]:
    """Named sizes of a decoder with experts: those of a dense one, ``num_experts`` and ``expert_ffn``."""
    return {**dense_dims(values), "num_experts": num_experts, "expert_ffn": expert_ffn}


def too_few_experts(values: Mapping[str, Any], num_experts: int) -> list[str]:
    """What is wrong between a router's choice and the experts there are."""
    chosen = values["num_experts_per_tok"]
    return [f"num_experts_per_tok {chosen} is more than the {num_experts} experts"] if chosen > num_experts else []


def without_experts(values: Mapping[str, Any]) -> list[str]:
    """What is wrong between the keys that say which layers of a Qwen model have experts."""
    layers, named, step = values["num_hidden_layers"], values["mlp_only_layers"] or (), values["decoder_sparse_step"]
    findings = [f"mlp_only_layers names layer {layer}; the model has {layers}" for layer in named if layer >= layers]
    if not findings and not any(_is_sparse(values, layer) for layer in range(layers)):
        findings.append(
            f"no layer has experts, by mlp_only_layers {list(named)} and decoder_sparse_step {step}; take the dense architecture"
        )
    return findings


def expert_transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig: those of a dense decoder, and softmax routing over the experts of Qwen's layers.

    Megatron's softmax over the chosen experts equals transformers' softmax over all, cut and divided by its sum; with pre-softmax it is
    not divided (``megatron/core/transformer/moe/moe_utils.py``).
    """
    return dense_transformer(values, dims) | {
        "num_moe_experts": dims["num_experts"],
        "moe_ffn_hidden_size": dims["expert_ffn"],
        "moe_layer_freq": [int(_is_sparse(values, layer)) for layer in range(dims["num_layers"])],
        "moe_router_pre_softmax": not values["norm_topk_prob"],
    }


def expert_rules(megatron: str, hf: str, ffn: str, projections: tuple[str, str, str], te: str = "") -> tuple[Rule, ...]:
    """A gated MLP under another name: gate and up as one, then down.

    Args:
        megatron: what Megatron's names begin with under the local spec; ``te`` under TransformerEngine's, with the number at the end.
        projections: names of gate, up and down after ``hf``.
    """
    gate, up, down = (f"{hf}{name}.weight" for name in projections)
    number = "{expert}" if te else ""
    return (
        Rule(
            f"{megatron}linear_fc1.weight",
            (HFTensor(gate, ffn, "hidden"), HFTensor(up, ffn, "hidden")),
            GatedColumn(),
            te=f"{te or megatron}linear_fc1.weight{number}",
        ),
        Rule(f"{megatron}linear_fc2.weight", (HFTensor(down, "hidden", ffn),), Row(), te=f"{te or megatron}linear_fc2.weight{number}"),
    )


def expert_stacks(
    *shared: Rule,
    block: str = "mlp.",
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    sparse: Callable[[Model, int], bool] = has_experts,
    dense: Callable[[Model, int], bool] | None = is_dense,
    hf: str = "model.",
) -> tuple[Stack, ...]:
    """A decoder in which some layers route to experts.

    Args:
        shared: rules of the layers with experts beside norm, router and experts.
        block: what HF names of the router and the experts begin with in a layer.
        projections: names of gate, up and down of an expert.
        sparse: which layers have experts; ``dense``: which have an MLP, or None where none has.
        hf: as in :func:`decoder_stacks`.
    """
    router = (
        Rule("pre_mlp_layernorm.weight", (HFTensor("post_attention_layernorm.weight", "hidden"),), Replicated()),
        Rule("mlp.router.weight", (HFTensor(f"{block}gate.weight", "num_experts", "hidden"),), Replicated()),
    )
    experts = expert_rules(
        "mlp.experts.local_experts.{expert}.", f"{block}experts.{{expert}}.", "expert_ffn", projections, te="mlp.experts."
    )
    return decoder_stacks(
        layer_stack(ATTENTION, hf),
        *(() if dense is None else (layer_stack(MLP, hf, has_layer=dense),)),
        layer_stack((*router, *shared), hf, has_layer=sparse),
        Stack(
            experts,
            megatron="decoder.layers.{layer}.",
            hf=f"{hf}layers.{{layer}}.",
            indices=(LAYERS, EXPERTS),
            tensor_axis="etp",
            has_layer=sparse,
        ),
        hf=hf,
    )
