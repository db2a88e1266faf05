"""What differs between the releases of Megatron-Core that are supported, 0.16 to 0.19, and nowhere else in this package.

A name that a release lacks is asked for here, by the name itself and not by a version number, so that a release between two known ones
is what it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import TransformerConfig, multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from rlsync.models import ExpertModule

_EXPERT_MODULES: tuple[ExpertModule, ...] = ("SequentialMLP", "TEGroupedMLP", "GroupedMLP")


def expert_modules() -> Mapping[ExpertModule, type]:
    """Modules that hold the experts of a layer, by name. Releases from 0.17 on have no GroupedMLP, which joins experts in two weights."""
    found: dict[ExpertModule, Any] = {name: getattr(experts, name, None) for name in _EXPERT_MODULES}
    return {name: module for name, module in found.items() if module is not None}


def joins_experts(config: TransformerConfig, *, is_te: bool) -> bool:
    """Whether experts of layers of this config are a GroupedMLP's, where no layer is at hand that could tell.

    ``is_te``: layers are TransformerEngine's.
    """
    if not config.moe_grouped_gemm or "GroupedMLP" not in expert_modules():
        return False
    return bool(config.moe_use_legacy_grouped_gemm) or not is_te


class LatentAttention(MLASelfAttention):
    """Latent attention of the layers that its spec names.

    From 0.19 on Megatron's own puts a norm before queries that are not compressed, which no known model has, where compressed keys and
    values have one.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) or IdentityOp for name in names}


def whole_linear() -> type[Linear]:
    """Megatron's linear layer that is whole on every tensor rank, as a projection of latent attention.

    From 0.17 on latent attention knows it where TransformerEngine is installed only; it is told here.
    """
    if multi_latent_attention.Linear is None:
        multi_latent_attention.Linear = Linear
    return Linear


def mlp_submodules(layer: TransformerLayerSubmodules) -> MLPSubmodules:
    """Parts of the dense MLP of a layer's spec: a ModuleSpec, or from 0.17 on a partial of the class that builds it."""
    mlp: Any = layer.mlp
    found = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    assert isinstance(found, MLPSubmodules), "of a layer with experts"
    return found


def waits_for_packed_bounds() -> bool:
    """Whether Megatron's own rotary embedding of packed sequences copies their bounds to the host in each call.

    Releases whose embedding asks for ``max_seqlen`` compute on the device alone.
    """
    rotate = rope_utils._apply_rotary_pos_emb_thd
    return inspect.isfunction(rotate) and "max_seqlen" not in inspect.signature(rotate).parameters
