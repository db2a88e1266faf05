"""Log-probability and entropy of each token, from the hidden states that a vocabulary-parallel output layer would turn into logits.

Owns that layer's matrix product where tokens are scored, the arithmetic behind it, and the gradients of both. Neither the vocabulary is
ever gathered, nor is there a float32 matrix of tokens and vocabulary, nor logits of more tokens than asked for. Must not know models,
schedules or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.nn.functional import linear

from rlsync.models.memory import CHUNK_TOKENS

# Of a piece of rows: float32 temporaries of 256 MiB each, and where compiled functions make none, offsets of 32 bits.
_PIECE_ELEMENTS = 64 * 2**20
_COMPILED_PIECE_ELEMENTS = 2**30
# A logit of what is never drawn: float16 has it, and its exponential is 0 at any temperature up to 90.
_NEVER = -1e4


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


@dataclass(slots=True)
class Scoring:
    """What a forward pass scores, and what it found.

    Attributes:
        targets: (B, S) int64, for each position the token that is scored there, the same on all tp_ranks.
        vocab_size: columns of the output layer from here on are padding and take no probability.
        temperature: divides the logits.
        never_drawn: tokens that take no probability either, because whoever samples leaves them out.
        chunk_tokens: positions of which logits exist at once. Those of more are computed again in the backward pass.
        found: after the pass, of each position: log-probability and entropy, (B, S) float32, and whether the target is likeliest. Apart
            from one another, so that what a loss does not read has no gradient to be computed.
    """

    targets: Tensor
    vocab_size: int
    temperature: float = 1.0
    never_drawn: tuple[int, ...] = ()
    chunk_tokens: int = CHUNK_TOKENS
    found: tuple[Tensor, Tensor, Tensor] | None = None


class ScoringHead(tensor_parallel.ColumnParallelLinear):
    """The output layer of a GPTModel. Within ``scoring`` a forward pass scores tokens in place of giving logits.

    It has to be this layer's own forward pass: Megatron waits for a layer's gathered parameters in a hook of it. A submodule ``adapter``
    makes of hidden states what ``score_hidden`` takes for one, with rows (S, B).
    """

    _scoring: Scoring | None = None

    @contextmanager
    def scoring(self, scoring: Scoring) -> Iterator[None]:
        """Around one forward pass of the model, which sets ``scoring.found``."""
        self._scoring = scoring
        try:
            yield
        finally:
            self._scoring = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As of ColumnParallelLinear; within ``scoring`` the log-probabilities alone, (S, B, 1).

        Differentiable in hidden states (S, B, H), of which each tensor rank has its part under sequence parallelism, and in the weight.
        Collective over the TP group.
        """
        adapter = getattr(self, "adapter", None)
        found = None if adapter is None else adapter(input_)
        if self._scoring is None:
            return self._logits(input_, weight, runtime_gather_output, found)
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(input_)
        added = None if found is None else (found[0].flatten(0, 1), found[1])
        scores = score_hidden(hidden.flatten(0, 1), self.weight if weight is None else weight, self._scoring, added)
        log_probs, entropy, likeliest = (each.view(hidden.shape[:2]).t() for each in scores)
        self._scoring.found = log_probs, entropy, likeliest
        return log_probs.detach().t()[..., None], None

    def _logits(
        self, input_: Tensor, weight: Tensor | None, runtime_gather_output: bool | None, adapter: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """As of ColumnParallelLinear, with what an adapter adds on each rank before ranks gather them."""
        logits: Tensor
        if adapter is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output)
            return logits, bias
        logits, bias = super().forward(input_, weight, False)
        logits = logits + linear(*adapter)
        is_gathered = self.gather_output if runtime_gather_output is None else runtime_gather_output
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits) if is_gathered else logits, bias


