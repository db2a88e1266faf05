"""Log-probability and entropy of each token from vocabulary-parallel logits, without ever gathering the vocabulary.

Owns the arithmetic and its gradient. Must not know models, schedules or losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

_CHUNK_ELEMENTS = 64 * 2**20  # float32 temporaries of one chunk of rows: 256 MiB each


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Of tokens (B, S): tensors (B, S), float32 where nothing else is said, column t about token t given the tokens before it.

    Column 0 is zero or False: nothing precedes the first token.

    Attributes:
        log_probs: log-probability of token t at the temperature asked for.
        entropy: of the distribution that token t is drawn from, in nats.
        likeliest: (B, S) bool, whether no token was likelier than token t, so that greedy decoding draws it.
    """

    log_probs: Tensor
    entropy: Tensor
    likeliest: Tensor


def score_tokens(logits: Tensor, tokens: Tensor, *, vocab_size: int, temperature: float) -> TokenScores:
    """Score every token of a batch. Differentiable in ``logits``. Collective over the TP group.

    Args:
        logits: (B, S, padded vocabulary / tp_size), any floating dtype; row t predicts token t + 1.
        tokens: (B, S) int64, the same on all tp_ranks.
        vocab_size: columns from here on are padding and take no probability.
        temperature: divides the logits.
    """
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    log_probs, entropy, likeliest = _VocabularyParallelScores.apply(logits, targets, vocab_size, temperature)
    return TokenScores(log_probs=_shifted(log_probs), entropy=_shifted(entropy), likeliest=_shifted(likeliest))


def _shifted(of_next: Tensor) -> Tensor:
    return torch.nn.functional.pad(of_next[:, :-1], (1, 0))


class _VocabularyParallelScores(torch.autograd.Function):
    """Rows are treated in chunks, so that float32 temporaries stay bounded whatever batch and vocabulary are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        group, width = parallel_state.get_tensor_model_parallel_group(), logits.size(-1)
        start = dist.get_rank(group) * width
        ctx.used, ctx.start, ctx.temperature = max(0, min(width, vocab_size - start)), start, temperature
        rows, flat = logits.view(-1, width)[:, : ctx.used], targets.reshape(-1)
        peak = torch.full((rows.size(0),), -torch.inf, dtype=torch.float32, device=rows.device)
        if ctx.used:
            peak = rows.amax(dim=-1).float() / temperature
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        sums = torch.zeros(3, rows.size(0), dtype=torch.float32, device=rows.device)
        for part in _chunks(rows):
            shifted = rows[part].float() / temperature - peak[part, None]
            exponential = shifted.exp()
            column, here = _local_columns(flat[part], start, ctx.used)
            sums[0, part] = exponential.sum(dim=-1)
            sums[1, part] = exponential.mul_(shifted).sum(dim=-1)
            sums[2, part] = torch.where(here, shifted.gather(1, column[:, None])[:, 0], 0.0)
        dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        entropy = log_sum - sums[1] / sums[0]
        ctx.save_for_backward(logits, flat, peak + log_sum, entropy)
        ctx.set_materialize_grads(False)
        likeliest = sums[2] >= 0  # the logit of the token is the largest of all
        ctx.mark_non_differentiable(likeliest)
        shape = targets.shape
        return (sums[2] - log_sum).view(shape), entropy.view(shape), likeliest.view(shape)

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None, _: None) -> tuple[Tensor, None, None, None]:
        logits, flat, log_normaliser, entropy = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        rows, out = (whole.view(-1, logits.size(-1))[:, : ctx.used] for whole in (logits, gradient))
        for part in _chunks(rows):
            log_prob = rows[part].float() / ctx.temperature - log_normaliser[part, None]
            prob = log_prob.exp()
            chunk = torch.zeros_like(prob)
            if of_log_probs is not None:
                weight = of_log_probs.reshape(-1)[part]
                column, here = _local_columns(flat[part], ctx.start, ctx.used)
                chunk.scatter_(1, column[:, None], torch.where(here, weight, 0.0)[:, None])
                chunk.addcmul_(prob, weight[:, None], value=-1.0)
            if of_entropy is not None:
                spread = log_prob.add_(entropy[part, None]).mul_(prob)
                chunk.addcmul_(spread, of_entropy.reshape(-1)[part, None], value=-1.0)
            out[part] = chunk.div_(ctx.temperature).to(out.dtype)
        return gradient, None, None, None


def _chunks(rows: Tensor) -> list[slice]:
    """Slices over the rows; none when this rank holds padding columns only."""
    if rows.size(1) == 0:
        return []
    height = max(1, _CHUNK_ELEMENTS // rows.size(1))
    return [slice(start, start + height) for start in range(0, rows.size(0), height)]


def _local_columns(targets: Tensor, start: int, used: int) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank, and whether it is here at all (column 0 where not)."""
    column = targets - start
    here = (column >= 0) & (column < used)
    return torch.where(here, column, 0), here
