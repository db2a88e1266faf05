"""What families with mixtures of experts share: keys of config.json, routing in Megatron's words, and the stacks of experts.

Experts count over the whole model, as in the names of checkpoints. An expert is cut by the axes of experts (EP and ETP), all else by TP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsync.models.dense import ATTENTION, LAYERS, MLP, decoder_stacks, dense_dims, dense_transformer, layer_stack
from rlsync.models.keys import HFConfig, Key, flag, harmless, is_whole, number, only, size, unsupported
from rlsync.models.layouts import GatedColumn, Replicated, Row
from rlsync.models.stacks import HFTensor, Index, Model, Rule, Stack, Stacked

EXPERTS = Index("expert", "num_experts", "ep")
# In place of an expert's number in a token's routes: not known, so that the router chooses.
NO_ROUTE = -1
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
# Of routers that score by a sigmoid and choose with a bias, as DeepSeek-V3's. Defaults that differ are in the families' tables, and a
# family may lack the keys of groups (n_group, topk_group) and of first layers without experts: it then has neither.
SIGMOID_KEYS: Mapping[str, Key] = {
    **ROUTING_KEYS,
    "num_experts_per_tok": size("moe_router_topk", default=8),
    "moe_intermediate_size": size(is_required=True),
    "n_routed_experts": size(is_required=True),
    "num_local_experts": unsupported("it is another name of n_routed_experts; keep that one"),
    "n_shared_experts": size(default=1),
    "routed_scaling_factor": number("moe_router_topk_scaling_factor", default=1.0),
    "n_group": size(default=1),
    "topk_group": size(default=1),
    "norm_topk_prob": only(True, default=True, why="Megatron divides the weights of the chosen experts by their sum in any case"),
    "first_k_dense_replace": Key(lambda value: is_whole(value) and value >= 0, "a number of layers", default=1),
    # Layers that predict further tokens (MTP): transformers' name, and that of released files.
    "num_mtp_layers": Key(lambda value: is_whole(value) and value >= 0, "a number of layers", default=1, is_nullable=True),
    "num_nextn_predict_layers": Key(lambda value: is_whole(value) and value >= 0, "a number of layers", is_nullable=True),
}


# Fields of Megatron-Core's TransformerConfig that have its defaults in every family. They are written out: what a family does not state, a
# user's override could change, and the actor would train another model than engines serve.
_WHOLE_ROUTING: Mapping[str, Any] = {"moe_input_jitter_eps": None, "moe_expert_capacity_factor": None}
# Routing by a softmax over the chosen experts' logits, and no shared expert.
SOFTMAX_ROUTING: Mapping[str, Any] = {
    **_WHOLE_ROUTING,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
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


def impossible_choice(values: Mapping[str, Any], num_experts: int) -> list[str]:
    """What is wrong between a router's choice, the weights of what it chose, and the experts there are."""
    chosen = values["num_experts_per_tok"]
    findings = [f"num_experts_per_tok {chosen} is more than the {num_experts} experts"] if chosen > num_experts else []
    # Families without the key divide. Megatron-Core divides the weights of several only, and refuses one behind a softmax.
    if chosen == 1 and values.get("norm_topk_prob", True):
        findings.append(
            "num_experts_per_tok is 1, and weights are divided by their sum: that of the one expert is always 1, and its router would "
            "learn nothing; give tokens several experts, or, where the family has the key, norm_topk_prob false"
        )
    return findings


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
    return {
        **dense_transformer(values, dims),
        **SOFTMAX_ROUTING,
        "num_moe_experts": dims["num_experts"],
        "moe_ffn_hidden_size": dims["expert_ffn"],
        "moe_layer_freq": [int(_is_sparse(values, layer)) for layer in range(dims["num_layers"])],
        "moe_router_pre_softmax": not values["norm_topk_prob"],
    }


