"""Layers that Megatron-Core lacks: RMSNorm and fused causal attention without TransformerEngine, norms after attention and MLP, and what
takes the host less time than Megatron's, which has to be ahead of the GPU.

Must not know configs of Hugging Face, names or pipeline stages. Interfaces follow what Megatron's module builders pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from rlsync.errors import ConfigError
from rlsync.megatron.context import Share, share_of
from rlsync.megatron.packing import PackedSequences
from rlsync.megatron.parallel import compute_device


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension; parameter ``weight``: (hidden_size,) in the model's dtype.

    Unlike Megatron's ``WrappedTorchNorm`` it may stand in a sequence-parallel region: the weight says so, and
    ``finalize_model_grads`` then sums its gradient over the TP group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=compute_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class CausalAttention(MegatronModule):
    """Causal attention by ``scaled_dot_product_attention``; memory grows linearly in the sequence, where a kernel exists.

    Full sequences only: no mask, no window. Padding belongs at the right, where causality keeps it away from the tokens before it. Packed
    sequences are attended to one by one, which needs no mask of blocks either. Under context parallelism every rank gathers the keys and
    values of all, where TransformerEngine's passes them around.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ConfigError(f"layer {layer_number}: the local spec has causal self-attention only, not {attn_mask_type} {attention_type}")
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise ConfigError(f"layer {layer_number}: window_size and softmax_type need the TransformerEngine spec")
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend. Collective over the CP group.

        Args:
            query: (S, B, heads of this rank, head_dim), S being the positions that this rank has (``Share``).
            key: (S, B, key-value heads of this rank, head_dim).
            value: as ``key``; heads may have another size.
            attention_mask: None; so is ``attention_bias``.
            packed_seq_params: a ``PackedSequences``; query, key and value are then (T, heads, head_dim).

        Returns:
            (S, B, heads * size of a value's head), or (T, heads * size of a value's head), in the dtype of ``query``.
        """
        assert attention_mask is None, "padding belongs at the right, where causality needs no mask"
        assert attention_bias is None
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedSequences), "train_step packs"
            query, key, value = query[:, None], key[:, None], value[:, None]
            bounds = packed_seq_params.bounds
        else:
            bounds = (0, query.size(0) * self.config.context_parallel_size)
        if self.config.context_parallel_size > 1:
            attended = self._attend_to_all(query, key, value, share_of(bounds))
        else:
            sequences = [slice(start, end) for start, end in pairwise(bounds)]
            attended = [self._attend(query[s], key[s], value[s]) for s in sequences]
        found = attended[0] if len(attended) == 1 else torch.cat(attended)
        return found if packed_seq_params is None else found[:, 0]

    def _attend_to_all(self, query: Tensor, key: Tensor, value: Tensor, share: Share) -> list[Tensor]:
        """Each chunk of this rank's to its sequence up to the end of the chunk."""
        key, value = (share.gather(part, 0, sums_gradients=True) for part in (key, value))
        attended, first = [], 0
        for start, pair in zip(share.bounds, share.chunks(), strict=False):
            for chunk in pair:
                size, seen = chunk.stop - chunk.start, slice(start, chunk.stop)
                attended.append(self._attend(query[first : first + size], key[seen], value[seen]))
                first += size
        return attended

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last of the positions whose keys and values are given ask."""
        repeats = query.size(2) // key.size(2)
        # A kernel for grouped heads exists for half precision on CUDA only; elsewhere asking for it means the quadratic fallback.
        if repeats > 1 and not (query.is_cuda and query.dtype is not torch.float32):
            key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        is_whole = query.size(2) == key.size(2)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if is_whole else causal_lower_right(query.size(2), key.size(2)),
            is_causal=is_whole,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class NormedOutputLayer(TransformerLayer):
    """A decoder layer in which the outputs of attention and MLP are normalised before they are added to the residual.

    Parameters beside Megatron's: ``post_self_attn_layernorm.weight`` and ``post_mlp_layernorm.weight``, (hidden_size,).
    """

    def __init__(self, config: TransformerConfig, *args: Any, output_norm: Callable[..., torch.nn.Module], **kwargs: Any) -> None:
        """``output_norm`` is the class of both norms; all else is as for Megatron's layer."""
        super().__init__(config, *args, **kwargs)
        self.post_self_attn_layernorm = output_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.post_mlp_layernorm = output_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attn_bda: Callable[..., Any] = _normalising(self.post_self_attn_layernorm, self.self_attn_bda)
        self.mlp_bda: Callable[..., Any] = _normalising(self.post_mlp_layernorm, self.mlp_bda)


def _normalising(norm: torch.nn.Module, add: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's ``bias_dropout_add`` of an output that is normalised first."""

    def choose(training: bool, fused: bool) -> Callable[..., Any]:
        def added(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            assert bias is None, "a bias would have to be added before the norm"
            return add(training, fused)((norm(output), None), residual, dropout)

        return added

    return choose


def residual_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Megatron's ``get_bias_dropout_add`` of a model without biases and without dropout: one addition.

    Megatron's own runs a dropout of nothing, or a compiled function, which takes the host ten times as long to call as to add.
    """
    return _add_residual


def _add_residual(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
    output, bias = output_with_bias
    assert bias is None and dropout == 0.0, "of another model"
    return residual.to(output.dtype) + output


class SwiGLU:
    """SiLU of the first half of the last dimension, times the second half, by TransformerEngine's kernels; a part of Megatron's ``MLP``.

    The host calls these in a fraction of the time that it takes to call Megatron's own, which are compiled functions.
    """

    def __init__(self, config: TransformerConfig) -> None:
        assert config.gated_linear_unit and config.activation_func is F.silu, "of another activation"

    def __call__(self, gate_and_up: Tensor) -> Tensor:
        """(..., 2 * ffn_hidden_size of this rank) -> (..., ffn_hidden_size of this rank), on a GPU, computed in fp32 and rounded once."""
        return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        import transformer_engine_torch as te

        ctx.save_for_backward(gate_and_up)
        return te.swiglu(gate_and_up, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        import transformer_engine_torch as te

        return te.dswiglu(gradient.contiguous(), *ctx.saved_tensors, None)