def score_hidden(
    hidden: Tensor, weight: Tensor, scoring: Scoring, adapter: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability and entropy, (S x B,) float32, and whether the target is likeliest. Collective over the TP group.

    Args:
        hidden: (S x B, H), the rows of a position next to each other, any floating dtype.
        weight: (padded vocabulary / tp_size, H), of the same dtype. A gradient buffer of Megatron that it has takes the gradient of all
            chunks but the last, which comes as any gradient does.
        scoring: with targets (B, S).
        adapter: (S x B, r) and (padded vocabulary / tp_size, r), whose product is added to the logits. The second may have a gradient
            buffer as the weight has.
    """
    low, b = (None, None) if adapter is None else adapter
    found: tuple[Tensor, Tensor, Tensor] = _VocabularyParallelScores.apply(hidden, weight, low, b, scoring)
    return found


class _VocabularyParallelScores(torch.autograd.Function):
    """Positions are treated in chunks, and the logits of a chunk in pieces, which bounds memory whatever they are."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, low: Tensor | None, b: Tensor | None, scoring: Scoring
    ) -> tuple[Tensor, Tensor, Tensor]:
        group, targets = parallel_state.get_tensor_model_parallel_group(), scoring.targets.t().reshape(-1)
        width = weight.size(0)
        start = dist.get_rank(group) * width
        used = max(0, min(width, scoring.vocab_size - start))
        without = tuple(token - start for token in scoring.never_drawn if 0 <= token - start < used)
        columns = _Columns(start, used, scoring.temperature, without)
        chunks = _slices(hidden.size(0), scoring.chunk_tokens)
        peak = torch.full((hidden.size(0),), -torch.inf, dtype=torch.float32, device=hidden.device)
        sums = torch.zeros(3, hidden.size(0), dtype=torch.float32, device=hidden.device)
        logits = hidden.new_empty(0)
        for chunk in chunks:
            logits = columns.without(_logits(hidden, weight, low, b, chunk))
            columns.add_up(logits, targets[chunk], peak[chunk], sums[:, chunk])
        own_peak = peak.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        if columns.used:
            # From sums relative to the largest logit of this rank to those relative to the largest of all.
            lower = (own_peak - peak) / scoring.temperature
            sums[1] += lower * sums[0]
            sums[:2] *= lower.exp()
        dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        entropy = log_sum - sums[1] / sums[0]
        ctx.columns, ctx.chunks, ctx.is_spent = columns, chunks, False
        ctx.main_grads = getattr(weight, "main_grad", None), getattr(b, "main_grad", None)
        normaliser = peak + log_sum * scoring.temperature
        ctx.save_for_backward(hidden, weight, low, b, targets, normaliser, entropy, *([logits] if len(chunks) == 1 else []))
        ctx.set_materialize_grads(False)
        likeliest = sums[2] >= peak
        ctx.mark_non_differentiable(likeliest)
        return (sums[2] - peak) / scoring.temperature - log_sum, entropy, likeliest

    @staticmethod
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        assert not ctx.is_spent, "logits were overwritten by their gradient"
        ctx.is_spent = True
        hidden, weight, low, b, targets, normaliser, entropy, *kept = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_low = torch.empty_like(low) if ctx.needs_input_grad[2] else None
        of_weight: Tensor | None = None
        of_b: Tensor | None = None
        for chunk in ctx.chunks:
            logits = kept[0] if kept else ctx.columns.without(_logits(hidden, weight, low, b, chunk))
            ctx.columns.to_gradient(
                logits,
                targets[chunk],
                normaliser[chunk],
                entropy[chunk],
                None if of_log_probs is None else of_log_probs[chunk],
                None if of_entropy is None else of_entropy[chunk],
            )
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden[chunk])
            if ctx.needs_input_grad[1]:
                of_weight = _summed_gradient(logits.t() @ hidden[chunk], of_weight, ctx.main_grads[0])
            if of_low is not None:
                torch.mm(logits, b, out=of_low[chunk])
            if ctx.needs_input_grad[3]:
                of_b = _summed_gradient(logits.t() @ low[chunk], of_b, ctx.main_grads[1])
        of_weight, of_b = (None if found is None else found.to(weight.dtype) for found in (of_weight, of_b))
        return of_hidden, of_weight, of_low, of_b, None


def _logits(hidden: Tensor, weight: Tensor, low: Tensor | None, b: Tensor | None, chunk: slice) -> Tensor:
    """Of a chunk of positions, on this rank's columns of the vocabulary."""
    logits = hidden[chunk] @ weight.t()
    return logits if low is None or b is None else logits.addmm_(low[chunk], b.t())


