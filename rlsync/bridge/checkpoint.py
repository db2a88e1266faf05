"""Checkpoints of a run: ``hf_model/`` and ``iter_XXXXXXX/`` side by side, staged first and published by one rename.

    <root>/global_step_N/
        actor/hf_model/                               for transformers and vLLM
        actor/hf_adapter/                             of models with adapters: these alone, for PEFT and vLLM
        actor/iter_XXXXXXX/mp_rank_TT[_PPP]/          Megatron's own shards: weights, optimizer, scheduler, random state
        actor/latest_checkpointed_iteration.txt       written last
        data/data.pt                                  the driver's

Owns the order of writing; names and completeness are ``checkpoint_folder``'s, the content of ``mp_rank_*`` is ``rlsync.megatron.state``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from rlsync.bridge.auto_bridge import AutoBridge
from rlsync.bridge.checkpoint_folder import (
    ADAPTER_FOLDER,
    HF_FOLDER,
    TRACKER,
    Restored,
    hf_folder,
    inspect_checkpoint,
    rank_folder,
    rank_writer,
    shards_folder,
    write_durably,
)
from rlsync.errors import CheckpointError
from rlsync.megatron.model import adapters_in
from rlsync.megatron.optimizer import MegatronOptimizer, OptimizerParamScheduler
from rlsync.megatron.optimizer_state import distributed_optimizer_state, restore_distributed_optimizer_state
from rlsync.megatron.parallel import compute_device, current_topology
from rlsync.megatron.state import load_rank_weights, rank_state, read_rank_state, restore_rank_state, write_rank_state
from rlsync.transport.collectives import agreed


def save_checkpoint(
    folder: Path | str,
    bridge: AutoBridge | None,
    models: Sequence[torch.nn.Module],
    *,
    step: int,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> None:
    """Write an ``actor/`` folder: HF weights (unless ``bridge`` is None), then Megatron shards, then the tracker, which makes
    it complete. Of models with adapters the shards hold these alone, and the HF weights have them merged.

    ``folder`` must be visible to all ranks. Collective over all ranks; an error of one rank is raised on all.
    """
    folder, topology = Path(folder), current_topology(models)
    shards = shards_folder(folder, step)
    mine = shards / rank_folder(topology, dist.get_rank())
    is_writer = rank_writer(topology, dist.get_rank()) == dist.get_rank()
    with agreed(device=compute_device()):
        mine.mkdir(parents=True, exist_ok=True)
    if bridge is not None:
        bridge.save_weights(models, folder / HF_FOLDER, durable=True)
        if adapters_in(models) is not None:
            bridge.save_adapter(models, folder / ADAPTER_FOLDER, durable=True)
    state = rank_state(models, step=step, optimizer=optimizer, scheduler=scheduler)
    parameters = None if optimizer is None else distributed_optimizer_state(optimizer)
    with agreed(device=compute_device()):
        if is_writer:
            write_rank_state(mine, state, parameters)
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            write_durably(folder / TRACKER, str(step))


def load_checkpoint(
    folder: Path | str,
    bridge: AutoBridge,
    models: Sequence[torch.nn.Module],
    *,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    random_state: bool = True,
) -> Restored:
    """Restore an ``actor/`` folder under the topology it was saved with. Collective over all ranks.

    Options of optimizer and schedule (learning rate, betas, weight decay, shape of the schedule, static loss scale) stay those they were
    built with; their state is restored: moments, step counts, dynamic loss scale. ``random_state`` False leaves the generators as they are.
    A folder without Megatron shards gives its HF weights alone; the result says so. Models with adapters are restored onto the base
    that they were made with, which has been loaded before. Raises CheckpointError, on every rank before anything changes, for an
    incomplete folder, one saved under another TP, PP, EP or ETP, and one without shards where the models have adapters.
    """
    folder, topology = Path(folder), current_topology(models)
    with agreed(device=compute_device()):
        held = inspect_checkpoint(folder, tp_size=topology.tp_size, pp_size=topology.pp_size, ep_size=topology.ep_size)
        _refuse_merged(folder, models, complete=held.complete)
    if held.complete:
        mine = shards_folder(folder, held.step) / rank_folder(topology, dist.get_rank())
        with agreed(device=compute_device()):
            state, parameters = read_rank_state(mine, models, optimizer=optimizer, scheduler=scheduler, random_state=random_state)
        with agreed(device=compute_device()):
            restore_rank_state(state, models, optimizer=optimizer, scheduler=scheduler, random_state=random_state, source=str(mine))
        if optimizer is not None:
            restore_distributed_optimizer_state(parameters, optimizer)
        return held
    bridge.load_weights(models, hf_folder(folder))
    if optimizer is not None:
        optimizer.reload_model_params()
    return held


def load_checkpoint_weights(folder: Path | str, bridge: AutoBridge, models: Sequence[torch.nn.Module]) -> None:
    """The weights alone of an ``actor/`` folder, to start another run from; any number of data-parallel replicas.

    Call it before ``build_optimizer``. Collective over all ranks. Raises CheckpointError as :func:`load_checkpoint`.
    """
    folder, topology = Path(folder), current_topology(models)
    with agreed(device=compute_device()):
        held = inspect_checkpoint(folder, tp_size=topology.tp_size, pp_size=topology.pp_size, ep_size=topology.ep_size)
        _refuse_merged(folder, models, complete=held.complete)
        if held.complete:
            load_rank_weights(shards_folder(folder, held.step) / rank_folder(topology, dist.get_rank()), models)
    if not held.complete:
        bridge.load_weights(models, hf_folder(folder))


def _refuse_merged(folder: Path, models: Sequence[torch.nn.Module], *, complete: bool) -> None:
    """CheckpointError where there are adapters to restore, and the folder has HF weights alone: theirs are merged there, or were never."""
    if adapters_in(models) is not None and not complete:
        raise CheckpointError(
            f"{folder} holds HF weights alone, and this run's adapters cannot be told from them; start a new run from {hf_folder(folder)} "
            f"as its base, or load {ADAPTER_FOLDER}/ with AutoBridge.load_adapter where the folder has one"
        )
