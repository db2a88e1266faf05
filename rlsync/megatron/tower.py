"""A vision tower: transformers' own module, whose blocks are computed as suits a GPU, with the parameters and the names that it has.

Owns what is computed otherwise than transformers does, which the order of sums alone tells. Must not know families, files, Megatron's
layers, or where features go.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor
from torch.autograd.function import once_differentiable

# "flash" in the name has transformers' towers count their longest sequences once a pass, and not once a block.
_ATTENTION = "rlsync_flash_pictures"
# Where cuBLAS' kernels for Hopper ask rows of half precision to begin: at multiples of 16 bytes. And columns that fill their tiles.
_ALIGNED, _TILE = 8, 64


class PatchProjection(torch.nn.Module):
    """A convolution whose patches do not overlap, with its parameters, as the matrix product that it is.

    On one CPU core it takes a fifth to a twelfth of the time of torch's Conv3d in float32, and a ninetieth in bfloat16.
    """

    def __init__(self, convolution: torch.nn.Conv3d) -> None:
        super().__init__()
        assert convolution.kernel_size == convolution.stride, "patches overlap"
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """(N, out_channels) of N patches, each of the shape of the kernel."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class PatchAttention(torch.nn.Module):
    """Self-attention of a block, with its parameters: queries and keys turn by where their patch lies, and see its picture or window.

    Args:
        attention: of transformers, with ``qkv`` and ``proj``.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scaling = attention.num_heads, attention.scaling

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        max_seqlen: int | None = None,
        **_: Any,
    ) -> Tensor:
        """(N, H) of N patches, as transformers calls it.

        Args:
            hidden_states: (N, H).
            cu_seqlens: (sequences + 1,) int32, where sequences begin and the last one ends.
            position_embeddings: cosines and sines (N, head size), whose halves are equal.
            max_seqlen: patches of the longest sequence; None: it is looked for.
        """
        turned = _Turned.apply(self.qkv(hidden_states), *position_embeddings, self.num_heads)
        query, key, value = turned.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        longest = int(cu_seqlens.diff().max()) if max_seqlen is None else int(max_seqlen)
        return self.proj(attend_within_pictures(query, key, value, cu_seqlens, longest, self.scaling).flatten(1))


class _Turned(torch.autograd.Function):
    """Queries and keys of ``qkv`` (N, 3 x heads x head size), turned in place: nothing is kept for the backward pass but the angles."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosines: Tensor, sines: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.num_heads = num_heads
        ctx.mark_dirty(qkv)
        return _turn(qkv, cosines, sines, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(grads[0].clone(memory_format=torch.contiguous_format), cosines, -sines, ctx.num_heads), None, None, None


def _turn(qkv: Tensor, cosines: Tensor, sines: Tensor, num_heads: int) -> Tensor:
    """In fp32, rounded once; by TransformerEngine's kernel where it is installed."""
    # (N, queries and keys, heads, head size)
    both = qkv.unflatten(1, (3, num_heads, -1))[:, :2]
    if qkv.is_cuda and rope_utils.fused_apply_rotary_pos_emb is not None:
        angles = torch.atan2(sines.float(), cosines.float())[:, None, None]
        turned = rope_utils.fused_apply_rotary_pos_emb(both.flatten(1, 2)[:, None], angles)
        both.copy_(turned[:, 0].unflatten(1, (2, num_heads)))
        return qkv
    first, second = both.chunk(2, dim=-1)
    cosines, sines = (each[:, None, None, : first.size(-1)].float() for each in (cosines, sines))
    turned = first * cosines - second * sines
    second.copy_(second * cosines + first * sines)
    first.copy_(turned)
    return qkv


def attend_within_pictures(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float) -> Tensor:
    """Attention in which a patch sees those of its sequence: its picture, or its window. Not collective.

    In half precision on a GPU it is one kernel for all sequences; elsewhere it is one call for each run of sequences that are equally
    long. One call a sequence, as transformers' ``sdpa`` makes, leaves a GPU idle: a window has 64 patches.

    Args:
        query, key, value: (patches, heads, head size).
        ends: (sequences + 1,) int32, where sequences begin and the last one ends.
        longest: patches of the longest.
        scaling: of the products of queries and keys.

    Returns:
        (patches, heads, head size) in the dtype of ``query``.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not torch.are_deterministic_algorithms_enabled():
        from torch.nn.attention.varlen import varlen_attn

        ends = ends.to(torch.int32)
        found = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)
        assert isinstance(found, Tensor)
        return found
    begin, done = 0, []
    for length, group in itertools.groupby(ends.diff().tolist()):
        end = begin + length * len(list(group))
        # (sequences, heads, length, head size)
        q, k, v = (tensor[begin:end].unflatten(0, (-1, length)).transpose(1, 2) for tensor in (query, key, value))
        done.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
        begin = end
    return torch.cat(done)


class FilledLinear(torch.nn.Linear):
    """A linear layer, with its parameters, that takes and gives columns of zeros beside its own.

    It is called, and no other module reads its parameters, because hooks before the call have waited for them: data-parallel ranks gather
    them while the forward pass is under way.
    """

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)

    def forward(self, hidden: Tensor, columns: int | None = None) -> Tensor:
        """(..., in_features and columns of anything) -> (..., ``columns``), by default out_features; the rest are zeros."""
        beside = hidden.size(-1) - self.in_features, (self.out_features if columns is None else columns) - self.out_features
        if not any(beside):
            return F.linear(hidden, self.weight, self.bias)
        weight = F.pad(self.weight, (0, beside[0], 0, beside[1]))
        return F.linear(hidden, weight, None if self.bias is None else F.pad(self.bias, (0, beside[1])))


class GatedNetwork(torch.nn.Module):
    """A gated feed-forward network, with its parameters, whose inner products have columns of zeros beside theirs, up to a whole tile.

    Qwen2.5-VL's have 3,420 columns, so that rows do not begin where fast kernels can read them.

    Args:
        network: of transformers, with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        layers = network.gate_proj, network.up_proj, network.down_proj
        self.gate_proj, self.up_proj, self.down_proj = map(FilledLinear, layers)
        self.act_fn = network.act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        columns = self.gate_proj.out_features
        # Adapters add to what the layers return.
        if not any(each._forward_hooks for each in (self.gate_proj, self.up_proj, self.down_proj)):
            columns += -columns % _TILE
        return self.down_proj(self.act_fn(self.gate_proj(hidden, columns)) * self.up_proj(hidden, columns))


class RootMeanSquareNorm(torch.nn.Module):
    """A norm without a mean, with its parameter, as one kernel; in half precision it is rounded once and not twice.

    Args:
        norm: of transformers, with ``variance_epsilon``.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def build_tower(tower: str, config: Any, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A tower with random parameters of ``dtype`` on ``device``. Not collective.

    Args:
        tower: transformers' class, as module:class.
        config: from transformers, of this class.
    """
    module, name = tower.split(":")
    tower_class: Any = getattr(import_module(module), name)
    with torch.device(device):
        return refined(tower_class._from_config(config, dtype=dtype, attn_implementation="sdpa"))


def refined(tower: Any) -> Any:
    """A tower of transformers, changed in place to compute as this module does. Parameters stay the same ones, with their names."""
    # Named when a tower is built, transformers would look for a package of that name.
    tower.config._attn_implementation = _ATTENTION
    tower.patch_embed.proj = PatchProjection(tower.patch_embed.proj)
    for block in tower.blocks:
        block.attn = PatchAttention(block.attn)
        if hasattr(block.mlp, "gate_proj") and block.mlp.gate_proj.out_features % _ALIGNED:
            block.mlp = GatedNetwork(block.mlp)
    for module in tuple(tower.modules()):
        for name, child in module.named_children():
            if hasattr(child, "variance_epsilon"):
                setattr(module, name, RootMeanSquareNorm(child))
    return tower
