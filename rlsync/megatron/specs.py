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
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

from rlsync.errors import ConfigError
from rlsync.megatron.layers import CausalAttention, RMSNorm

SpecName = Literal["auto", "local", "te"]


def transformer_engine_available() -> bool:
    """Whether the TransformerEngine spec can be built here: the package is installed and there is a CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    config: TransformerConfig,
    *,
    spec: SpecName = "auto",
    vp_stage: int | None = None,
    layer_class: type[TransformerLayer] = TransformerLayer,
) -> TransformerBlockSubmodules:
    """Layers of one virtual chunk of this rank, and the class of the final norm.

    Args:
        config: must agree with Megatron's process groups, which give the pipeline stage.
        spec: "auto" takes TransformerEngine where it is available.
        vp_stage: index of the virtual chunk, or None without virtual stages.
        layer_class: of the decoder layers; their parts are the spec's.

    Raises:
        ConfigError: unknown spec, or "te" where TransformerEngine is missing.
    """
    if spec not in ("auto", "local", "te"):
        raise ConfigError(f"unknown spec {spec!r}; use auto, local or te")
    if spec == "te" and not transformer_engine_available():
        raise ConfigError("spec 'te' needs TransformerEngine and a CUDA device; install it, or use spec 'local' or 'auto'")
    if spec == "local" or not transformer_engine_available():
        layer, norm = _local_layer(config), RMSNorm
    else:
        layer, norm = _transformer_engine_layer(config)
    layer.module = layer_class
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm)


def fuses_norms(spec: Any) -> bool:
    """Whether layers of a spec have their norms inside the linear that follows, as TransformerEngine's do.

    ``spec`` is what a ``GPTModel`` keeps as ``transformer_layer_spec``: of a block with its layers, or of one layer for all.
    """
    layers = getattr(spec, "layer_specs", None) or getattr(getattr(spec, "submodules", None), "layer_specs", None) or [spec]
    return layers[0].submodules.input_layernorm is IdentityOp


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    for owner in (layer.submodules, layer.submodules.self_attention.submodules):
        for name in ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm"):
            if getattr(owner, name, IdentityOp) is not IdentityOp:
                setattr(owner, name, RMSNorm)
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return layer


def _transformer_engine_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    from megatron.core.extensions.transformer_engine import TENorm

    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
