"""One rank of the Megatron actor, as a Ray actor: set-up, warm start, sync, log-probabilities, training, checkpoints.

Owns what configuration keys mean for Megatron's parts, where the first weights come from, and the GRPO loss of an optimizer update as
Megatron's passes want it (``algorithms`` has the arithmetic). All ranks get the same calls in the same order; most are collective over
the actor. Knows no engine but by handle.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.checkpoint import load_checkpoint, load_checkpoint_weights, save_checkpoint
from rlsync.bridge.checkpoint_folder import TRACKER, Restored
from rlsync.bridge.source import MegatronSource
from rlsync.engine.handles.ray import RayEngine
from rlsync.layout.topology import Topology
from rlsync.megatron.model import DdpOptions, gather_parameters, iter_parameters, unwrap
from rlsync.megatron.offload import ActorMemory, Part
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
from rlsync.megatron.parallel import compute_device, current_topology, destroy_parallel, initialize_parallel
from rlsync.megatron.scores import TokenScores
from rlsync.megatron.specs import SpecName
from rlsync.megatron.state import STATE_FORMAT
from rlsync.megatron.train import StepResult, token_scores, train_step
from rlsync.sync import SyncReport, WeightSyncer
from rlsync.transport.collectives import agreed, gather_bytes
from workers.algorithms import PolicyLossOptions, correct_importance, policy_loss
from workers.config import RunConfig
from workers.config.schema import ActorConfig, ActorModelConfig, AlgorithmConfig
from workers.metrics import LogprobDifference, device_memory_gb, host_memory_gb
from workers.remote import keep_own_log
from workers.samples import ReplicaBatch, Sample, collate

Example = tuple[tuple[int, ...], tuple[int, ...]]


class ActorRank:
    """One process of the actor; its environment has ``RANK`` and ``WORLD_SIZE``.

    Order of calls: ``setup``, ``warm_start`` where wanted, ``begin``, ``connect``; then ``sync``, ``score``, ``train`` each step.
    """

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        keep_own_log()
        self._config, self._topology = config, topology
        self._rank = int(os.environ["RANK"])
        self._syncer: WeightSyncer | None = None
        self._reference: dict[str, Tensor] | None = None
        self._old_logprobs: list[Tensor] | None = None
        self._reference_logprobs: list[Tensor] | None = None

    def port(self) -> int:
        """A free port on this rank's host for the process group; called on rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def setup(self, address: str, port: int, load_initial: bool) -> None:
        """Create process groups and model; ``load_initial`` loads the initial weights. Collective."""
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        actor = self._config.actor
        initialize_parallel(
            self._topology,
            seed=actor.seed,
            timeout_s=actor.megatron.distributed_timeout_minutes * 60,
            backend=actor.megatron.distributed_backend,
        )
        path = actor.megatron.ckpt_convertor.hf_model_path
        assert path is not None, "load_config derives it"
        self._bridge = AutoBridge.from_pretrained(path, make_vocab_size_divisible_by=actor.model.make_vocab_size_divisible_by)
        self._models = self._bridge.get_model(
            topology=self._topology,
            bf16=actor.model.precision == "bf16",
            fp16=actor.model.precision == "fp16",
            overrides=transformer_overrides(actor.model),
            spec=SPECS[actor.spec_name],
            ddp=ddp_options(actor),
        )
        if load_initial:
            load_initial_weights(self._bridge, self._models, actor)
        self._memory = ActorMemory(self._models)

    def warm_start(self, steps: Sequence[Sequence[Example]], lr: float) -> list[float]:
        """Supervised steps on (prompt, response) token ids, with a separate optimizer. Returns the losses. Collective.

        Every replica takes its part of each step's examples.
        """
        optimizer = build_optimizer(self._models, optimizer_options(self._config.actor, lr))
        dp_rank, losses = self._topology.coordinates(self._rank).dp_rank, []
        for examples in steps:
            samples = [Sample(prompt, response, (), True, None) for prompt, response in examples]
            total = sum(len(s.response_ids) for s in samples)

            def mean_loss(scores: TokenScores, microbatch: Mapping[str, Tensor], total: int = total) -> tuple[Tensor, Mapping[str, Tensor]]:
                return -(scores.log_probs * microbatch["mask"]).sum() / total, {}

            mine = samples[dp_rank :: self._topology.dp_size]
            losses.append(train_step(self._models, optimizer, [collate(mine)], mean_loss).metrics["loss"])
        gather_parameters(self._models)
        return losses

    def begin(self, resume_folder: str | None, random_state: bool = True) -> Restored | None:
        """Create optimizer and schedule, keep the present weights as KL reference, and load the checkpoint to resume, if any. Collective.

        Args:
            random_state: restore the saved generators; False keeps those seeded with ``actor.seed``.
        """
        actor = self._config.actor
        if self._config.algorithm.kl_beta != 0:
            self._reference = self._weights()
        # After all initial weights: it copies them.
        self._optimizer = build_optimizer(self._models, optimizer_options(actor, actor.optim.lr))
        self._scheduler = build_scheduler(self._optimizer, scheduler_options(actor))
        self._memory = ActorMemory(self._models, self._optimizer)
        if resume_folder is None:
            return None
        if actor.megatron.no_load_optim:
            restored = load_checkpoint(resume_folder, self._bridge, self._models, random_state=random_state)
            self._optimizer.reload_model_params()
            return restored
        return load_checkpoint(
            resume_folder,
            self._bridge,
            self._models,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            random_state=random_state,
        )

    # Memory, for the engines on the same devices.

    def offload(self, parts: Sequence[Part]) -> int:
        """Move parts of the actor to host memory; returns the bytes. Collective over the DP group."""
        return self._memory.offload(*parts)

    def onload(self, parts: Sequence[Part]) -> int:
        """Move them to the device again; returns the bytes."""
        return self._memory.onload(*parts)

    def memory(self) -> dict[str, float]:
        """Memory metrics of this rank in 10^9 bytes: host memory now, peak GPU memory since the last call."""
        found = {"perf/actor_host_memory_gb": host_memory_gb()}
        if compute_device().type == "cuda":
            found["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
            torch.cuda.reset_peak_memory_stats()
        device = device_memory_gb()
        return found if device is None else {**found, "perf/device_memory_gb": device}

    # Sync.

    def connect(self, engines: Sequence[RayEngine], stable_memory: bool) -> None:
        """Connect to the engines; an existing connection is replaced, and versions start over. Collective.

        Args:
            stable_memory: whether the weights are never offloaded, so that engines may keep them mapped.
        """
        if self._syncer is not None:
            self._syncer.close()
        device = compute_device()
        self._syncer = WeightSyncer(
            MegatronSource(self._bridge, self._models, stable_memory=stable_memory),
            engines if self._rank == 0 else (),
            self._config.weight_sync,
            rank=self._rank,
            world_size=self._topology.world_size,
            broadcast=lambda payload: gather_bytes(payload, device=device)[0],
        )
        self._syncer.connect()

    def sync(self, version: int) -> SyncReport:
        """Sync the present weights to the engines as ``version``. Collective."""
        assert self._syncer is not None, "connect first"
        return self._syncer.sync(version)

    # Scores.

    def score(self, batches: Sequence[ReplicaBatch]) -> LogprobDifference | None:
        """Recompute the log-probabilities of this replica's samples, and the reference's. Collective.

        Kept on the rank for ``train``. Returns the difference to the engine's on the first rank of each replica.
        """
        at = self._topology.coordinates(self._rank)
        batch, algorithm = batches[at.dp_rank], self._config.algorithm
        samples = batch.samples
        self._old_logprobs = self._score(batch) if algorithm.recompute_logprobs else [_engine_row(s) for s in samples]
        self._reference_logprobs = None if self._reference is None else self._score_reference(batch)
        if not (algorithm.recompute_logprobs and self._config.rollout.return_logprobs) or (at.tp_rank, at.pp_rank) != (0, 0):
            return None
        rows = zip(self._old_logprobs, samples, strict=True)
        flat = torch.cat([(row[len(s.prompt_ids) :] - torch.tensor(s.engine_logprobs)).double().abs() for row, s in rows])
        return LogprobDifference(flat.sum().item(), flat.max().item() if flat.numel() else 0.0, flat.numel())

    def _score(self, batch: ReplicaBatch) -> list[Tensor]:
        """Log-probability of every token of every sample, each (its length,) float32 on the CPU."""
        cuts = batch.cuts(
            None if self._config.runner.enable_dynamic_batch_size else self._config.algorithm.logprob_forward_micro_batch_size
        )
        scored = token_scores(self._models, [collate(cut) for cut in cuts], temperature=self._temperature())
        return [
            scores.log_probs[row, : sample.length].cpu()
            for cut, scores in zip(cuts, scored, strict=True)
            for row, sample in enumerate(cut)
        ]  # fmt: skip

    def _score_reference(self, batch: ReplicaBatch) -> list[Tensor]:
        """``_score`` under the reference weights, which replace the current ones for the call."""
        assert self._reference is not None
        current = self._weights()
        try:
            self._write(self._reference)
            return self._score(batch)
        finally:
            self._write(current)

    def _weights(self) -> dict[str, Tensor]:
        """Copies of this rank's parameters in host memory. Collective over the DP group."""
        gather_parameters(self._models)
        return {name: p.detach().to("cpu", copy=True) for _, _, name, p in iter_parameters(self._models)}

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for _, _, name, parameter in iter_parameters(self._models):
            parameter.copy_(weights[name])

    def _temperature(self) -> float:
        sampling = self._config.algorithm.sampling_params
        return sampling.temperature if sampling.do_sample else 1.0

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
                self._models, self._optimizer, microbatches, objective, scheduler=self._scheduler, temperature=self._temperature()
            )
            metrics.append(update_metrics(result))
        self._old_logprobs = self._reference_logprobs = None
        return metrics

    def _microbatch(self, samples: Sequence[Sample], row: int) -> dict[str, Tensor]:
        """Tensors of a microbatch; ``row`` is the position of its first sample in the order of ``score``."""
        assert self._old_logprobs is not None, "score first"
        batch, algorithm, rows = collate(samples), self._config.algorithm, slice(row, row + len(samples))
        batch["old_logprobs"] = _padded(self._old_logprobs[rows], batch["tokens"].size(1))
        if self._reference_logprobs is not None:
            batch["reference_logprobs"] = _padded(self._reference_logprobs[rows], batch["tokens"].size(1))
        if algorithm.importance_sampling_fix:
            batch["advantages"] = correct_importance(
                batch["advantages"], batch["old_logprobs"], batch["engine_logprobs"], algorithm.importance_sampling_clip
            )
        return batch

    # The end.

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
        """Close the connection and the process groups. Idempotent."""
        if self._syncer is not None:
            self._syncer.close()
            self._syncer = None
        if dist.is_initialized():
            destroy_parallel()


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    whole = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        whole[i, : row.numel()] = row
    return whole


