"""One rank of the actor of a GRPO run: warm start, log-probabilities and training.

Owns the GRPO loss of an optimizer update as Megatron's passes want it (``algorithms`` has the arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlsync.bridge.checkpoint_folder import Restored
from rlsync.layout.topology import Topology
from rlsync.megatron.model import gather_parameters, unwrap
from rlsync.megatron.optimizer import build_optimizer
from rlsync.megatron.routes import Routing
from rlsync.megatron.scores import TokenScores
from rlsync.megatron.train import ROUTES, StepResult, token_scores, train_step
from workers.actor import ActorRank, optimizer_options
from workers.algorithms import PolicyLossOptions, correct_importance, policy_loss
from workers.config import RunConfig
from workers.config.grpo import AlgorithmConfig
from workers.metrics import LogprobDifference, part_rates
from workers.routes import RoutingCounts, padded_routes, routing_counts
from workers.samples import ReplicaBatch, Sample, collate, scoring_cuts, stacked
from workers.sft_data import SftExample
from workers.supervised import SupervisedObjective, num_targets


class GrpoRank(ActorRank):
    """Order of calls: ``setup``, ``warm_start`` where wanted, ``begin``, ``connect``; then ``sync``, ``score``, ``train`` each step."""

    _config: RunConfig

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        super().__init__(config, topology)
        self._warm_optimizer: Any = None
        self._reference: dict[str, Tensor] | None = None
        self._old_logprobs: list[Tensor] | None = None
        self._reference_logprobs: list[Tensor] | None = None
        # Of each sample of the step, what training replays, where it does.
        self._routes: list[Tensor] | None = None
        self._counts: RoutingCounts | None = None

    def setup(self, address: str, port: int, load_initial: bool) -> None:
        """``ActorRank.setup``, and the routing of a model with experts. Collective."""
        super().setup(address, port, load_initial)
        self._routing = Routing(self._models) if unwrap(self._models[0]).config.num_moe_experts is not None else None

    def warm_start(self, steps: Sequence[Sequence[SftExample]], lr: float) -> list[float]:
        """Supervised steps on these examples. Returns the losses. Collective.

        Every replica takes its part of each step's examples, in microbatches of ``algorithm.training_batch_size_per_gpu``. The optimizer
        is one of its own, which goes on in the next call and ends with ``begin``.
        """
        if self._warm_optimizer is None:
            self._warm_optimizer = build_optimizer(self._models, optimizer_options(self._config.actor, lr))
        optimizer = self._warm_optimizer
        dp_rank, dp_size, losses = self._topology.coordinates(self._rank).dp_rank, self._topology.dp_size, []
        size = self._config.algorithm.training_batch_size_per_gpu
        for examples in steps:
            mine = list(examples[dp_rank::dp_size])
            if len(mine) * dp_size < len(examples):  # replicas have equally many microbatches
                mine.append(replace(mine[-1], loss_mask=(False,) * mine[-1].length))
            microbatches = [stacked(mine[i : i + size]) for i in range(0, len(mine), size)]
            result = train_step(self._models, optimizer, microbatches, SupervisedObjective(num_targets(examples)), **self._passes)
            losses.append(result.metrics["loss"])
        gather_parameters(self._models)
        return losses

    def begin(self, resume_folder: str | None, random_state: bool = True) -> Restored | None:
        """``ActorRank.begin``, after keeping the present weights as reference of the KL term where there is one. Collective."""
        self._warm_optimizer = None
        if self._config.has_reference:
            self._reference = self._weights()
        return super().begin(resume_folder, random_state)

    # Scores.

    def score(self, batches: Sequence[ReplicaBatch]) -> LogprobDifference | None:
        """Recompute the log-probabilities of this replica's samples, and the reference's. Collective.

        Kept on the rank for ``train``. Returns the difference to the engine's on the first rank of each replica.
        """
        at = self._topology.coordinates(self._rank)
        batch, algorithm = batches[at.dp_rank], self._config.algorithm
        samples, replay = batch.samples, self._config.actor.megatron.router_replay
        known = [s.routes for s in samples if s.routes is not None]
        engine = known if self._config.rollout.enable_return_routed_experts else None
        self._routes = engine if replay == "R3" else None
        scored = [s.old_logprobs for s in samples if s.old_logprobs is not None]
        if len(scored) == len(samples):
            self._old_logprobs = scored
        elif algorithm.recompute_logprobs:
            self._old_logprobs, taken = self._score(batches, self._routing, self._routes)
            self._routes = taken if replay == "R2" else self._routes
            self._counts = self._count(taken, engine)
        else:
            self._old_logprobs = [_engine_row(s) for s in samples]
        self._reference_logprobs = None if self._reference is None else self._score_reference(batches)
        if not algorithm.recompute_logprobs or self._config.rollout.return_logprobs is False or not at.leads_replica:
            return None
        rows = [(row, s) for row, s in zip(self._old_logprobs, samples, strict=True) if s.engine_logprobs]
        apart = [(row[len(s.prompt_ids) :] - torch.tensor(s.engine_logprobs)).double().abs() for row, s in rows]
        flat = torch.cat([torch.zeros(0, dtype=torch.float64), *apart])
        return LogprobDifference(flat.sum().item(), flat.max().item() if flat.numel() else 0.0, flat.numel())

    def score_early(self, batches: Sequence[ReplicaBatch]) -> tuple[list[Tensor] | None, RoutingCounts | None]:
        """``old_logprobs`` of this replica's samples, which have no pass in ``score`` with them. Collective.

        Returned on the first rank of each replica. Beside them what ``routing_counts`` says, of these samples.
        """
        at = self._topology.coordinates(self._rank)
        samples = batches[at.dp_rank].samples
        routes = [s.routes for s in samples if s.routes is not None]
        engine = routes if self._config.rollout.enable_return_routed_experts else None
        replayed = engine if self._config.actor.megatron.router_replay == "R3" else None
        scored, taken = self._score(batches, self._routing, replayed)
        return scored if at.leads_replica else None, self._count(taken, engine)

    def routing_counts(self) -> RoutingCounts | None:
        """Routing of tokens in the last ``score`` that recomputed log-probabilities, on the first tensor and context rank of each stage."""
        counts, self._counts = self._counts, None
        return counts

    def _count(self, taken: Sequence[Tensor], engine: Sequence[Tensor] | None) -> RoutingCounts | None:
        at = self._topology.coordinates(self._rank)
        is_first = (at.tp_rank, at.cp_rank) == (0, 0)
        return routing_counts(taken, engine, self._routing.num_experts) if is_first and self._routing is not None else None

    def _score(
        self, batches: Sequence[ReplicaBatch], routing: Routing | None, routes: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probability of every token of every sample, each (its length,) float32 on the CPU, and the routes that they took.

        With ``routes`` of each sample these are taken; the second list is empty without ``routing``.
        """
        algorithm, replica = self._config.algorithm, self._topology.coordinates(self._rank).dp_rank
        size = None if self._config.runner.enable_dynamic_batch_size else algorithm.logprob_forward_micro_batch_size
        most = algorithm.logprob_forward_max_tokens
        cuts = scoring_cuts(batches, size=size, budget=None if most is None else self.token_budget(most))[replica]
        samples, microbatches = batches[replica].samples, []
        for cut in cuts:
            microbatches.append(collate([samples[index] for index in cut]))
            if routes is not None:
                microbatches[-1][ROUTES] = padded_routes([routes[index] for index in cut], microbatches[-1]["tokens"].size(1))
        scored = token_scores(self._models, microbatches, routing=routing, **self._distribution(), **self._passes)
        found = [scores.log_probs.cpu() for scores in scored]
        taken = [] if routing is None else [routing.taken(i, *m["tokens"].shape) for i, m in enumerate(microbatches)]
        places = {index: (number, row) for number, cut in enumerate(cuts) for row, index in enumerate(cut)}
        rows = [(*places[index], sample.length) for index, sample in enumerate(samples)]
        return (
            [found[number][row, :length] for number, row, length in rows],
            [taken[number][row, :length] for number, row, length in rows] if taken else [],
        )

    def _score_reference(self, batches: Sequence[ReplicaBatch]) -> list[Tensor]:
        """``_score`` under the reference weights, which replace the current ones for the call, and by their own routes."""
        assert self._reference is not None
        current = self._weights()
        try:
            self._write(self._reference)
            return self._score(batches, None)[0]
        finally:
            self._write(current)

    def _distribution(self) -> dict[str, Any]:
        """That of which engines draw, as ``sampling_arguments`` has it."""
        sampling, vision = self._config.algorithm.sampling_params, self._bridge.model.vision
        return {
            "temperature": sampling.temperature if sampling.do_sample else 1.0,
            "never_drawn": () if vision is None else vision.placeholders,
        }

    # Training.

    def train(self, batches: Sequence[ReplicaBatch]) -> list[dict[str, float]]:
        """All optimizer updates of a step on the samples that ``score`` saw. Collective.

        Returns the metrics of each update, named as under ``actor/training/``; equal on all ranks.
        """
        batch, algorithm = batches[self._topology.coordinates(self._rank).dp_rank], self._config.algorithm
        options, row, metrics = policy_loss_options(algorithm), 0, []
        for update, num_tokens, num_sequences in zip(batch.updates, batch.num_tokens, batch.num_sequences, strict=True):
            microbatches = []
            for micro in update:
                microbatches.append(self._microbatch(micro, row))
                row += len(micro)
            objective = PolicyObjective(
                options, num_tokens if options.loss_agg_func == "token-mean" else num_sequences, algorithm.calculate_entropy
            )
            result = train_step(
                self._models, self._optimizer, microbatches, objective, scheduler=self._scheduler,
                routing=self._routing if self._routes is not None else None, **self._distribution(), **self._passes,
            )  # fmt: skip
            metrics.append(update_metrics(result))
        self._old_logprobs = self._reference_logprobs = self._routes = None
        return metrics

    def _microbatch(self, samples: Sequence[Sample], row: int) -> dict[str, Tensor]:
        """Tensors of a microbatch; ``row`` is the position of its first sample in the order of ``score``."""
        assert self._old_logprobs is not None, "score first"
        batch, algorithm, rows = collate(samples), self._config.algorithm, slice(row, row + len(samples))
        batch["old_logprobs"] = _padded(self._old_logprobs[rows], batch["tokens"].size(1))
        if self._reference_logprobs is not None:
            batch["reference_logprobs"] = _padded(self._reference_logprobs[rows], batch["tokens"].size(1))
        if self._routes is not None:
            batch[ROUTES] = padded_routes(self._routes[rows], batch["tokens"].size(1))
        if algorithm.importance_sampling_fix:
            batch["advantages"] = correct_importance(
                batch["advantages"], batch["old_logprobs"], batch["engine_logprobs"], algorithm.importance_sampling_clip
            )
        return batch


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    whole = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        whole[i, : row.numel()] = row
    return whole


