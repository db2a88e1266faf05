"""Checkpoints of a run: ``hf_model/`` and ``iter_XXXXXXX/`` side by side, staged first and published by one rename.

    <root>/global_step_N/
        actor/hf_model/                               for transformers and vLLM
        actor/hf_adapter/                             of models with adapters: these alone, for PEFT and vLLM
        actor/iter_XXXXXXX/mp_rank_TT[_PPP]/          Megatron's own shards: weights, optimizer, scheduler, random state
        actor/*/checksums.json                        CRC-32 of what was written to each of these folders
        actor/latest_checkpointed_iteration.txt       written last
        data/data.pt                                  the driver's

Owns the order of writing; names and completeness are ``checkpoint_folder``'s, the content of ``mp_rank_*`` is ``rlsync.megatron.state``'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    shards_folder,
    write_durably,
)
from rlsync.bridge.checkpoint_sums import check_written, write_sums
from rlsync.convert.loading import LoadPlan, LoadPlanner, copy_all, restricted_to
from rlsync.convert.optimizer import read_optimizer
from rlsync.convert.sources import rank_files
from rlsync.copy.files import MappedTensors
from rlsync.copy.writes import DeferredWrites, DirectWrites, HostMemory, Writes, Written, read_sums
from rlsync.errors import CheckpointError
from rlsync.layout.safetensors import CHECKSUMS
from rlsync.layout.torch_files import TensorView, read_torch_file
from rlsync.megatron.model import adapters_in, iter_parameters, unwrap
from rlsync.megatron.optimizer import MegatronOptimizer, OptimizerParamScheduler
from rlsync.megatron.optimizer_state import (
    count_steps,
    reload_main_parameters,
    restore_shards,
    set_parameter_states,
)
from rlsync.megatron.parallel import compute_device, current_topology
from rlsync.megatron.state import (
    bytes_of_state,
    create_rank_files,
    put_rank_state,
    put_shards,
    rank_state,
    read_rank_state,
    restore_rank_state,
)
from rlsync.models.shards import PADDED_VOCABULARY
from rlsync.plan.planner import Copy
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

    Ranks write side by side, each what it keeps of the optimizer and an equal part of the weights that others hold too: nothing is
    gathered but what a Hugging Face tensor needs. ``folder`` must be visible to all ranks. Collective over all ranks; an error of one rank
    is raised on all.
    """
    with DirectWrites(summed=Path(folder)) as writes:
        _put(Path(folder), bridge, models, writes, step, optimizer, scheduler)
    _complete(Path(folder), step, writes.written)


class DeferredSave:
    """A checkpoint that is being written from copies in host memory. Made by :func:`begin_checkpoint`."""

    def __init__(self, folder: Path, step: int, writes: DeferredWrites) -> None:
        self._folder, self._step, self._writes = folder, step, writes

    def is_written(self) -> bool:
        """Whether the disk has this rank's part. Not collective. Raises CheckpointError where it cannot be written."""
        return self._writes.wait(timeout_s=0)

    def finish(self) -> None:
        """Wait until the disk has every rank's part, and write the tracker, which makes the folder complete.

        Collective over all ranks; a CheckpointError of one is raised on all, and the folder is not complete then.
        """
        with agreed(device=compute_device()):
            self._writes.wait()
        _complete(self._folder, self._step, self._writes.written)


def prepare_saves(bridge: AutoBridge | None, models: Sequence[torch.nn.Module], memory: HostMemory, *, saves_optimizer: bool) -> None:
    """Have what a first :func:`begin_checkpoint` would wait for: the plan of the HF weights, and in ``memory`` about as many bytes as this
    rank writes. Pinned memory takes 0.4 s a GB.

    ``models`` as the optimizer will get them, which need not exist yet. Not collective.
    """
    topology = current_topology(models)
    folders = [rank_folder(topology, rank) for rank in range(topology.world_size)]
    planned = 0 if bridge is None else bridge.plan_save(models)
    memory.reserve(planned + bytes_of_state(models, parts=folders.count(folders[dist.get_rank()]), has_optimizer=saves_optimizer))


def begin_checkpoint(
    folder: Path | str,
    bridge: AutoBridge | None,
    models: Sequence[torch.nn.Module],
    *,
    step: int,
    memory: HostMemory,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
) -> DeferredSave:
    """As :func:`save_checkpoint`, but return when everything has been copied to ``memory``: models and optimizer may change then, and a
    thread of each rank writes. The folder is complete after :meth:`DeferredSave.finish`, and not before.

    ``memory`` takes the bytes that this rank writes, and is free for another save after ``finish``. Collective over all ranks.
    """
    writes = DeferredWrites(memory, summed=Path(folder))
    _put(Path(folder), bridge, models, writes, step, optimizer, scheduler)
    writes.start()
    return DeferredSave(Path(folder), step, writes)