def _engine_row(sample: Sample) -> Tensor:
    """The engine's log-probabilities in the form ``_score`` returns: zero at the prompt."""
    return torch.cat((torch.zeros(len(sample.prompt_ids)), torch.tensor(sample.engine_logprobs)))


SPECS: dict[str, SpecName] = {"decoder_gpt": "auto", "local_gpt": "local", "te_gpt": "te"}


def transformer_overrides(model: ActorModelConfig) -> dict[str, Any]:
    """``TransformerConfig`` fields by name."""
    return {
        "sequence_parallel": model.sequence_parallel,
        # Else every microbatch would be padded to the longest and tallest of them.
        "variable_seq_lengths": model.pipeline_model_parallel_size > 1,
        **model.transformer_overrides(),
    }


def ddp_options(actor: ActorConfig) -> DdpOptions:
    return DdpOptions(
        use_distributed_optimizer=actor.optim.use_distributed_optimizer,
        grad_reduce_in_fp32=actor.megatron.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=actor.optim.overlap_grad_reduce,
        overlap_param_gather=actor.optim.overlap_param_gather,
        bucket_size=actor.megatron.ddp_bucket_size,
        check_for_nan_in_grad=actor.megatron.check_for_nan_in_loss_and_grad,
    )


def optimizer_options(actor: ActorConfig, lr: float) -> OptimizerOptions:
    optim = actor.optim
    return OptimizerOptions(
        lr=lr,
        min_lr=min(optim.min_lr, lr),
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


def scheduler_options(actor: ActorConfig) -> SchedulerOptions:
    optim, schedule = actor.optim, actor.lr_sched
    assert schedule.max_lr is not None and schedule.min_lr is not None, "load_config derives both"
    first, last = schedule.start_weight_decay, schedule.end_weight_decay
    return SchedulerOptions(
        max_lr=schedule.max_lr,
        min_lr=schedule.min_lr,
        lr_decay_style=schedule.lr_decay_style,
        lr_decay_iters=schedule.lr_decay_iters,
        lr_warmup_iters=schedule.lr_warmup_iters,
        lr_warmup_fraction=schedule.lr_warmup_fraction,
        lr_warmup_init=schedule.lr_warmup_init,
        lr_wsd_decay_iters=schedule.lr_wsd_decay_iters,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
        start_weight_decay=optim.weight_decay if first is None else first,
        end_weight_decay=optim.weight_decay if last is None else last,
        weight_decay_incr_style=schedule.weight_decay_incr_style,
    )


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


# What a conversion was made from; written after everything else of it.
ORIGIN = "origin.json"


def load_initial_weights(bridge: AutoBridge, models: Sequence[torch.nn.Module], actor: ActorConfig) -> None:
    """Fill the model as ``actor.model.megatron_checkpoint``, ``mbridge`` and ``use_hf_ckpt`` say. Collective over all ranks.

    Raises CheckpointError or PlacementError, on all ranks.
    """
    hf_path, megatron = actor.megatron.ckpt_convertor.hf_model_path, actor.megatron
    assert hf_path is not None, "load_config derives it"
    if actor.model.megatron_checkpoint is not None:
        load_checkpoint_weights(actor.model.megatron_checkpoint, bridge, models)
    elif megatron.mbridge:
        bridge.load_weights(models, hf_path)
    else:
        assert megatron.use_hf_ckpt and megatron.ckpt_convertor.save_path is not None, "load_config sees to both"
        converted = Path(megatron.ckpt_convertor.save_path).absolute()
        _convert_once(bridge, models, Path(hf_path), converted)
        load_checkpoint_weights(converted, bridge, models)


def _convert_once(bridge: AutoBridge, models: Sequence[torch.nn.Module], hf_folder: Path, converted: Path) -> None:
    """Convert ``hf_folder`` into ``converted`` for this layout, unless that is done.

    Repeated where it was interrupted, where anything that it was made from has changed, and where another ``STATE_FORMAT`` wrote it.
    """
    origin = {"hf_model_path": str(hf_folder.resolve()), "files": _fingerprint(hf_folder), **_layout(models)}
    if _origin_of(converted) == origin:
        return
    dist.barrier()  # nobody removes what another still looks at
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            (converted / ORIGIN).unlink(missing_ok=True)
            shutil.rmtree(converted, ignore_errors=True)
    if dist.get_rank() == 0:
        print(f"converting {hf_folder} to a Megatron checkpoint in {converted}, once", flush=True)
    bridge.load_weights(models, hf_folder)
    save_checkpoint(converted, None, models, step=0)
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            (converted / ORIGIN).write_text(json.dumps(origin, indent=1))


def _origin_of(converted: Path) -> dict[str, Any] | None:
    path = converted / ORIGIN
    if not path.is_file() or not (converted / TRACKER).is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:  # cut short while it was written
        return None


def _fingerprint(hf_folder: Path) -> dict[str, list[int]]:
    """Size and modification time of each weight file: enough to notice other weights under the same path."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(hf_folder.glob("*.safetensors"))}


def _layout(models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Properties that the converted files depend on; data-parallel replicas share the files."""
    topology = asdict(current_topology(models))
    del topology["dp_size"]
    return {
        "state_format": STATE_FORMAT,
        "topology": topology,
        "dtype": str(next(models[0].parameters()).dtype),
        "padded_vocab_size": unwrap(models[0]).vocab_size,
    }


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
        **{f"actor/{name}": value for name, value in quotients.items()},
        "actor/grad_norm": math.nan if result.grad_norm is None else result.grad_norm,
        "actor/num_zeros_in_grad": math.nan if result.num_zeros_in_grad is None else result.num_zeros_in_grad,
        "actor/lr": result.learning_rate,
        "actor/loss_scale": result.loss_scale,
        "actor/update_success": float(not result.skipped),
    }