def _engine_row(sample: Sample) -> Tensor:
    """The engine's log-probabilities in the form ``_score`` returns: zero at the prompt."""
    return torch.cat((torch.zeros(len(sample.prompt_ids)), torch.tensor(sample.engine_logprobs)))


def policy_loss_options(algorithm: AlgorithmConfig) -> PolicyLossOptions:
    low, high = algorithm.clip_ratio_low, algorithm.clip_ratio_high
    return PolicyLossOptions(
        loss_agg_func=algorithm.loss_agg_func,
        clip_ratio_low=algorithm.ratio_clip_eps if low is None else low,
        clip_ratio_high=algorithm.ratio_clip_eps if high is None else high,
        clip_ratio_c=algorithm.clip_ratio_c,
        clip_log_ratio_min=algorithm.clip_log_ratio_min,
        clip_log_ratio_max=algorithm.clip_log_ratio_max,
        early_stop_imp_ratio=algorithm.early_stop_imp_ratio,
        kl_beta=algorithm.kl_beta,
        kl_penalty_type=algorithm.kl_penalty_type,
        entropy_bonus=algorithm.entropy_bonus,
    )


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """``TokenLoss`` of one optimizer update.

    Attributes:
        denominator: response tokens or sequences of the update over all replicas, as ``loss_agg_func`` divides.
        report_entropy: compute the entropy also where it has no weight.
    """

    options: PolicyLossOptions
    denominator: int
    report_entropy: bool

    def __call__(self, scores: TokenScores, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        wants_entropy = self.report_entropy or self.options.entropy_bonus != 0
        loss = policy_loss(
            scores.log_probs,
            microbatch["old_logprobs"],
            microbatch["advantages"],
            microbatch["mask"],
            self.options,
            reference_logprobs=microbatch.get("reference_logprobs"),
            entropy=scores.entropy if wants_entropy else None,
        )
        sums = {f"{name}|{part}": pair[i] for name, pair in loss.sums.terms.items() for i, part in enumerate(("sum", "count"))}
        return loss.numerator / max(1, self.denominator), sums


def update_metrics(result: StepResult) -> dict[str, float]:
    """Metrics of an optimizer update, named as under ``actor/training/``; nan where a skipped update has no number."""
    names = sorted({name.split("|")[0] for name in result.metrics if "|" in name})
    counts = {name: result.metrics[f"{name}|count"] for name in names}
    quotients = {name: result.metrics[f"{name}|sum"] / counts[name] if counts[name] else 0.0 for name in names}
    return {
        **{f"actor/{name}": value for name, value in (*quotients.items(), *result.balancing.items())},
        "actor/grad_norm": math.nan if result.grad_norm is None else result.grad_norm,
        **({} if result.num_zeros_in_grad is None else {"actor/num_zeros_in_grad": result.num_zeros_in_grad}),
        "actor/lr": result.learning_rate,
        **{f"actor/{name}": rate for name, rate in part_rates(result.learning_rates).items()},
        "actor/loss_scale": result.loss_scale,
        "actor/update_success": float(not result.skipped),
    }