def _put(
    folder: Path,
    bridge: AutoBridge | None,
    models: Sequence[torch.nn.Module],
    writes: Writes,
    step: int,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
) -> None:
    """Create the files of an ``actor/`` folder but for the tracker, and put what belongs into them. Collective over all ranks."""
    topology, rank = current_topology(models), dist.get_rank()
    folders = [shards_folder(folder, step) / rank_folder(topology, other) for other in range(topology.world_size)]
    writers = [other for other, path in enumerate(folders) if path == folders[rank]]
    with agreed(device=compute_device()):
        folders[rank].mkdir(parents=True, exist_ok=True)
    if bridge is not None:
        bridge.save_weights(models, folder / HF_FOLDER, durable=True, writes=writes)
        if adapters_in(models) is not None:
            bridge.save_adapter(models, folder / ADAPTER_FOLDER, durable=True, writes=writes)
    state = rank_state(models, step=step, optimizer=optimizer, scheduler=scheduler)
    with agreed(device=compute_device()):
        if writers[0] == rank:
            create_rank_files(folders[rank], state, optimizer)
    with agreed(device=compute_device()):
        put_rank_state(folders[rank], state, writes, part=writers.index(rank), parts=len(writers))
        if optimizer is not None:
            put_shards(folders.__getitem__, optimizer, writes)


def _complete(folder: Path, step: int, written: Sequence[Written]) -> None:
    """Write the sums of what all ranks have written, then the tracker. Collective over all ranks."""
    write_sums(folder, written)
    with agreed(device=compute_device()):
        if dist.get_rank() == 0:
            write_durably(folder / TRACKER, str(step))


def _check_sums(shards: Path) -> None:
    """Raise CheckpointError, on every rank, where shards are no longer what was written: tensors, or what is none. Collective over all."""
    check_written(shards)
    path = shards / CHECKSUMS
    with agreed(device=compute_device()):
        for file in sorted({one.file for one in read_sums(path)} if path.is_file() else ())[dist.get_rank() :: dist.get_world_size()]:
            # The file's own sums are of all that is no tensor.
            read_torch_file(file)


def load_checkpoint(
    folder: Path | str,
    bridge: AutoBridge,
    models: Sequence[torch.nn.Module],
    *,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    random_state: bool = True,
) -> Restored:
    """Restore an ``actor/`` folder. Collective over all ranks.

    Options of optimizer and schedule (learning rate, betas, weight decay, shape of the schedule, static loss scale) stay those they were
    built with; their state is restored: moments, step counts, dynamic loss scale. ``random_state`` False leaves the generators as they are.
    Shards of another layout are cut anew, and so is the state of the optimizer; random states then stay as they are. A folder without
    Megatron shards gives its HF weights alone; the result says so. Models with adapters are restored onto the base that they were made
    with, which has been loaded before. Raises CheckpointError, on every rank before anything changes, for an incomplete folder; for
    shards that are no longer what was written; and for one without shards where the models have adapters.
    """
    folder, topology = Path(folder), current_topology(models)
    with agreed(device=compute_device()):
        held = inspect_checkpoint(folder, tp_size=topology.tp_size, pp_size=topology.pp_size, ep_size=topology.ep_size)
        _refuse_merged(folder, models, complete=held.complete)
        shards = shards_folder(folder, held.step)
        if held.complete:
            held = replace(held, moved=held.moved or _was_cut_otherwise(shards, models))
    if held.moved:
        _check_sums(shards)
        _load_moved(shards, bridge, models, optimizer, scheduler)
        return held
    if held.complete:
        folders = [shards / rank_folder(topology, rank) for rank in range(topology.world_size)]
        mine = folders[dist.get_rank()]
        parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler, "random_state": random_state}
        with agreed(device=compute_device()):
            state, kept = read_rank_state(mine, models, folder_of=folders.__getitem__, **parts)
        _check_sums(shards)
        with agreed(device=compute_device()):
            restore_rank_state(state, models, source=str(mine), **parts)
            if optimizer is not None:
                restore_shards(optimizer, kept)
        return held
    bridge.load_weights(models, hf_folder(folder))
    if optimizer is not None:
        reload_main_parameters(optimizer)
    return held


