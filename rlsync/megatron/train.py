"""Passes over microbatches through Megatron's schedules: one optimizer step, or token scores without gradients.

Works under any mix of tensor, sequence, context, pipeline (virtual, uneven) and data parallelism. Callers have right-padded sequences;
models get them so, or packed, and those with a vision tower take pictures beside them.
Must not know rewards, advantages or algorithms: the loss comes from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from torch import Tensor

from rlsync.errors import ConfigError, GradientError
from rlsync.megatron.balance import Balance, balanced
from rlsync.megatron.context import Share, sequence_multiple, share_of, total_multiple
from rlsync.megatron.model import unwrap
from rlsync.megatron.optimizer import AFTER_NAN, rates_of_parts
from rlsync.megatron.packing import LENGTHS, Packing, check_lengths, packing_refusal
from rlsync.megatron.parallel import compute_device, to_device
from rlsync.megatron.pictures import PICTURE_KEYS, refuse_pictures
from rlsync.megatron.routes import Routing
from rlsync.megatron.scores import Scoring, TokenScores
from rlsync.megatron.vision import VisionLanguageModel
from rlsync.models import Part
from rlsync.models.memory import CHUNK_TOKENS
from rlsync.models.moe import sparse_layers

Microbatch = Mapping[str, Tensor]
# Of a microbatch: the experts that its tokens go to.
ROUTES = "routes"


class TokenLoss(Protocol):
    """A caller's loss of one microbatch; runs on the last pipeline stage, with equal arguments on all its tp_ranks and cp_ranks."""

    def __call__(self, scores: TokenScores, microbatch: Microbatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the scalar loss, differentiable in ``scores``, and named scalars that may be summed."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did; equal on all ranks.

    Attributes:
        metrics: the loss's named scalars, and ``loss``, summed over microbatches and data-parallel ranks.
        grad_norm: L2 norm of the whole gradient before clipping; None when the step was skipped.
        num_zeros_in_grad: elements of the whole gradient that are zero, nan when the step was skipped; None where they are not counted.
        learning_rates: that the step used, of each part of the model that is trained.
        loss_scale: factor on the fp16 loss; 1.0 otherwise.
        skipped: gradients overflowed under fp16, so nothing but the loss scale changed.
        balancing: balancing losses of routers before their coefficient, by Megatron's names: mean over layers with experts, passes
            (those that fill up the schedule too) and replicas, over tokens that the ``lengths`` of microbatches count (with
            ``moe_router_fusion`` over padding too). Empty without a coefficient.
    """

    metrics: Mapping[str, float]
    grad_norm: float | None
    num_zeros_in_grad: float | None
    learning_rates: Mapping[Part, float]
    loss_scale: float
    skipped: bool
    balancing: Mapping[str, float]

    @property
    def learning_rate(self) -> float:
        """That of the language model; where that is frozen, the highest."""
        return self.learning_rates.get("language_model", max(self.learning_rates.values()))


def train_step(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    microbatches: Sequence[Microbatch],
    loss: TokenLoss,
    *,
    scheduler: OptimizerParamScheduler | None = None,
    temperature: float = 1.0,
    never_drawn: Sequence[int] = (),
    routing: Routing | None = None,
    packing: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> StepResult:
    """One optimizer step on the sum of the losses of all microbatches of all data-parallel ranks.

    Nothing is averaged: divide by a global count in ``loss`` where a mean is wanted, and the step does not depend on
    how the batch was cut. Collective over all ranks.

    Args:
        models: chunks of this rank, wrapped in DistributedDataParallel.
        optimizer: of these chunks, from ``build_optimizer``.
        microbatches: each with ``tokens`` (B, S) int64, right-padded, and whatever the loss reads. Equal on the ranks of
            one data-parallel replica, also where they share the sequences; equally many on all replicas. With pictures also
            ``pixel_values`` (num_patches, patch_dim) and ``image_grid_thw`` (num_images, 3) int64, in the order of rows and of
            appearance, both in host memory; the loss does not get them.
        loss: see ``TokenLoss``.
        scheduler: advanced by one when the step was not skipped.
        temperature: divides the logits that ``loss`` sees.
        never_drawn: tokens that take no probability in them, because whoever samples leaves them out (vLLM's ``logit_bias``).
        routing: of these chunks; tokens then go to the experts that a microbatch's ``routes`` (B, S, layers with experts, topk) name.
        packing: the model gets the rows of a microbatch one after the other, without the padding behind their ``lengths`` (B,) int64;
            losses, metrics and gradients are the same, but for balancing losses with ``moe_router_fusion``, in which padding counts.
        chunk_tokens: positions of a microbatch of which logits exist at once; those of more are computed again in the backward pass.

    Raises:
        ConfigError: no microbatch, routes without ``routing`` or of another model, pictures that its tokens have no room for, or packing
            without ``lengths`` or of a model whose sequences cannot be packed (``packing_refusal``); nothing has changed then. Not on all
            ranks where replicas differ in it.
        GradientError: a gradient is not finite; no weight has changed. On every rank, but where ``DdpOptions.check_for_nan_in_grad`` has a
            rank look at its own before they are reduced: there on the ranks whose are not, and others wait for these in vain.
    """
    _set_training(models, True)
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
    learning_rates = rates_of_parts(optimizer)
    # The schedule divides each loss by the number of microbatches, and the gradient reduction by the data-parallel size.
    scale = _padded_count(models, len(microbatches)) * parallel_state.get_data_parallel_world_size()

    def differentiate(passed: _Passed, scoring: Scoring, _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        scores = passed.scores(scoring)
        if passed.repeated:
            return scores.log_probs.sum() * 0.0, {}
        value, metrics = loss(scores, passed.microbatch)
        return value * scale, {"loss": value.detach(), **{name: metric.detach() for name, metric in metrics.items()}}

    clear_aux_losses_tracker()
    how = _How(temperature, tuple(never_drawn), chunk_tokens, packing)
    with _own_gradients():
        collected = _run(models, microbatches, differentiate, how, forward_only=False, routing=routing)
    balancing = _balancing(models, _padded_count(models, len(microbatches)))
    updated, grad_norm, num_zeros = optimizer.step()
    if updated and scheduler is not None:
        scheduler.step(1)
    return StepResult(
        metrics=_summed(collected),
        grad_norm=float(grad_norm) if updated and grad_norm is not None else None,
        num_zeros_in_grad=_zeros(num_zeros) if optimizer.config.log_num_zeros_in_grad else None,
        learning_rates=learning_rates,
        loss_scale=float(optimizer.get_loss_scale()),
        skipped=not updated,
        balancing=balancing,
    )


def _zeros(counted: float | None) -> float:
    return math.nan if counted is None else float(counted)


@contextmanager
def _own_gradients() -> Iterator[None]:
    """Have what DistributedDataParallel says of this rank's gradients, where it looks at them, be an error of ours."""
    try:
        yield
    except RuntimeError as error:
        if "in local grad norm for bucket" not in str(error):
            raise
        raise GradientError(f"gradients of actor rank {dist.get_rank()} are not finite before they are reduced: {AFTER_NAN}") from error


@torch.no_grad()
def token_scores(
    models: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    *,
    temperature: float = 1.0,
    never_drawn: Sequence[int] = (),
    routing: Routing | None = None,
    packing: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[TokenScores]:
    """Log-probability and entropy of every token, without gradients. Collective over the TP, CP and PP groups.

    Args:
        models: chunks of this rank, wrapped or bare.
        microbatches: each with ``tokens`` (B, S) int64, right-padded, and pictures as in ``train_step``; equal on the ranks of one
            data-parallel replica.
        temperature: divides the logits.
        never_drawn, routing: as in ``train_step``; afterwards ``routing.taken`` has the routes that were taken.
        packing, chunk_tokens: as in ``train_step``; no logits are computed twice.

    Returns:
        One ``TokenScores`` a microbatch, on every rank of the replica. Scores of padding mean nothing.
    """

    def score(passed: _Passed, scoring: Scoring, _: Tensor, non_loss_data: bool = True) -> Tensor:
        scores = passed.scores(scoring)
        return torch.stack((scores.log_probs, scores.entropy, scores.likeliest))

    with _evaluating(models):
        how = _How(temperature, tuple(never_drawn), chunk_tokens, packing)
        collected = _run(models, microbatches, score, how, forward_only=True, routing=routing)
    shapes = [(3, *microbatch["tokens"].shape) for microbatch in microbatches]
    flat = torch.empty(sum(math.prod(shape) for shape in shapes), dtype=torch.float32, device=compute_device())
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        torch.cat([scores.reshape(-1) for scores in collected[: len(shapes)]], out=flat)
    _broadcast_from_last_stage(flat)
    parts = flat.split([math.prod(shape) for shape in shapes])
    scored = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [TokenScores(log_probs, entropy, likeliest > 0) for log_probs, entropy, likeliest in scored]


@torch.no_grad()
def gathered_logits(models: Sequence[torch.nn.Module], microbatch: Microbatch) -> Tensor | None:
    """Logits (B, S, vocab_size) of a microbatch's tokens (B, S), gathered over the vocabulary; None before the last pipeline stage.

    For comparisons with other implementations. Collective over the TP, CP and PP groups.
    """

    def gather(passed: _Passed, _: None, logits: Tensor, non_loss_data: bool = True) -> Tensor:
        whole = passed.whole(tensor_parallel.gather_from_tensor_model_parallel_region(logits))
        rows, length = microbatch["tokens"].shape
        return whole[:rows, :length, : passed.vocab_size]

    with _evaluating(models):
        collected = _run(models, [microbatch], gather, None, forward_only=True)
    return collected[0] if collected else None


@dataclass(frozen=True, slots=True)
class _How:
    """How microbatches are scored; see ``train_step``."""

    temperature: float
    never_drawn: tuple[int, ...]
    chunk_tokens: int
    packing: bool


@dataclass(frozen=True, slots=True)
class _Passed:
    """One microbatch on its way through the pipeline.

    Attributes:
        microbatch: the caller's, on the device, without its pictures.
        tokens: as the model gets them on this rank, padded or packed.
        targets: for each of them the token that follows it in its sequence.
        packing: how the caller's tokens lie in the packed row; None where they are padded.
        share: which of the padded or packed tokens this rank has; None without context parallelism.
        arguments: what the chunks take beside tokens.
        vocab_size: of the model, without padding.
        repeated: this pass fills up the schedule; its loss does not count.
        index: of the microbatch.
        valid: (B, S) as ``tokens``, which of them are of a sequence; None without experts, without lengths, and where all are padding.
    """

    microbatch: Microbatch
    tokens: Tensor
    targets: Tensor
    packing: Packing | None
    share: Share | None
    arguments: Mapping[str, Any]
    vocab_size: int
    repeated: bool
    index: int
    valid: Tensor | None

    def scores(self, scoring: Scoring) -> TokenScores:
        """Of the caller's tokens, from what ``ScoringHead`` made of the targets. Collective over the CP group."""
        assert scoring.found is not None, "the last chunk has passed"
        rows, length = self.microbatch["tokens"].shape
        whole = map(self.whole, scoring.found)
        padded = whole if self.packing is None else map(self.packing.unpack, whole)
        return TokenScores(*(F.pad(each[:rows, : length - 1], (1, 0)) for each in padded))

    def whole(self, found: Tensor) -> Tensor:
        """(B, S of this rank, ...) -> (B, S, ...). All context-parallel ranks compute the same of it."""
        return found if self.share is None else self.share.gather(found, 1, sums_gradients=False)


def _run(
    models: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    on_output: Callable[..., Any],
    how: _How | None,
    *,
    forward_only: bool,
    routing: Routing | None = None,
) -> list[Any]:
    """Pass the microbatches through the pipeline; what ``on_output`` returned for each, on the last stage (else []).

    It is given the microbatch, what was found of its targets, and what the last chunk returns: logits where ``how`` is None.
    """
    for microbatch in microbatches:
        if ROUTES in microbatch:
            if routing is None:
                raise ConfigError("a microbatch has routes, which need the routing of the model to be taken")
            routing.check(microbatch[ROUTES])
    passes = _prepared(models, microbatches, packing=how is not None and how.packing)
    iterators = [iter(passes) for _ in models]
    rows, length = passes[0].tokens.shape
    # The schedule divides by the ranks that share a sequence.
    length *= parallel_state.get_context_parallel_world_size()
    with (
        nullcontext() if routing is None else routing.run(with_gradients=not forward_only),
        nullcontext() if forward_only else balanced(models) as balance,
    ):
        return get_forward_backward_func()(
            forward_step_func=partial(_forward, on_output, how, routing, balance),
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=list(models) if len(models) > 1 else models[0],
            num_microbatches=len(passes),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def _forward(
    on_output: Callable[..., Any],
    how: _How | None,
    routing: Routing | None,
    balance: Balance | None,
    passes: Iterator[_Passed],
    model: torch.nn.Module,
) -> tuple[Tensor, Callable[..., Any]]:
    passed, chunk = next(passes), unwrap(model)
    routes = passed.microbatch.get(ROUTES)
    routed = nullcontext() if routing is None else routing.microbatch(passed.index, passed.tokens, routes, passed.packing, passed.share)
    counted = nullcontext() if balance is None else balance.microbatch(passed.valid, counts=not passed.repeated)
    scored: AbstractContextManager[None] = nullcontext()
    scoring: Scoring | None = None
    if how is not None and chunk.post_process:
        scoring = Scoring(passed.targets, passed.vocab_size, how.temperature, how.never_drawn, how.chunk_tokens)
        scored = chunk.output_layer.scoring(scoring)
    with routed, counted, scored:
        output = model(input_ids=passed.tokens, attention_mask=None, **passed.arguments)
    return output, partial(on_output, passed, scoring)


def _prepared(models: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], *, packing: bool) -> list[_Passed]:
    """Pad or pack each microbatch to a shape the ranks can divide, and fill up their number to what the schedule can take."""
    config, chunk = models[0].config, unwrap(models[0])
    _check(config, microbatches, packing=packing)
    multiple, of_each = total_multiple(config), sequence_multiple(config)
    shapes = [(1, int((-(-m[LENGTHS] // of_each) * of_each).sum())) if packing else tuple(m["tokens"].shape) for m in microbatches]
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        shapes = [tuple(max(sizes) for sizes in zip(*shapes, strict=True))] * len(shapes)
    passes = []
    for index, (microbatch, (rows, length)) in enumerate(zip(microbatches, shapes, strict=True)):
        moved = {name: to_device(tensor) for name, tensor in microbatch.items() if name not in PICTURE_KEYS}
        tokens = microbatch["tokens"]
        length = -(-length // multiple) * multiple
        packed = Packing.of(microbatch, total=length, multiple=of_each) if packing else None
        if packed is None:
            tokens = F.pad(tokens, (0, length - tokens.size(1), 0, rows - tokens.size(0)))
        given, targets = tokens, F.pad(tokens[:, 1:], (0, 1))
        if packed is not None:
            given, targets = packed.pack(tokens), packed.pack(targets)
        share = share_of((0, length) if packed is None else packed.bounds) if config.context_parallel_size > 1 else None
        valid = None if config.num_moe_experts is None else _valid(microbatch, tokens, packed)
        if share is not None:
            given, targets = share.own(given, 1), share.own(targets, 1)
            valid = None if valid is None else share.own(valid, 1)
        arguments = _arguments(chunk, tokens, microbatch, packed, share)
        found = to_device(given), to_device(targets), packed, share, arguments, chunk.unpadded_vocab_size
        passes.append(_Passed(moved, *found, repeated=False, index=index, valid=None if valid is None else to_device(valid)))
    last = passes[-1]
    filling = replace(last, repeated=True)
    return passes + [filling] * (_padded_count(models, len(passes)) - len(passes))


def _valid(microbatch: Microbatch, tokens: Tensor, packing: Packing | None) -> Tensor | None:
    """Which tokens of the microbatch, as it is padded to ``tokens`` (B, S) or packed, are of a sequence."""
    if LENGTHS not in microbatch or not bool(microbatch[LENGTHS].any()):
        return None
    lengths = microbatch[LENGTHS].to(tokens.device)
    valid = torch.arange(tokens.size(1), device=tokens.device) < F.pad(lengths, (0, tokens.size(0) - lengths.size(0)))[:, None]
    return valid if packing is None else packing.pack(valid)


def _check(config: TransformerConfig, microbatches: Sequence[Microbatch], *, packing: bool) -> None:
    if not microbatches:
        raise ConfigError("a pass over the model needs at least one microbatch, on every data-parallel rank")
    if packing:
        refusal = packing_refusal(config)
        if refusal is not None:
            raise ConfigError(refusal)
        for microbatch in microbatches:
            check_lengths(microbatch)


def _arguments(chunk: GPTModel, tokens: Tensor, microbatch: Microbatch, packing: Packing | None, share: Share | None) -> Mapping[str, Any]:
    """What the chunks of this rank take beside their tokens; ``tokens`` are all, padded."""
    packed = {} if packing is None else {"packed_seq_params": packing.sequences(is_shared=share is not None)}
    if isinstance(chunk, VisionLanguageModel):
        return {**chunk.arguments(tokens, microbatch, packing, share), **packed}
    refuse_pictures(microbatch)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    positions = positions if packing is None else packing.pack(positions)
    return {"position_ids": to_device(positions if share is None else share.own(positions, 1)), **packed}


def _padded_count(models: Sequence[torch.nn.Module], count: int) -> int:
    """Microbatches of a step: the interleaved schedule takes a multiple of the pipeline's size only."""
    multiple = parallel_state.get_pipeline_model_parallel_world_size() if len(models) > 1 else 1
    return -(-count // multiple) * multiple


def _summed(collected: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Metrics summed over microbatches and data-parallel ranks, on every rank."""
    last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    names: list[Any] = [sorted({name for metrics in collected for name in metrics})]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast_object_list(names, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    sums = torch.zeros(len(names[0]), dtype=torch.float32, device=compute_device())
    if last_stage:
        for index, name in enumerate(names[0]):
            sums[index] = torch.stack([metrics[name] for metrics in collected if name in metrics]).sum()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    _broadcast_from_last_stage(sums)
    return dict(zip(names[0], sums.tolist(), strict=True))


# Kinds of balancing loss, in the order of Megatron's own: what it logs each as, and whether that is a part of a sum over replicas too.
_BALANCING = {
    "aux_loss": ("load_balancing_loss", False),
    "seq_aux_loss": ("seq_load_balancing_loss", False),
    "global_aux_loss": ("global_load_balancing_loss", True),
}


def _balancing(models: Sequence[torch.nn.Module], num_passes: int) -> dict[str, float]:
    """``StepResult.balancing`` of the passes since Megatron's record of these losses was cleared. Collective over all ranks."""
    config = unwrap(models[0]).config
    if config.num_moe_experts is None:
        return {}
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    pairs = [(kinds, weights)] if isinstance(kinds, str) else zip(kinds, weights, strict=True)
    num_layers, tracker, found = len(sparse_layers(config.num_layers, config.moe_layer_freq)), get_moe_layer_wise_logging_tracker(), {}
    for name, has_replicas in [_BALANCING[kind] for kind, weight in pairs if kind in _BALANCING and weight > 0]:
        # Stages without such a layer have nothing recorded.
        recorded = tracker[name]["values"].sum() if name in tracker else torch.zeros(())
        value = recorded.to(compute_device(), torch.float32)
        for group in (
            parallel_state.get_tensor_and_context_parallel_group(),
            parallel_state.get_data_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            dist.all_reduce(value, group=group)
        replicas = 1 if has_replicas else parallel_state.get_data_parallel_world_size()
        found[name] = value.item() / (num_layers * num_passes * replicas)
    return found


def _broadcast_from_last_stage(tensor: Tensor) -> None:
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            tensor,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )


def _set_training(models: Sequence[torch.nn.Module], training: bool) -> None:
    for model in models:
        model.train(training)


@contextmanager
def _evaluating(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    before = models[0].training
    _set_training(models, False)
    try:
        yield
    finally:
        _set_training(models, before)
