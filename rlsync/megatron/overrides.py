"""A user's switches for Megatron's TransformerConfig: which exist, which are decided elsewhere, which this machine has.

Must not know Hugging Face, parameters or process groups.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology

_LOG = logging.getLogger(__name__)

# Fields that the Topology, the dtype or the hardware decide; an override could only contradict them.
_DECIDED_ELSEWHERE = {
    "tensor_model_parallel_size": "topology.tp_size",
    "pipeline_model_parallel_size": "topology.pp_size",
    "virtual_pipeline_model_parallel_size": "topology.vpp_size",
    "context_parallel_size": "topology.cp_size",
    "expert_model_parallel_size": "topology.ep_size",
    "expert_tensor_parallel_size": "topology.etp_size",
    "num_layers_in_first_pipeline_stage": "topology.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "topology.last_stage_layers",
    "pipeline_model_parallel_layout": "topology",
    "account_for_embedding_in_pipeline_split": "topology",
    "account_for_loss_in_pipeline_split": "topology",
    "params_dtype": "dtype",
    "pipeline_dtype": "dtype",
    "autocast_dtype": "dtype",
    "bf16": "dtype",
    "fp16": "dtype",
    "use_te_activation_func": "bias_activation_fusion",
}

# Fields that make something else of the weights than config.json describes, or of less precision, where no family states them.
_OTHER_RESULTS = frozenset(
    (
        "activation_func_clamp_value",
        "add_bias_linear",
        "add_qkv_bias",
        "apply_residual_connection_post_layernorm",
        "attention_output_gate",
        "experimental_attention_variant",
        "fp4",
        "fp8",
        "gated_linear_unit",
        "glu_linear_offset",
        "heterogeneous_block_specs",
        "is_hybrid_model",
        "layernorm_zero_centered_gamma",
        "linear_attention_freq",
        "moe_apply_probs_on_input",
        "moe_expert_capacity_factor",
        "moe_latent_size",
        "moe_router_force_load_balancing",
        "moe_router_topk_limited_devices",
        "moe_token_dropping",
        "mrope_section",
        "mtp_num_layers",
        "multi_latent_attention",
        "no_rope_freq",
        "num_moe_experts",
        "qk_clip",
        "qk_l2_norm",
        "qk_layernorm",
        "quant_recipe",
        "rotary_interleaved",
        "softmax_scale",
        "softmax_type",
        "test_mode",
        "use_kitchen",
        "window_attn_skip_freq",
        "window_size",
    )
)


@dataclass(frozen=True, slots=True)
class _Fusion:
    """A speed switch of TransformerConfig, what it needs, and whether that is here, given whether layers are TransformerEngine's."""

    needs: str
    available: Callable[[bool], bool] = field(repr=False)


# With virtual stages on two ranks, previous and next rank are the same one, and messages of both directions are matched by
# their order alone: p2p_communication.py of 0.16 orders them rightly only without these switches. Steps pad their
# microbatches to one shape instead, which changes no result.
_MIXED_UP_WHEN_INTERLEAVED = ("variable_seq_lengths", "batch_p2p_comm")


def has_apex_accumulation() -> bool:
    """Whether layers that are not TransformerEngine's can add gradients of weights in the matrix product."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _has(module: str) -> Callable[[bool], bool]:
    return lambda _: torch.cuda.is_available() and importlib.util.find_spec(module) is not None


def _on_gpu(_: bool) -> bool:
    return torch.cuda.is_available()


_FUSIONS: Mapping[str, _Fusion] = {
    "apply_rope_fusion": _Fusion("TransformerEngine", _has("transformer_engine")),
    "bias_activation_fusion": _Fusion("CUDA", _on_gpu),
    "bias_dropout_fusion": _Fusion("CUDA", _on_gpu),
    "gradient_accumulation_fusion": _Fusion(
        "layers of TransformerEngine, or Apex with its CUDA extensions", lambda is_te: is_te or has_apex_accumulation()
    ),
    "masked_softmax_fusion": _Fusion("Apex with its CUDA extensions", _has("scaled_upper_triang_masked_softmax_cuda")),
    "memory_efficient_layer_norm": _Fusion("Apex with its CUDA extensions", _has("fused_layer_norm_cuda")),
    "moe_permute_fusion": _Fusion("TransformerEngine", _has("transformer_engine")),
    "persist_layer_norm": _Fusion("Apex with its CUDA extensions", _has("fast_layer_norm")),
}


SPEED_SWITCHES = (*_FUSIONS, "use_te_activation_func", "sequence_parallel", "moe_shared_expert_overlap")


def checked_overrides(
    overrides: Mapping[str, Any],
    *,
    decided: Mapping[str, Any],
    structure: Mapping[str, Any],
    topology: Topology,
    unfused_rope: str = "",
    is_transformer_engine: bool = False,
) -> dict[str, Any]:
    """The overrides that count.

    Args:
        overrides: TransformerConfig fields by name.
        decided: fields set so far, by name.
        structure: those of ``decided`` that config.json gives.
        topology: parallel layout of the model.
        unfused_rope: what of the rotary embedding fused kernels get wrong, or "".
        is_transformer_engine: layers are TransformerEngine's.

    Raises:
        ConfigError: an unknown field, one that contradicts config.json, topology or dtype, or one that makes another model of the weights.
    """
    known = {field_.name: field_.default for field_ in fields(TransformerConfig)}
    checked: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown model override {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        owner = _DECIDED_ELSEWHERE.get(name, "config.json" if name in structure else None)
        standing = decided.get(name, known[name])
        if owner is not None and value != standing:
            raise ConfigError(f"model override {name}={value!r} contradicts {standing!r}, which {owner} decides; change it there")
        if owner is None and name in _OTHER_RESULTS and value != known[name]:
            raise ConfigError(
                f"model override {name}={value!r} makes something else of the weights than config.json describes, which has "
                f"{known[name]!r}; leave it out"
            )
        fusion = _FUSIONS.get(name)
        if name == "apply_rope_fusion" and value and unfused_rope:
            _LOG.warning("%s has no kernel for %s: it stays off (slower, same results)", name, unfused_rope)
        elif fusion is not None and value and not fusion.available(is_transformer_engine):
            _LOG.warning("%s needs %s, which this machine lacks: it stays off (slower, same results)", name, fusion.needs)
        elif name == "sequence_parallel" and topology.tp_size == 1:
            pass  # with one tensor rank the split of the sequence is the identity, and Megatron refuses the switch
        elif name in _MIXED_UP_WHEN_INTERLEAVED and topology.vpp_size > 1:
            pass
        else:
            checked[name] = value
    return checked
