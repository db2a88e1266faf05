"""Which classes a decoder layer is built of: TransformerEngine's where it is installed, local ones elsewhere.

Must not know Hugging Face or files. Parameter names differ between the two; the families' tables cover both.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from rlsync.errors import ConfigError
from rlsync.megatron.layers import CausalAttention, NormedOutputLayer, RMSNorm, SwiGLU, residual_add
from rlsync.megatron.versions import LatentAttention, mlp_submodules, whole_linear
from rlsync.models.moe import sparse_layers

SpecName = Literal["auto", "local", "te"]


def transformer_engine_available() -> bool:
    """Whether the TransformerEngine spec can be built here: the package is installed and there is a CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def builds_transformer_engine(spec: SpecName) -> bool:
    """Whether layers of a spec are TransformerEngine's here.

    Raises:
        ConfigError: unknown spec, or "te" where TransformerEngine is missing.
    """
    if spec not in ("auto", "local", "te"):
        raise ConfigError(f"unknown spec {spec!r}; use auto, local or te")
    if spec == "te" and not transformer_engine_available():
        raise ConfigError("spec 'te' needs TransformerEngine and a CUDA device; install it, or use spec 'local' or 'auto'")
    return spec != "local" and transformer_engine_available()


def block_spec(
    config: TransformerConfig,
    *,
    spec: SpecName = "auto",
    vp_stage: int | None = None,
    layer_class: type[TransformerLayer] | None = None,
    normed_outputs: bool = False,
) -> TransformerBlockSubmodules:
    """Layers of one virtual chunk of this rank, and the class of the final norm.

    Args:
        config: must agree with Megatron's process groups, which give the pipeline stage.
        spec: "auto" takes TransformerEngine where it is available.
        vp_stage: index of the virtual chunk, or None without virtual stages.
        layer_class: of the decoder layers; their parts are the spec's. None for Megatron's own.
        normed_outputs: attention and MLP have a norm after them, before the residual is added; with Megatron's own layers only.

    Raises:
        ConfigError: see ``builds_transformer_engine``.
    """
    is_local = not builds_transformer_engine(spec)
    first = get_transformer_layer_offset(config, vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    layer_of = _local_layer if is_local else _transformer_engine_layer
    sparse = () if config.num_moe_experts is None else sparse_layers(config.num_layers, config.moe_layer_freq)
    kinds = {routes: layer_of(config, routes) for routes in {layer in sparse for layer in layers}}
    norm = RMSNorm if is_local else _transformer_engine_norm()
    assert not (normed_outputs and layer_class), "no known model has both"
    for layer in kinds.values():
        layer.module = layer_class or TransformerLayer
        if not config.hidden_dropout and not config.add_bias_linear:
            layer.submodules.self_attn_bda = layer.submodules.mlp_bda = residual_add
        if config.multi_latent_attention:
            layer.submodules.self_attention.module = LatentAttention
        if normed_outputs:
            layer.module, layer.params = NormedOutputLayer, {**(layer.params or {}), "output_norm": norm}
    return TransformerBlockSubmodules(layer_specs=[kinds[layer in sparse] for layer in layers], layer_norm=norm)


def fuses_norms(spec: Any) -> bool:
    """Whether layers of a spec have their norms inside the linear that follows, as TransformerEngine's do.

    ``spec`` is what a ``GPTModel`` keeps as ``transformer_layer_spec``: of a block with its layers, or of one layer for all.
    """
    layers = getattr(spec, "layer_specs", None) or getattr(getattr(spec, "submodules", None), "layer_specs", None) or [spec]
    layer = layers[0].submodules
    # A layer of latent attention has its own norm of the input in both specs.
    attention = layer.self_attention.submodules
    return (attention.kv_layernorm if isinstance(attention, MLASelfAttentionSubmodules) else layer.input_layernorm) is IdentityOp


def _local_layer(config: TransformerConfig, routes: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if routes else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    attention = layer.submodules.self_attention.submodules
    if isinstance(attention, MLASelfAttentionSubmodules):
        # Whole on every tensor rank, as in TransformerEngine's spec. Megatron's local one cuts them, and loses the gradients that the
        # shared rotary key gets from the heads of other ranks.
        attention.linear_q_down_proj = attention.linear_kv_down_proj = whole_linear()
        if config.q_lora_rank is None:
            attention.q_layernorm = IdentityOp
    for owner in (layer.submodules, attention):
        for name in ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(owner, name, IdentityOp) is not IdentityOp:
                setattr(owner, name, RMSNorm)
    attention.core_attention = CausalAttention
    return layer


def _transformer_engine_layer(config: TransformerConfig, routes: bool) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if routes else None,
        moe_grouped_gemm=routes,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )
    if config.use_te_activation_func:
        mlp_submodules(layer.submodules).activation_func = SwiGLU
    return layer


def _transformer_engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
