"""Sequences of a microbatch one after the other in place of padding: where each token goes, and back.

Owns what attention and rotary embedding are told of it, and what refuses it. Must not know losses or schedules.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rlsync.errors import ConfigError
from rlsync.megatron.parallel import to_device
from rlsync.megatron.versions import waits_for_packed_bounds

# Of a microbatch: how many tokens each row of ``tokens`` has.
LENGTHS = "lengths"


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of packed sequences, with their bounds on the host too: ``bounds`` are those of ``cu_seqlens_q``."""

    bounds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Packing:
    """How the tokens of a microbatch (B, S) lie in one row.

    Attributes:
        rows, length: B and S.
        places: (num_tokens,) int64, for each token in its order in the packed row ``b * S + s``.
        at: (num_tokens,) int64, where it lies in that row.
        on_device: both once more, on ``compute_device``.
        total: tokens of the packed row; those behind the last sequence are padding, and a sequence of their own.
        bounds: where sequences begin and end in it, each with the padding at its end, from 0 to ``total``.
    """

    rows: int
    length: int
    places: Tensor
    at: Tensor
    on_device: tuple[Tensor, Tensor]
    total: int
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, microbatch: Mapping[str, Tensor], *, total: int, multiple: int = 1) -> Packing:
        """The packing of a checked microbatch into ``total`` tokens, each sequence padded to a ``multiple``, of which ``total`` is one."""
        rows, length = microbatch["tokens"].shape
        sizes = [(row, size) for row, size in enumerate(microbatch[LENGTHS].tolist()) if size]
        bounds = (0, *accumulate(-(-size // multiple) * multiple for _, size in sizes))
        places = torch.cat([torch.arange(row * length, row * length + size) for row, size in sizes])
        at = torch.cat([torch.arange(start, start + size) for start, (_, size) in zip(bounds, sizes, strict=False)])
        on_device = to_device(places), to_device(at)
        return cls(rows, length, places, at, on_device, total, bounds if bounds[-1] == total else (*bounds, total))

    def pack(self, padded: Tensor, fill: float = 0) -> Tensor:
        """(B, S, ...) -> (1, total, ...)."""
        places, at = self._indices(padded.device)
        packed = padded.new_full((self.total, *padded.shape[2:]), fill)
        packed[at] = padded.flatten(0, 1)[places]
        return packed[None]

    def unpack(self, packed: Tensor, fill: float = 0) -> Tensor:
        """(1, total, ...) -> (B, S, ...); differentiable, ``fill`` at padding."""
        places, at = self._indices(packed.device)
        whole = packed.new_full((self.rows * self.length, *packed.shape[2:]), fill)
        whole = whole.index_copy(0, places, packed[0, at])
        return whole.view(self.rows, self.length, *packed.shape[2:])

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``places`` and ``at`` on a device. A copy to a GPU at each use would wait for what the GPU was given before."""
        return (self.places, self.at) if device.type == "cpu" else self.on_device

    def sequences(self, *, is_shared: bool = False) -> PackedSequences:
        """What a GPTModel takes as ``packed_seq_params``: of whole sequences also where they are shared between context-parallel ranks."""
        bounds = to_device(torch.tensor(self.bounds, dtype=torch.int32))
        longest = max(end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            # TransformerEngine asks for these of shared ones. Padding at the end of a sequence is a part of it: causality keeps it away
            # from what is before.
            cu_seqlens_q_padded=bounds if is_shared else None,
            cu_seqlens_kv_padded=bounds if is_shared else None,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            bounds=self.bounds,
        )


class PackedRotations:
    """Rotary embedding of packed sequences on their device alone, in place of Megatron's ``_apply_rotary_pos_emb_thd``, with its arguments.

    Megatron's has the host wait for the GPU twice in each call, to cut the row into sequences, until a release in which it asks for
    ``max_seqlen``. The angles of a row are gathered once for all layers.
    """

    def __init__(self) -> None:
        # One row's: Megatron keeps angles of many lengths for good.
        self._of: tuple[weakref.ref[Tensor], weakref.ref[Tensor], Tensor] | None = None

    def __call__(
        self, t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *options: Any, cp_group: torch.distributed.ProcessGroup, **more: Any
    ) -> Tensor:
        """``t``: (tokens of this rank, heads, head_dim); ``cu_seqlens``: (sequences + 1,) int32, of whole sequences; ``freqs``: angles of
        positions within a sequence, or of each token of the whole row, (positions, 1, 1, rotary_dim). Returns what is like ``t``."""
        if self._of is None or self._of[0]() is not freqs or self._of[1]() is not cu_seqlens:
            places = places_of_packed(len(t), cu_seqlens, cp_group.size(), cp_group.rank(), within=len(freqs) != len(t) * cp_group.size())
            self._of = weakref.ref(freqs), weakref.ref(cu_seqlens), freqs[places]
        return rope_utils._apply_rotary_pos_emb_bshd(t[:, None], self._of[2], *options, **more)[:, 0]


def places_of_packed(num_tokens: int, cu_seqlens: Tensor, cp_size: int, cp_rank: int, *, within: bool) -> Tensor:
    """Where the tokens of a context-parallel rank, which has two slices of each packed sequence, lie: (num_tokens,) of integers.

    Args:
        cu_seqlens: (sequences + 1,) of integers, on any device: bounds of the whole sequences, multiples of ``2 * cp_size`` where that is
            not 2.
        within: places count from the beginning of the sequence, not from that of the row.
    """
    bounds = cu_seqlens // cp_size
    at = torch.arange(num_tokens, device=cu_seqlens.device, dtype=bounds.dtype)
    sequence = torch.searchsorted(bounds, at, right=True) - 1
    places = at - bounds[sequence]
    if cp_size > 1:
        half = (bounds[sequence + 1] - bounds[sequence]) // 2
        places = places + torch.where(places < half, cp_rank * half, (2 * (cp_size - 1) - cp_rank) * half)
    return places if within else places + cu_seqlens[sequence]


def rotate_packed_on_device() -> None:
    """Put ``PackedRotations`` in the place of Megatron's, in this process, where this release's waits. Idempotent."""
    if waits_for_packed_bounds():
        rope_utils._apply_rotary_pos_emb_thd = PackedRotations()


def check_lengths(microbatch: Mapping[str, Any]) -> None:
    """Raise ConfigError where a microbatch cannot be packed."""
    rows, length = microbatch["tokens"].shape
    if LENGTHS not in microbatch:
        raise ConfigError("packing needs 'lengths' in every microbatch: how many tokens each row of its tokens has")
    lengths = microbatch[LENGTHS]
    if lengths.shape != (rows,) or lengths.is_floating_point():
        raise ConfigError(
            f"lengths is {tuple(lengths.shape)} {lengths.dtype}; for tokens {(rows, length)} it must be ({rows},) of integers"
        )
    if int(lengths.min()) < 0 or int(lengths.max()) > length or not int(lengths.sum()):
        raise ConfigError(f"lengths is {lengths.tolist()}; rows of this microbatch have 0 to {length} tokens, and at least one has some")


def packing_refusal(config: TransformerConfig) -> str | None:
    """Why sequences of a model cannot be packed, or not without changing what its passes compute; None where they can."""
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    pairs = [(kinds, weights)] if isinstance(kinds, str) else list(zip(kinds, weights, strict=True))
    if config.num_moe_experts is not None and any(kind == "seq_aux_loss" and weight for kind, weight in pairs):
        return (
            "moe_router_load_balancing_type seq_aux_loss balances each sequence, and packed ones would be one; use aux_loss, or no packing"
        )
    if config.context_parallel_size > 1 and config.cp_comm_type not in (None, "p2p"):
        return f"cp_comm_type {config.cp_comm_type} takes no packed sequences; use p2p, or no packing"
    return None
