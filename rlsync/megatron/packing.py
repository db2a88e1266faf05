"""Sequences of a microbatch one after the other in place of padding: where each token goes, and back.

Owns what attention and rotary embedding are told of it, and what refuses it. Must not know losses or schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from rlsync.errors import ConfigError

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
        total: tokens of the packed row; those behind the last sequence are padding, and a sequence of their own.
        bounds: where sequences begin and end in it, each with the padding at its end, from 0 to ``total``.
    """

    rows: int
    length: int
    places: Tensor
    at: Tensor
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
        return cls(rows, length, places, at, total, bounds if bounds[-1] == total else (*bounds, total))

    def pack(self, padded: Tensor, fill: float = 0) -> Tensor:
        """(B, S, ...) -> (1, total, ...)."""
        packed = padded.new_full((self.total, *padded.shape[2:]), fill)
        packed[self.at.to(padded.device)] = padded.flatten(0, 1)[self.places.to(padded.device)]
        return packed[None]

    def unpack(self, packed: Tensor, fill: float = 0) -> Tensor:
        """(1, total, ...) -> (B, S, ...); differentiable, ``fill`` at padding."""
        whole = packed.new_full((self.rows * self.length, *packed.shape[2:]), fill)
        whole = whole.index_copy(0, self.places.to(packed.device), packed[0, self.at.to(packed.device)])
        return whole.view(self.rows, self.length, *packed.shape[2:])

    def sequences(self, device: torch.device, *, is_shared: bool = False) -> PackedSequences:
        """What a GPTModel takes as ``packed_seq_params``: of whole sequences also where they are shared between context-parallel ranks."""
        bounds = torch.tensor(self.bounds, dtype=torch.int32, device=device)
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
