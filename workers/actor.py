"""One rank of the Megatron actor, as a Ray actor: set-up, warm start, sync, log-probabilities, training, checkpoints.

All ranks get the same calls in the same order; most are collective over the actor. Knows no engine but by handle.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rlsync.bridge import AutoBridge
from rlsync.checkpoint import TRACKER, Restored, load_checkpoint, save_checkpoint
from rlsync.megatron.model import DdpOptions, gather_parameters, iter_parameters
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
from rlsync.megatron.parallel import compute_device, destroy_parallel, initialize_parallel
from rlsync.megatron.scores import TokenScores
from rlsync.megatron.train import StepResult, token_scores, train_step
from rlsync.source import MegatronSource
from rlsync.sync import SyncConfig, SyncReport, WeightSyncer
from rlsync.topology import Topology
from rlsync.transport.agreement import gather_bytes
from workers.algorithms import PolicyLossOptions, correct_importance, policy_loss
from workers.cluster import free_port, keep_own_log
from workers.config import RunConfig
from workers.config.actor import ActorConfig
from workers.rollout import RayEngine
from workers.samples import Sample, Share, collate

_SPECS = {"decoder_gpt": "auto", "local_gpt": "local", "te_gpt": "te"}


@dataclass(frozen=True, slots=True)
class LogprobDifference:
    """|engine - actor| over the response tokens of one replica: sum, largest, and how many tokens."""

    total: float
    largest: float
    count: int


class ActorRank:
    """Lives in one process; ``RANK`` and ``WORLD_SIZE`` come from its environment."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        keep_own_log()
        self._config, self._topology = config, topology
        self._rank = int(os.environ["RANK"])
        self._syncer: WeightSyncer | None = None
        self._reference: dict[str, Tensor] | None = None
        self._old_logprobs: list[Tensor] | None = None
        self._reference_logprobs: list[Tensor] | None = None

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port for the process group; asked of rank 0."""
        return ("127.0.0.1" if self._topology.world_size == 1 else socket.gethostbyname(socket.gethostname())), free_port()

    def setup(self, address: str, port: int, resume_folder: str | None) -> Restored | None:
        """Process groups, model, initial weights, optimizer; then the checkpoint to resume, if any. Collective."""
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        actor = self._config.actor
        initialize_parallel(
            self._topology,
            seed=actor.seed,
            timeout_s=actor.megatron.distributed_timeout_minutes * 60,
            backend=actor.megatron.distributed_backend,
        )
        self._build_model(actor)
        # A resumed run overwrites what this reads, but its reference stays the initial model.
        if resume_folder is None or self._config.algorithm.kl_beta != 0:
            self._load_initial_weights(actor)
        if self._config.algorithm.kl_beta != 0:
            self._reference = {name: p.detach().to("cpu", copy=True) for _, _, name, p in iter_parameters(self._models)}
        self._build_optimizer(actor)
        return None if resume_folder is None else self._resume(actor, resume_folder)

    def _build_model(self, actor: ActorConfig) -> None:
        path = actor.megatron.ckpt_convertor.hf_model_path
        assert path is not None, "load_config derives it"
        self._bridge = AutoBridge.from_pretrained(path, make_vocab_size_divisible_by=actor.model.make_vocab_size_divisible_by)
        self._models = self._bridge.get_model(
            topology=self._topology,
            bf16=actor.model.precision == "bf16",
            fp16=actor.model.precision == "fp16",
            overrides={"sequence_parallel": actor.model.sequence_parallel, **actor.model.transformer_overrides()},
            spec=_SPECS[actor.spec_name],
            ddp=DdpOptions(
                use_distributed_optimizer=actor.optim.use_distributed_optimizer,
                grad_reduce_in_fp32=actor.megatron.accumulate_allreduce_grads_in_fp32,
                overlap_grad_reduce=actor.optim.overlap_grad_reduce,
                overlap_param_gather=actor.optim.overlap_param_gather,
                bucket_size=actor.megatron.ddp_bucket_size,
                check_for_nan_in_grad=actor.megatron.check_for_nan_in_loss_and_grad,
            ),
        )

    def _load_initial_weights(self, actor: ActorConfig) -> None:
        """From HF directly, from a Megatron checkpoint, or through a conversion made once."""
        hf_path, megatron = actor.megatron.ckpt_convertor.hf_model_path, actor.megatron
        assert hf_path is not None
        if actor.model.megatron_checkpoint is not None:
            load_checkpoint(actor.model.megatron_checkpoint, self._bridge, self._models)
        elif megatron.mbridge:
            self._bridge.load_weights(self._models, hf_path)
        elif megatron.use_hf_ckpt:
            assert megatron.ckpt_convertor.save_path is not None, "load_config derives it"
            converted = Path(megatron.ckpt_convertor.save_path)
            if not (converted / TRACKER).is_file():
                self._bridge.load_weights(self._models, hf_path)
                save_checkpoint(converted, None, self._models, step=0)
            load_checkpoint(converted, self._bridge, self._models)

    def _build_optimizer(self, actor: ActorConfig) -> None:
        optim, schedule = actor.optim, actor.lr_sched
        assert schedule.max_lr is not None and schedule.min_lr is not None, "load_config derives both"
        first_decay, last_decay = schedule.start_weight_decay, schedule.end_weight_decay
        self._optimizer = build_optimizer(self._models, self._optimizer_options(optim.lr))
        self._scheduler = build_scheduler(
            self._optimizer,
            SchedulerOptions(
                max_lr=schedule.max_lr,
                min_lr=schedule.min_lr,
                lr_decay_style=schedule.lr_decay_style,
                lr_decay_iters=schedule.lr_decay_iters,
                lr_warmup_iters=schedule.lr_warmup_iters,
                lr_warmup_fraction=schedule.lr_warmup_fraction,
                lr_warmup_init=schedule.lr_warmup_init,
                lr_wsd_decay_iters=schedule.lr_wsd_decay_iters,
                lr_wsd_decay_style=schedule.lr_wsd_decay_style,
                start_weight_decay=optim.weight_decay if first_decay is None else first_decay,
                end_weight_decay=optim.weight_decay if last_decay is None else last_decay,
                weight_decay_incr_style=schedule.weight_decay_incr_style,
            ),
        )

    def _optimizer_options(self, lr: float) -> OptimizerOptions:
        optim = self._config.actor.optim
        return OptimizerOptions(
            lr=lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            adam_eps=optim.adam_eps,
            clip_grad=optim.clip_grad,
            loss_scale=optim.loss_scale,
            optimizer_cpu_offload=optim.optimizer_cpu_offload,
            optimizer_offload_fraction=optim.optimizer_offload_fraction if optim.optimizer_cpu_offload else 0.0,
            use_precision_aware_optimizer=optim.use_precision_aware_optimizer,
        )

    def _resume(self, actor: ActorConfig, folder: str) -> Restored:
        if actor.megatron.no_load_optim:
            restored = load_checkpoint(folder, self._bridge, self._models)
            # It copied the parameters when it was built.
            self._optimizer.reload_model_params()
            return restored
        return load_checkpoint(folder, self._bridge, self._models, optimizer=self._optimizer, scheduler=self._scheduler)

    def warm_start(self, steps: Sequence[Sequence[tuple[tuple[int, ...], tuple[int, ...]]]], lr: float) -> list[float]:
        """Supervised steps on (prompt, response) token ids with an optimizer of their own. Returns the losses. Collective.

        Every replica takes its part of each step's examples.
        """
        optimizer = build_optimizer(self._models, self._optimizer_options(lr))
        dp_rank, losses = self._topology.coordinates(self._rank).dp_rank, []
        for examples in steps:
            samples = [Sample(prompt, response, (), True, None) for prompt, response in examples]
            total = sum(len(s.response_ids) for s in samples)

            def mean_loss(scores: TokenScores, microbatch: Mapping[str, Tensor], total: int = total) -> tuple[Tensor, Mapping[str, Tensor]]:
                return -(scores.log_probs * microbatch["mask"]).sum() / total, {}

            mine = samples[dp_rank :: self._topology.dp_size]
            losses.append(train_step(self._models, optimizer, [collate(mine)], mean_loss).metrics["loss"])
        # The run's own optimizer copied the parameters before these steps changed them.
        gather_parameters(self._models)
        self._build_optimizer(self._config.actor)
        return losses

    # Sync.

    def connect(self, engines: Sequence[RayEngine]) -> None:
        """Connect to the engines. Collective."""
        sync = self._config.weight_sync
        config = SyncConfig(
            bucket_bytes=sync.bucket_bytes,
            num_slots=sync.num_slots,
            timeout_s=sync.timeout_s,
            sink=sync.sink,
            transport=sync.transport,
            pause_mode=sync.pause_mode,
        )
        source = MegatronSource(self._bridge, self._models, bucket_bytes=sync.bucket_bytes)
        device = compute_device()
        self._syncer = WeightSyncer(
            source,
            engines if self._rank == 0 else (),
            config,
            rank=self._rank,
            world_size=self._topology.world_size,
            broadcast=lambda payload: gather_bytes(payload, device=device)[0],
        )
        self._syncer.connect()

    def sync(self, version: int) -> SyncReport:
        """Give the engines the present weights as ``version``. Collective."""
        assert self._syncer is not None, "connect first"
        return self._syncer.sync(version)

    # Scores.

    def score(self, shares: Sequence[Share]) -> LogprobDifference | None:
        """Recompute the log-probabilities of this replica's samples, and the reference's. Collective.

        Kept on the rank for ``train``. Returns the difference to the engine's on the first rank of each replica.
        """
        at = self._topology.coordinates(self._rank)
        samples = [s for update in shares[at.dp_rank].updates for micro in update for s in micro]
        recompute = self._config.algorithm.recompute_logprobs
        self._old_logprobs = self._score(samples) if recompute else [_engine_row(s) for s in samples]
        self._reference_logprobs = self._score_reference(samples) if self._reference is not None else None
        if not recompute or not self._config.rollout.return_logprobs or (at.tp_rank, at.pp_rank) != (0, 0):
            return None
        differences = [
            (row[len(s.prompt_ids) :] - torch.tensor(s.engine_logprobs)).double().abs()
            for row, s in zip(self._old_logprobs, samples, strict=True)
            if s.response_ids
        ]
        flat = torch.cat(differences)
        return LogprobDifference(flat.sum().item(), flat.max().item(), flat.numel())

    def _score(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Log-probability of every token of every sample, each (its length,) float32 on the CPU."""
        size = self._config.algorithm.logprob_forward_micro_batch_size
        cuts = [samples[i : i + size] for i in range(0, len(samples), size)]
        scored = token_scores(self._models, [collate(cut) for cut in cuts], temperature=self._temperature())
        return [
            scores.log_probs[row, : sample.length].cpu()
            for cut, scores in zip(cuts, scored, strict=True)
            for row, sample in enumerate(cut)
        ]  # fmt: skip

    def _score_reference(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The same under the initial weights, swapped in for the moment."""
        assert self._reference is not None
        gather_parameters(self._models)
        parameters = {name: p for _, _, name, p in iter_parameters(self._models)}
        current = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        try:
            _write(parameters, self._reference)
            return self._score(samples)
        finally:
            _write(parameters, current)

    def _temperature(self) -> float:
        sampling = self._config.algorithm.sampling_params
        return sampling.temperature if sampling.do_sample else 1.0

    # Training.

    def train(self, shares: Sequence[Share]) -> list[dict[str, float]]:
        """All optimizer updates of a step on the samples that ``score`` saw. Collective.

        Returns the metrics of each update, named as under ``actor/training/``; equal on all ranks.
        """
        assert self._old_logprobs is not None, "score first"
        share = shares[self._topology.coordinates(self._rank).dp_rank]
        metrics, row = [], 0
        for update, num_tokens, num_sequences in zip(share.updates, share.num_tokens, share.num_sequences, strict=True):
            microbatches = []
            for micro in update:
                microbatches.append(self._microbatch(micro, row))
                row += len(micro)
            denominator = num_tokens if self._config.algorithm.loss_agg_func == "token-mean" else num_sequences
            loss = _PolicyLoss(_loss_options(self._config), denominator, self._config.algorithm.calculate_entropy)
            result = train_step(
                self._models, self._optimizer, microbatches, loss, scheduler=self._scheduler, temperature=self._temperature()
            )
            metrics.append(_update_metrics(result))
        self._old_logprobs = self._reference_logprobs = None
        return metrics

    def _microbatch(self, samples: Sequence[Sample], row: int) -> dict[str, Tensor]:
        batch = collate(samples)
        assert self._old_logprobs is not None
        batch["old_logprobs"] = _padded(self._old_logprobs[row : row + len(samples)], batch["tokens"].size(1))
        if self._reference_logprobs is not None:
            batch["reference_logprobs"] = _padded(self._reference_logprobs[row : row + len(samples)], batch["tokens"].size(1))
        algorithm = self._config.algorithm
        if algorithm.importance_sampling_fix:
            batch["advantages"] = correct_importance(
                batch["advantages"], batch["old_logprobs"], batch["engine_logprobs"], algorithm.importance_sampling_clip
            )
        return batch

    # Checkpoints.

    def save(self, folder: str, step: int) -> None:
        """Write an ``actor/`` folder. Collective."""
        megatron = self._config.actor.megatron
        with_optimizer = not megatron.no_save_optim
        save_checkpoint(
            folder,
            self._bridge if megatron.mbridge else None,
            self._models,
            step=step,
            optimizer=self._optimizer if with_optimizer else None,
            scheduler=self._scheduler if with_optimizer else None,
        )

    def close(self) -> None:
        """Leave the connection and the process groups. Idempotent."""
        if self._syncer is not None:
            self._syncer.close()
            self._syncer = None
        if dist.is_initialized():
            destroy_parallel()


@dataclass(frozen=True, slots=True)
class _PolicyLoss:
    """``TokenLoss`` of one optimizer update; ``denominator`` counts tokens or sequences over all replicas."""

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


def _loss_options(config: RunConfig) -> PolicyLossOptions:
    algorithm = config.algorithm
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


def _update_metrics(result: StepResult) -> dict[str, float]:
    names = {name.split("|")[0] for name in result.metrics if "|" in name}
    quotients = {name: result.metrics[f"{name}|sum"] / max(result.metrics[f"{name}|count"], 1e-12) for name in sorted(names)}
    return {
        **{f"actor/{name}": value for name, value in quotients.items()},
        "actor/grad_norm": result.grad_norm if result.grad_norm is not None else float("nan"),
        "actor/lr": result.learning_rate,
        "actor/update_success": float(not result.skipped),
    }


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    whole = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        whole[i, : row.numel()] = row
    return whole


def _engine_row(sample: Sample) -> Tensor:
    """The engine's log-probabilities in the form ``_score`` returns: zero at the prompt."""
    return torch.cat((torch.zeros(len(sample.prompt_ids)), torch.tensor(sample.engine_logprobs)))


@torch.no_grad()
def _write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