def sparse_layers(num_layers: int, moe_layer_freq: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers, from 0, of the layers with experts, by Megatron-Core's ``moe_layer_freq``: every so many, or 1 for each that has them."""
    pattern = [layer % moe_layer_freq == 0 for layer in range(num_layers)] if isinstance(moe_layer_freq, int) else moe_layer_freq
    return tuple(layer for layer, routes in enumerate(pattern) if routes)


def follows_dense_layers(model: Model, layer: int) -> bool:
    """Whether a layer routes to experts, by ``first_k_dense_replace``: the first ones do not."""
    return layer >= int(model.values.get("first_k_dense_replace", 0))


def is_before_experts(model: Model, layer: int) -> bool:
    return not follows_dense_layers(model, layer)


def sigmoid_dims(values: Mapping[str, Any]) -> dict[str, int]:
    """Named sizes of the experts of a model with ``SIGMOID_KEYS``, beside those of its decoder. Shared experts are one MLP."""
    expert_ffn = values["moe_intermediate_size"]
    return {
        "num_experts": values["n_routed_experts"],
        "expert_ffn": expert_ffn,
        "shared_ffn": values["n_shared_experts"] * expert_ffn,
    }


def further_layers(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What HF names begin with of the layers of a model with ``SIGMOID_KEYS`` that predict further tokens: they follow the others."""
    found = (values["num_nextn_predict_layers"], values["num_mtp_layers"])
    count, first = next((number for number in found if number is not None), 0), values["num_hidden_layers"]
    return tuple(f"model.layers.{layer}." for layer in range(first, first + count))


def further_layers_note(config: HFConfig, num_kept: int, folder: Path | None) -> str | None:
    """What becomes of layers that predict further tokens (MTP), which no rank and no engine has; None for a model without them.

    Args:
        num_kept: how many tensors of theirs ``folder`` has, which saved folders have as they are there.
    """
    said = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if config.get(name)]
    if num_kept:
        held = f"saved folders have their {num_kept} tensors as {folder} has"
    elif said:
        held = f"saved folders have no tensors of them, although {said[0]} is {config[said[0]]} in config.json; set it to 0"
    else:
        return None
    return f"layers that predict further tokens (MTP) are neither trained nor sent to engines: {held}"


def sigmoid_contradictions(values: Mapping[str, Any], config: HFConfig) -> list[str]:
    """What is wrong between keys of ``SIGMOID_KEYS``, or makes Megatron choose other experts than transformers."""
    experts, chosen, layers = (values[name] for name in ("n_routed_experts", "num_experts_per_tok", "num_hidden_layers"))
    groups, taken, first = values.get("n_group", 1), values.get("topk_group", 1), values.get("first_k_dense_replace", 0)
    findings = impossible_choice(values, experts)
    further = [config.get(name) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    if None not in further and further[0] != further[1]:
        findings.append(f"num_nextn_predict_layers is {further[0]} and num_mtp_layers {further[1]}, which mean the same; keep one of them")
    if first >= layers:
        findings.append(f"no layer has experts, by first_k_dense_replace {first} of {layers} layers; take the dense architecture")
    if taken > groups:
        findings.append(f"topk_group {taken} is more than the n_group {groups} groups")
    elif experts % groups or experts // groups < 2:
        findings.append(f"n_routed_experts {experts} do not make n_group {groups} equal groups of at least 2")
    elif taken < groups and chosen > taken * (experts // groups):
        findings.append(f"num_experts_per_tok {chosen} is more than the {taken * (experts // groups)} experts of topk_group {taken} groups")
    elif taken < groups and chosen // taken != 2:
        findings.append(
            f"topk_group is {taken} of n_group {groups}: transformers ranks a group by its 2 best experts, Megatron by its "
            f"{chosen // taken} best (num_experts_per_tok {chosen} / topk_group); they must be 2"
        )
    return findings


def sigmoid_transformer(values: Mapping[str, Any], dims: Mapping[str, int]) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig: sigmoid scores in fp32, chosen with a bias, within groups where not all are taken."""
    groups, taken, first = values.get("n_group", 1), values.get("topk_group", 1), values.get("first_k_dense_replace", 0)
    return {
        **_WHOLE_ROUTING,
        "num_moe_experts": dims["num_experts"],
        "moe_ffn_hidden_size": dims["expert_ffn"],
        "moe_shared_expert_intermediate_size": dims["shared_ffn"],
        "moe_shared_expert_gate": False,
        "moe_layer_freq": [int(layer >= first) for layer in range(dims["num_layers"])],
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_num_groups": groups if taken < groups else None,
        "moe_router_group_topk": taken if taken < groups else None,
    }


def expert_rules(megatron: str, hf: str, ffn: str, projections: tuple[str, str, str], grouped: str = "") -> tuple[Rule, ...]:
    """A gated MLP under another name: gate and up as one, then down.

    Args:
        megatron: what Megatron's names begin with in an MLP of its own.
        projections: names of gate, up and down after ``hf``.
        grouped: what they begin with in TEGroupedMLP, whose names have the expert's number at the end, and in GroupedMLP, where no name
            has it; "" where there are no such modules.
    """
    gate, up, down = (f"{hf}{name}.weight" for name in projections)
    fc1, fc2 = "linear_fc1.weight", "linear_fc2.weight"
    inputs, outputs = (HFTensor(gate, ffn, "hidden"), HFTensor(up, ffn, "hidden")), (HFTensor(down, "hidden", ffn),)
    if not grouped:
        return Rule(f"{megatron}{fc1}", inputs, GatedColumn()), Rule(f"{megatron}{fc2}", outputs, Row())
    return (
        Rule(f"{megatron}{fc1}", inputs, GatedColumn(), te=f"{grouped}{fc1}{{expert}}", joined=f"{grouped}weight1"),
        Rule(f"{megatron}{fc2}", outputs, Row(), te=f"{grouped}{fc2}{{expert}}", joined=f"{grouped}weight2"),
    )


def expert_stacks(
    *shared: Rule,
    block: str = "mlp.",
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    sparse: Callable[[Model, int], bool] = has_experts,
    dense: Callable[[Model, int], bool] | None = is_dense,
    attention: tuple[Rule, ...] = ATTENTION,
    stacked: Mapping[str, Any] | None = None,
    hf: str = "model.",
) -> tuple[Stack, ...]:
    """A decoder in which some layers route to experts.

    Args:
        shared: rules of the layers with experts beside norm, router and experts.
        block: what HF names of the router and the experts begin with in a layer.
        projections: names of gate, up and down of an expert.
        sparse: which layers have experts; ``dense``: which have an MLP, or None where none has.
        attention: rules of every layer's attention and the norm before it.
        stacked: fields of :class:`Stacked` beside the names that transformers 5 has.
        hf: as in :func:`decoder_stacks`.
    """
    router = (
        Rule("pre_mlp_layernorm.weight", (HFTensor("post_attention_layernorm.weight", "hidden"),), Replicated()),
        Rule("mlp.router.weight", (HFTensor(f"{block}gate.weight", "num_experts", "hidden"),), Replicated()),
    )
    experts = expert_rules(
        "mlp.experts.local_experts.{expert}.", f"{block}experts.{{expert}}.", "expert_ffn", projections, grouped="mlp.experts."
    )
    return decoder_stacks(
        layer_stack(attention, hf),
        *(() if dense is None else (layer_stack(MLP, hf, has_layer=dense),)),
        layer_stack((*router, *shared), hf, has_layer=sparse),
        Stack(
            experts,
            megatron="decoder.layers.{layer}.",
            hf=f"{hf}layers.{{layer}}.",
            indices=(LAYERS, EXPERTS),
            tensor_axis="etp",
            has_layer=sparse,
            stacked=Stacked(tuple(f"{hf}layers.{{layer}}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")), **(stacked or {})),
        ),
        hf=hf,
    )


def sigmoid_stacks(attention: tuple[Rule, ...] = ATTENTION, hf: str = "model.") -> tuple[Stack, ...]:
    """A decoder of dense layers, then layers with shared experts, a router that has a bias in float32, and experts."""
    shared = expert_rules("mlp.shared_experts.", "mlp.shared_experts.", "shared_ffn", ("gate_proj", "up_proj", "down_proj"))
    bias = Rule("mlp.router.expert_bias", (HFTensor("mlp.gate.e_score_correction_bias", "num_experts"),), Replicated())
    first, *layers, last = expert_stacks(*shared, sparse=follows_dense_layers, dense=is_before_experts, attention=attention, hf=hf)
    return first, *layers, layer_stack((bias,), hf, has_layer=follows_dense_layers, dtype="float32"), last