def _summed_gradient(found: Tensor, before: Tensor | None, main_grad: Tensor | None) -> Tensor:
    """What stands for the gradient of the weight after one more chunk; ``main_grad`` has taken all but this one."""
    if before is None:
        return found
    if main_grad is None:
        return before.float().add_(found)
    main_grad.add_(before)
    return found


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of the vocabulary on this rank: tokens ``start`` to ``start + used``. Logits are divided by ``temperature``; columns
    ``never`` take no probability, and their logits no gradient.

    An operation on the logits of a chunk reads and writes gigabytes: there are as few as can be.
    """

    start: int
    used: int
    temperature: float
    never: tuple[int, ...]

    def without(self, logits: Tensor) -> Tensor:
        """The same tensor, in which tokens that are never drawn are unlikely beyond float32; not infinitely so, of which entropies and
        gradients would become nan."""
        for column in self.never:
            logits[:, column] = _NEVER
        return logits

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target on this rank, and whether it is here at all (column 0 where not)."""
        column = targets - self.start
        here = (column >= 0) & (column < self.used)
        return torch.where(here, column, 0)[:, None], here

    def add_up(self, logits: Tensor, targets: Tensor, peak: Tensor, sums: Tensor) -> None:
        """Into ``peak`` (rows,) the largest logit of each row; into ``sums`` (3, rows) exp(x), exp(x) x and the target's logit, where x is
        a logit's distance to the peak over the temperature."""
        for piece in self._pieces(logits):
            rows = logits[piece, : self.used]
            column, here = self.local(targets[piece])
            sums[2, piece] = torch.where(here, rows.gather(1, column)[:, 0].float(), 0.0)
            peak[piece], sums[0, piece], sums[1, piece] = _fused(_exponentials, rows)(rows, self.temperature)

    def to_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        normaliser: Tensor,
        entropy: Tensor,
        of_log_probs: Tensor | None,
        of_entropy: Tensor | None,
    ) -> None:
        """Put the gradient of logits into their place, given those of log-probabilities and entropies (rows,).

        ``normaliser`` (rows,): a logit's distance to it over the temperature is its log-probability.
        """
        logits[:, self.used :] = 0.0
        for piece in self._pieces(logits):
            rows = logits[piece, : self.used]
            weight = torch.zeros_like(entropy[piece]) if of_log_probs is None else of_log_probs[piece]
            column, here = self.local(targets[piece])
            own = of_entropy if of_entropy is None else of_entropy[piece]
            _fused(_to_gradient, rows)(rows, column, here, normaliser[piece], entropy[piece], weight, own, self.temperature)
        for index in self.never:
            logits[:, index] = 0.0

    def _pieces(self, logits: Tensor) -> Sequence[slice]:
        """Slices over the rows; none when this rank holds padding columns only."""
        elements = _COMPILED_PIECE_ELEMENTS if logits.is_cuda else _PIECE_ELEMENTS
        return _slices(logits.size(0), max(1, elements // self.used)) if self.used else ()


def _fused(function: Callable[..., Any], rows: Tensor) -> Callable[..., Any]:
    """On a GPU the function in a few kernels that read ``rows`` once each; elsewhere operation by operation."""
    return _compiled(function) if rows.is_cuda else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)  # type: ignore[no-any-return]


def _exponentials(rows: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (rows, columns): the largest of each row, float32 sums (rows,) of exp(x), and of exp(x) x; x: see ``add_up``."""
    peak = rows.amax(dim=-1).float()
    below = _over_temperature(rows, peak, temperature)
    exponential = below.exp()
    return peak, exponential.sum(dim=-1), (exponential * below).sum(dim=-1)


def _to_gradient(
    rows: Tensor,
    column: Tensor,
    here: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    of_log_probs: Tensor,
    of_entropy: Tensor | None,
    temperature: float,
) -> None:
    """Logits (rows, columns) into their gradient: see ``to_gradient``. ``column`` (rows, 1) of the target, where it is ``here``."""
    log_prob = _over_temperature(rows, normaliser, temperature)
    weight = of_log_probs / temperature
    if of_entropy is None:
        gradient = log_prob.exp() * -weight[:, None]
    else:
        gradient = -log_prob.exp() * ((log_prob + entropy[:, None]) * (of_entropy / temperature)[:, None] + weight[:, None])
    is_target = (torch.arange(rows.size(1), device=rows.device) == column) & here[:, None]
    rows.copy_(gradient + torch.where(is_target, weight[:, None], 0.0))


def _over_temperature(rows: Tensor, subtracted: Tensor, temperature: float) -> Tensor:
    """Float32 of ``rows`` less ``subtracted`` (rows,), over the temperature."""
    found = rows.float() - subtracted[:, None]
    return found if temperature == 1.0 else found / temperature


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