def _was_cut_otherwise(shards: Path, models: Sequence[torch.nn.Module]) -> bool:
    """Whether shards are of another topology than the running one, or their vocabulary is padded otherwise."""
    saved, files = rank_files(shards, adapters_in(models))
    options = next(files).content.get("options")
    rows = options.get(PADDED_VOCABULARY) if isinstance(options, dict) else None
    return saved != current_topology(models) or rows not in (None, unwrap(models[0]).vocab_size)


def _load_moved(
    shards: Path,
    bridge: AutoBridge,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
) -> None:
    """Weights or adapters, main parameters, moments and counters from shards of another layout. Each rank reads what it needs.
    Collective."""
    load_plans: dict[str, LoadPlan] = {}
    saved, adapters = None, adapters_in(models)
    with agreed(device=compute_device()):
        if optimizer is not None:
            saved = read_optimizer(shards, bridge.model, adapters)
            if scheduler is not None and saved.schedule_steps is None:
                raise CheckpointError(f"{shards} was saved without a schedule; load its weights alone (actor.megatron.no_load_optim)")
            trained = {name for _, _, name, parameter in iter_parameters(models) if parameter.requires_grad}
            live = bridge.shards(models) if adapters is None else bridge.adapter_shards(models)
            mine = restricted_to(live.placements[dist.get_rank()], trained)
            mine = replace(mine, buffers=tuple(replace(buffer, dtype="float32") for buffer in mine.buffers))
            load_plans = {plane: LoadPlanner(live.tensors, holdings).plan(mine) for plane, holdings in saved.planes.items()}
            opened = {plane: load.open() for plane, load in load_plans.items()}
    if adapters is None:
        bridge.load_weights(models, shards)
    else:
        bridge.load_adapter_shards(models, shards)
    if optimizer is None or saved is None:
        return
    count_steps(optimizer, saved.adam_steps, _with_tensors(saved.grad_scaler))
    names = {id(parameter): name for _, _, name, parameter in iter_parameters(models)}
    copies: dict[str, dict[str, list[Copy]]] = {plane: defaultdict(list) for plane in load_plans}
    for plane, load in load_plans.items():
        for bucket in load.plan.buckets:
            for copy in bucket.copies:
                copies[plane][copy.destination_buffer].append(copy)

    def state_of(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        name, states = names[id(parameter)], {}
        for plane in load_plans:
            # Padding is zero, and so is its state.
            states[plane] = torch.zeros(parameter.shape, dtype=torch.float32)
            copy_all(copies[plane][name], opened[plane], {name: states[plane]})
        return states

    set_parameter_states(optimizer, state_of)
    if scheduler is not None and saved.schedule_steps is not None:
        scheduler.num_steps = saved.schedule_steps
        scheduler.step(0)


def _with_tensors(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """State of a loss scale with its tensors, which were not read so far."""
    if state is None:
        return None
    views = {name: value.stored(name) for name, value in state.items() if isinstance(value, TensorView)}
    tensors = MappedTensors(views)
    return {name: tensors[name].clone().to(compute_device()) if name in views else value for name, value in state.items()}


def load_checkpoint_weights(folder: Path | str, bridge: AutoBridge, models: Sequence[torch.nn.Module]) -> None:
    """The weights alone of an ``actor/`` folder, or the adapters of models with some, to start another run from; of any layout.

    Call it before ``build_optimizer``. Collective over all ranks. Raises CheckpointError as :func:`load_checkpoint`, PlacementError for
    weights of another model.
    """
    folder, topology = Path(folder), current_topology(models)
    with agreed(device=compute_device()):
        held = inspect_checkpoint(folder, tp_size=topology.tp_size, pp_size=topology.pp_size, ep_size=topology.ep_size)
        _refuse_merged(folder, models, complete=held.complete)
        shards = shards_folder(folder, held.step)
    _check_sums(shards)
    if adapters_in(models) is None:
        bridge.load_weights(models, shards if held.complete else hf_folder(folder))
    else:
        bridge.load_adapter_shards(models, shards)


def _refuse_merged(folder: Path, models: Sequence[torch.nn.Module], *, complete: bool) -> None:
    """CheckpointError where there are adapters to restore, and the folder has HF weights alone: theirs are merged there, or were never."""
    if adapters_in(models) is not None and not complete:
        raise CheckpointError(
            f"{folder} holds HF weights alone, and this run's adapters cannot be told from them; start a new run from {hf_folder(folder)} "
            f"as its base, or load {ADAPTER_FOLDER}/ with AutoBridge.load_adapter where the folder has one"
        )
