"""One rank of the Megatron actor, as a Ray actor: set-up, memory, sync and checkpoints of every kind of run.

Owns what configuration keys mean for Megatron's parts. All ranks get the same calls in the same order; most are collective over the
actor. Knows no engine but by handle, and no training: ``grpo_actor`` and ``sft_actor`` have it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.checkpoint import DeferredSave, begin_checkpoint, load_checkpoint, prepare_saves, save_checkpoint
from rlsync.bridge.checkpoint_folder import Restored
from rlsync.bridge.source import MegatronSource
from rlsync.copy.cuda import compile_ahead
from rlsync.copy.writes import HostMemory
from rlsync.engine.handles.ray import RayEngine
from rlsync.errors import ConfigError
from rlsync.layout.topology import Topology
from rlsync.megatron.model import DdpOptions, flavour_of, gather_parameters, iter_weights, unwrap
from rlsync.megatron.offload import ActorMemory, Part
from rlsync.megatron.optimizer import OptimizerOptions, SchedulerOptions, build_optimizer, build_scheduler
from rlsync.megatron.optimizer_state import reload_main_parameters
from rlsync.megatron.packing import packing_refusal
from rlsync.megatron.parallel import compute_device, destroy_parallel, freeze_objects, initialize_parallel
from rlsync.megatron.specs import SpecName
from rlsync.models import Flavour
from rlsync.sync import SyncReport, WeightSyncer
from rlsync.transport.collectives import gather_bytes
from rlsync.transport.rendezvous import Rendezvous
from workers.config import AnyConfig
from workers.config.schema import ActorConfig, ActorModelConfig
from workers.gpus import device_memory_gb
from workers.initial_weights import load_initial_weights
from workers.metrics import host_memory_gb
from workers.samples import Padding, TokenBudget
from workers.worker_logs import keep_own_log


class ActorRank:
    """One process of the actor; its environment has ``RANK`` and ``WORLD_SIZE``.

    Order of calls: ``setup``, ``begin``, and where there are engines ``connect``; then ``sync`` and the steps of the run.
    """

    def __init__(self, config: AnyConfig, topology: Topology) -> None:
        keep_own_log()
        self._config, self._topology = config, topology
        self._rank = int(os.environ["RANK"])
        self._syncer: WeightSyncer | None = None
        self._rendezvous: Rendezvous | None = None
        # Kept from save to save: pinned memory takes long to be had.
        self._save_memory = HostMemory()
        self._saving: DeferredSave | None = None

    def listen(self, address: str, port: int = 0) -> int:
        """Listen at ``address``, and nowhere else, for the ranks of the process group; called on rank 0, before ``setup``. Returns the
        port, which is of the system's choice unless one is given. Raises ConfigError where the address is not one of this rank's host."""
        try:
            self._rendezvous = Rendezvous(address, self._timeout_s, port)
        except OSError as error:
            raise ConfigError(
                f"actor rank 0 cannot listen at {address}, where the other ranks would look for it: {error.strerror}; start Ray there with "
                "a --node-ip-address that is one of the node's own"
            ) from error
        return self._rendezvous.port

    def setup(self, address: str, port: int, load_initial: bool) -> None:
        """Create process groups and model; ``load_initial`` loads the initial weights, which the base of adapters is in any case.
        Collective; the ranks meet where rank 0 listens."""
        actor = self._config.actor
        initialize_parallel(
            self._topology,
            seed=actor.seed,
            timeout_s=self._timeout_s,
            backend=actor.megatron.distributed_backend,
            store=None if dist.is_initialized() else self._store(address, port),
        )
        # While the model is built, because a machine that never had the kernels takes 10 seconds to compile them. Engines of this host find
        # them on its disk.
        compile_ahead(compute_device())
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
            frozen=tuple(actor.model.frozen.values()),
            lora=actor.lora_spec,
        )
        packed, why = packing_of(self._config.runner.packing, packing_refusal(unwrap(self._models[0]).config), flavour_of(self._models))
        if self._rank == 0:
            print(f"sequences of a micro-batch are {'packed' if packed else 'padded'}: {why}", flush=True)
        # Of every pass over the model: how its microbatches are laid out.
        self._passes: dict[str, Any] = {
            "packing": packed,
            "chunk_tokens": actor.model.logits_chunk_tokens,
        }
        # A checkpoint of adapters does not have their base.
        if load_initial or actor.lora_spec is not None:
            load_initial_weights(self._bridge, self._models, actor)
        self._memory = ActorMemory(self._models)
        if actor.megatron.async_save and self._config.runner.save_interval > 0:
            # Here, where engines are still starting, and not before the first save, which training would wait for.
            prepare_saves(self._saved_bridge, self._models, self._save_memory, saves_optimizer=not actor.megatron.no_save_optim)

    def token_budget(self, max_positions: int) -> TokenBudget:
        """The budget of micro-batches of at most so many positions that go through this rank's chunks; the same on all ranks."""
        config, multiple_of = unwrap(self._models[0]).config, self._topology.pp_size if self._topology.vpp_size > 1 else 1
        padding: Padding = "all" if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths else "each"
        return TokenBudget(max_positions, "none" if self._passes["packing"] else padding, multiple_of)

    def _store(self, address: str, port: int) -> dist.Store:
        """Where the ranks of the process group find each other. torch's own would listen on every address of the host."""
        if self._rank == 0:
            assert self._rendezvous is not None, "listen first"
            return self._rendezvous.store
        return dist.TCPStore(address, port, None, False, timedelta(seconds=self._timeout_s), wait_for_workers=False)

    @property
    def _timeout_s(self) -> float:
        """Deadline of each collective, in seconds."""
        return self._config.actor.megatron.distributed_timeout_minutes * 60

    def begin(self, resume_folder: str | None, random_state: bool = True) -> Restored | None:
        """Create optimizer and schedule, and load the checkpoint to resume, if any. Collective.

        Args:
            random_state: restore the saved generators; False keeps those seeded with ``actor.seed``.
        """
        actor = self._config.actor
        # After all initial weights: it copies them.
        self._optimizer = build_optimizer(self._models, optimizer_options(actor, actor.optim.lr))
        self._scheduler = build_scheduler(self._optimizer, scheduler_options(actor))
        self._memory = ActorMemory(self._models, self._optimizer)
        freeze_objects()
        if resume_folder is None:
            return None
        if actor.megatron.no_load_optim:
            restored = load_checkpoint(resume_folder, self._bridge, self._models, random_state=random_state)
            reload_main_parameters(self._optimizer)
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
        # A new one: ``begin`` may have given the parameters other memory.
        source = MegatronSource(self._bridge, self._models, stable_memory=stable_memory, lora=self._config.weight_sync.lora)
        if self._syncer is not None:
            self._syncer.close()
            self._syncer.connect(engines, source)
            return
        device = compute_device()
        self._syncer = WeightSyncer(
            source,
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

    # Weights and checkpoints.

    def _weights(self) -> dict[str, Tensor]:
        """Copies in host memory of all that steps change on this rank, by global name. Collective over the DP group."""
        gather_parameters(self._models)
        # Buffers too: that of a router's bias is in no optimizer, and Megatron moves it in each step.
        moved = ((name, t) for name, t in iter_weights(self._models) if t.requires_grad or not isinstance(t, torch.nn.Parameter))
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in moved}

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in iter_weights(self._models):
            if name in weights:
                tensor.copy_(weights[name])

    def save(self, folder: str, step: int) -> None:
        """Write an ``actor/`` folder; with ``actor.megatron.async_save`` only begin to: ``finish_save`` makes it complete. Collective."""
        megatron = self._config.actor.megatron
        parts: dict[str, Any] = {"step": step}
        if not megatron.no_save_optim:
            parts |= {"optimizer": self._optimizer, "scheduler": self._scheduler}
        if megatron.async_save:
            self._saving = begin_checkpoint(folder, self._saved_bridge, self._models, memory=self._save_memory, **parts)
        else:
            save_checkpoint(folder, self._saved_bridge, self._models, **parts)

    @property
    def _saved_bridge(self) -> AutoBridge | None:
        """What writes the HF weights of a checkpoint; None where it has none."""
        return self._bridge if self._config.actor.megatron.mbridge else None

    def is_saved(self) -> bool:
        """Whether the disk has this rank's part of the save that was begun. Raises CheckpointError where it cannot be written."""
        assert self._saving is not None, "save first"
        return self._saving.is_written()

    def finish_save(self) -> None:
        """Make the checkpoint that was begun complete; waits for the disk. Collective."""
        assert self._saving is not None, "save first"
        self._saving.finish()
        self._saving = None

    def close(self) -> None:
        """Close the connection and the process groups. Idempotent."""
        if self._syncer is not None:
            self._syncer.close()
        if dist.is_initialized():
            destroy_parallel()


SPECS: dict[str, SpecName] = {"decoder_gpt": "auto", "local_gpt": "local", "te_gpt": "te"}


def packing_of(wanted: str, refusal: str | None, flavour: Flavour) -> tuple[bool, str]:
    """Whether ``runner.packing`` packs the sequences of a model, and why.

    ``refusal`` is why they cannot be, ``flavour`` that of its layers. Raises ConfigError where packing is on and they cannot be.
    """
    if wanted == "on" and refusal is not None:
        raise ConfigError(f"runner.packing=True: {refusal}")
    if wanted != "auto":
        return wanted == "on", f"runner.packing is {wanted == 'on'}"
    if refusal is not None:
        return False, refusal
    return flavour == "te", f"attention is {'' if flavour == 'te' else 'not '}TransformerEngine's, and runner.packing auto"


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
        log_num_zeros_in_grad=optim.log_num_zeros_in_grad,
        part_lr=optim.part_lr,
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
